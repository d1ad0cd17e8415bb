"""One HTML file that needs nothing else."""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from vlm_dist import __version__
from vlm_dist.errors import ConfigError
from vlm_dist.observability.page.charts import Charts, plotly_script
from vlm_dist.observability.page.palette import COLORS

_HERE = Path(__file__).parent


class Page:
    """A page in the shell; the package's docstring shows its use.

    Args:
        title: of the page.
        subtitle: what it is about, such as a run file or directory.
        templates: directory of the room's own templates.
        template: one of them, which extends `page.html.jinja`.
        facts: names and values shown under the title.
        nav: ids and names of sections.
        script: file in `templates` that runs after the shell's own.
        filters: of the template, by name.
    """

    def __init__(
        self,
        title: str,
        subtitle: str = "",
        *,
        templates: Path,
        template: str,
        facts: Sequence[tuple[str, str]] = (),
        nav: Sequence[tuple[str, str]] = (),
        script: str | None = None,
        filters: Mapping[str, Callable[..., object]] | None = None,
    ) -> None:
        self._values = {"title": title, "subtitle": subtitle, "facts": list(facts), "nav": list(nav)}
        self._template = template
        self._own_script = _verbatim(templates / script) if script is not None else None
        self._environment = Environment(
            loader=FileSystemLoader([templates, _HERE]),
            autoescape=True,
            trim_blocks=True,
            lstrip_blocks=True,
            undefined=StrictUndefined,
        )
        self._environment.filters["count"] = lambda number: f"{number:,}"
        self._environment.filters["percent"] = lambda share, digits=1: f"{100 * share:.{digits}f}%"
        self._environment.filters.update(filters or {})

    def render(self, **values: Any) -> str:
        """Fill in the template."""
        charts = Charts()
        shell = {
            "colors": COLORS,
            "style": _verbatim(_HERE / "page.css"),
            "early_script": _verbatim(_HERE / "early.js"),
            "script": _verbatim(_HERE / "page.js"),
            "own_script": self._own_script,
            "plotly": lambda: Markup(plotly_script()) if charts.count else None,  # noqa: S704
            "chart": charts,
            "policy": _policy(self._own_script),
            "version": __version__,
            "made_at": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        }
        return self._environment.get_template(self._template).render(**shell, **self._values, **values)

    def write(self, path: Path, **values: Any) -> None:
        """Fill in the template and put the file in its place at once, so that a reader never meets half of it.

        Raises:
            ConfigError: it cannot be written.
        """
        text = self.render(**values)
        check_place(path)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(path)
        except OSError as error:
            raise ConfigError(f"-o {path} cannot be written: {error.strerror or error}") from error
        finally:
            temporary.unlink(missing_ok=True)


def check_place(path: Path) -> None:
    """Make the folder of a page, and refuse a place where none can be; before the work that it takes.

    Raises:
        ConfigError: with the reason.
    """
    if path.is_dir():
        raise ConfigError(f"-o {path} is a directory; name a file in it, such as {path / 'page.html'}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"-o {path} cannot be written: {error.strerror or error}") from error
    if not os.access(path.parent, os.W_OK):
        raise ConfigError(f"-o {path} cannot be written: no right to write in {path.parent}")


def data_uri(content: bytes, mime: str) -> str:
    """The address of a picture that lies in the page itself."""
    return f"data:{mime};base64,{base64.b64encode(content).decode()}"


def _verbatim(path: Path) -> Markup:
    """A file of the program, which is put into the page as it is."""
    return Markup(path.read_text(encoding="utf-8"))  # noqa: S704


@cache
def _policy(own_script: Markup | None) -> str:
    """Nothing is fetched and nothing sent, and no script runs but the program's own, whatever the data says."""
    scripts = [str(_verbatim(_HERE / "early.js")), str(_verbatim(_HERE / "page.js")), plotly_script()]
    if own_script is not None:
        scripts.append(str(own_script))
    hashes = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in scripts
    )
    return (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:; font-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
