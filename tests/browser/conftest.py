"""A real browser: the system's Chromium, headless, without a network."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

#: Set by .ci/run: there, a missing browser is a failure.
REQUIRED = "VLM_DIST_REQUIRE_CLUSTER"


@dataclass
class Reader:
    """Opens files as a person does, and notes whatever goes wrong.

    Attributes:
        browser: playwright's.
        problems: messages of the console, errors of scripts, and addresses that were asked for.
    """

    browser: Any
    problems: list[str] = field(default_factory=list)
    _contexts: list[Any] = field(default_factory=list)

    def open(
        self, path: Path, *, theme: str = "light", width: int = 1200, height: int = 900, scripts: bool = True
    ) -> Any:
        """Open a file in a browser of its own; gives back playwright's page, its charts drawn.

        Args:
            path: of the file.
            theme: of the reader's system, "light" or "dark".
            width: of the window, in CSS pixels.
            height: the same.
            scripts: False: the browser runs none.
        """
        context = self.browser.new_context(
            color_scheme=theme, viewport={"width": width, "height": height}, java_script_enabled=scripts
        )
        self._contexts.append(context)
        context.route(lambda address: not address.startswith(("file:", "data:")), self._refuse)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("console", lambda message: self.problems.append(message.text) if message.type != "debug" else None)
        page.on("pageerror", lambda error: self.problems.append(str(error)))
        page.goto(path.resolve().as_uri())
        if scripts:
            page.wait_for_function("[...document.querySelectorAll('.plot')].every(plot => plot.dataset.drawn)")
        return page

    def close(self) -> None:
        for context in self._contexts:
            context.close()

    def _refuse(self, route: Any) -> None:
        self.problems.append(f"asked for {route.request.url}")
        route.abort()


def fits_its_width(page: Any) -> bool:
    """Whether nothing of the page is beyond the right edge of the window."""
    return bool(page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth"))


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    executable = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if executable is None:
        reason = "there is no Chromium (Debian package: chromium)"
        if os.environ.get(REQUIRED):
            pytest.fail(f"{REQUIRED} is set, and pages cannot be looked at: {reason}")
        pytest.skip(f"NOTHING ABOUT PAGES IS LOOKED AT: {reason}")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def reader(chromium: Any) -> Iterator[Reader]:
    """Fails the test if a page complained or asked for anything."""
    opened = Reader(chromium)
    yield opened
    opened.close()
    assert opened.problems == []
