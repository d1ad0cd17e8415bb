"""The shell of pages: one file, nothing from outside, nothing of the data taken for code."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

import plotly.graph_objects as go
import pytest

from vlm_dist.observability.page import Page, chart_text, data_uri
from vlm_dist.observability.page.palette import COLORS

TEMPLATE = """{% extends "page.html.jinja" %}
{% block main %}
<p id="said">{{ said }}</p>
{% for figure in figures %}{{ chart(figure, said) }}{% endfor %}
{% endblock %}
"""
EVIL = "</script><script>alert(1)</script>"


@pytest.fixture
def page(tmp_path: Path) -> Page:
    (tmp_path / "own.html.jinja").write_text(TEMPLATE)
    (tmp_path / "own.js").write_text('"use strict";')
    facts, nav = [("name", EVIL)], [("said", EVIL)]
    return Page(
        EVIL, EVIL, templates=tmp_path, template="own.html.jinja", facts=facts, nav=nav, script="own.js"
    )  # fmt: skip


def figure() -> go.Figure:
    return go.Figure(go.Scatter(y=[3, 2, 1], name=chart_text(EVIL), text=[EVIL] * 3), {"title": {"text": EVIL}})


def test_only_the_programs_own_scripts_may_run(page: Page) -> None:
    text = page.render(said=EVIL, figures=[figure(), figure()])
    assert EVIL not in text and "alert(1)" in text
    scripts = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    assert len(scripts) == 4 and '"use strict";' in scripts
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', text)
    assert policy.startswith("default-src &#39;none&#39;") and "unsafe-eval" not in policy
    for script in scripts:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"sha256-{digest}" in policy.replace("&#43;", "+").replace("&#34;", '"')


def test_nothing_is_asked_for_from_outside(page: Page) -> None:
    text = page.render(said=data_uri(b"png", "image/png"), figures=[])
    assert "data:image/png;base64,cG5n" in text
    addresses = re.findall(r'(?:src|href)="([^"]*)"', text)
    assert len(addresses) > 2 and all(address.startswith(("#", "data:")) for address in addresses)


def test_plotly_comes_once_and_only_where_there_are_charts(page: Page) -> None:
    assert len(page.render(said="", figures=[])) < 40_000
    assert page.render(said="", figures=[figure(), figure()]).count("plotly.js v") == 1


def test_a_page_is_written_whole_or_not_at_all(page: Page, tmp_path: Path) -> None:
    path = tmp_path / "new" / "page.html"
    page.write(path, said="first", figures=[])
    with pytest.raises(TypeError):
        page.write(path, said="second", figures=3)
    assert "first" in path.read_text() and [file.name for file in path.parent.iterdir()] == ["page.html"]


def luminance(color: str) -> float:
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("theme", [0, 1])
def test_text_stands_out_from_its_ground(theme: int) -> None:
    pairs = [(text, ground) for text in ("ink", "muted", "accent") for ground in ("ground", "surface", "sunken")]
    pairs += [(level, f"{level}-soft") for level in ("good", "warn", "bad", "accent")] + [("ink", "accent-soft")]
    for text, ground in pairs:
        low, high = sorted((luminance(COLORS[text][theme]), luminance(COLORS[ground][theme])))
        assert (high + 0.05) / (low + 0.05) >= 4.5, (text, ground)


def test_places_where_no_page_can_be(tmp_path: Path) -> None:
    from vlm_dist.errors import ConfigError
    from vlm_dist.observability.page import check_place

    with pytest.raises(ConfigError, match="is a directory; name a file in it"):
        check_place(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be written"):
        check_place(tmp_path / "file" / "page.html")
    check_place(tmp_path / "new" / "page.html")
    assert (tmp_path / "new").is_dir()
