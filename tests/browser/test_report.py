"""Reports in a real browser: curves are drawn in both themes, the controls work, and nothing is asked of a network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.browser.conftest import Reader, fits_its_width
from tests.unit.report.runs import at, make_run, started, train_line, write_lines
from vlm_dist.report.html import write_page
from vlm_dist.report.report import make_report

EVIL = '</script><img src=x onerror="document.title=1">'


def a_run(directory: Path, factor: float = 1.0, num_steps: int = 120) -> Path:
    lines = [
        train_line(
            step,
            loss=factor * (1 + 3 / step + step % 3 / 5),
            **{"ocr/loss": 1.0, f"{EVIL}/loss": None if step % 4 else 2.0},
        )
        for step in range(1, num_steps + 1)
        if step not in range(50, 60)
    ]
    evaluations = [
        {"kind": "eval", "time": at(step), "step": step, "ocr/loss": factor * 2 / step, "ocr/exact_match": 0.5}
        for step in (40, 80, 120)
    ]
    checkpoint = {"event": "checkpoint", "time": at(80), "step": 80, "bytes": 10**6, "write_seconds": 0.5}
    make_run(
        directory, [*lines, *evaluations], [started(0), checkpoint, {"event": "done", "time": at(121), "step": 120}]
    )
    write_lines(directory / "metrics_superseded.jsonl", [train_line(61), train_line(62)])
    record = {"source": "ocr", "shard": "a.tar", "key": EVIL, "class": "decode", "message": EVIL, "step": 3, "rank": 0}
    write_lines(directory / "quarantine" / "rank-00000.jsonl", [record | {"purpose": "train"}])
    return directory


def state_of(page: Any) -> dict[str, Any]:
    """What the first chart, the loss, shows."""
    return dict(
        page.evaluate("""() => {
            const plot = document.querySelector(".plot"), full = plot._fullLayout;
            return {
                axis: full.xaxis.title.text, type: full.yaxis.type, range: full.xaxis.range, top: full.yaxis.range[1],
                lines: plot.querySelectorAll(".scatterlayer .trace").length, ink: full.font.color,
                visible: plot._fullData.filter((trace) => trace.visible === true).length,
                all: [...document.querySelectorAll(".plot")].map((one) => one._fullLayout.xaxis.range[1]),
            };
        }""")
    )


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_one_run(reader: Reader, tmp_path: Path, theme: str) -> None:
    path = tmp_path / "report.html"
    write_page(make_report([a_run(tmp_path / "run")]), path)
    page = reader.open(path, theme=theme)
    assert page.locator(".plot").count() >= 10
    first = state_of(page)
    assert first["lines"] == 3 and first["axis"] == "step"  # train, eval, superseded
    # what comes from the data stays text
    assert page.title() == f"Training report · {tmp_path / 'run'}"
    assert page.get_by_text(EVIL).count() >= 2 and page.locator("main img").count() == 0
    # a gap is not bridged
    assert page.evaluate("document.querySelector('.plot').data[0].y.includes(null)")

    page.keyboard.press("x")
    assert state_of(page)["axis"] == "minutes of training (steps alone)"
    page.keyboard.press("s")
    assert state_of(page)["lines"] == 4
    page.keyboard.press("l")
    assert state_of(page)["type"] == "log"
    page.keyboard.press("t")
    other = state_of(page)
    assert other["ink"] != first["ink"] and (other["type"], other["lines"]) == ("log", 4)
    page.keyboard.press("j")
    assert page.evaluate("document.activeElement.hasAttribute('data-item')")


def test_several_runs(reader: Reader, tmp_path: Path) -> None:
    runs = [a_run(tmp_path / name, factor) for name, factor in (("first", 1.0), ("second", 2.0), (EVIL[9:12], 3.0))]
    path = tmp_path / "report.html"
    write_page(make_report(runs), path, "tokens")
    page = reader.open(path, width=1400)
    first = state_of(page)
    assert first["axis"].startswith("tokens") and first["lines"] == 3 * 3 + 2  # two tell what dashes are
    colors = page.evaluate(
        """() => [...document.querySelectorAll(".plot")].flatMap((plot) => plot.data)
            .filter((trace) => trace.meta && trace.meta.smooth && trace.mode !== "markers")
            .map((trace) => trace.meta.run + trace.line.color)"""
    )
    assert len(set(colors)) == 3  # a run has one colour everywhere
    # runs can be hidden, by key and by box
    page.keyboard.press("2")
    assert state_of(page)["visible"] == first["visible"] - 3
    page.get_by_label("first", exact=True).uncheck()
    assert state_of(page)["visible"] == first["visible"] - 6
    # to zoom one is to zoom all
    box = page.locator(".plot .nsewdrag").first.bounding_box()
    across, middle = box["width"] / 4, box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + across, middle)
    page.mouse.down()
    page.mouse.move(box["x"] + 2 * across, middle, steps=5)
    page.mouse.up()
    page.wait_for_function(
        """(before) => [...document.querySelectorAll(".plot")].every((plot, _, [first]) =>
            plot._fullLayout.xaxis.range[1] === first._fullLayout.xaxis.range[1] &&
            plot._fullLayout.xaxis.range[1] < 0.6 * before)""",
        arg=first["range"][1],
    )
    assert page.locator("table.figures td.best").count() > 0


def test_a_narrow_window(reader: Reader, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write_page(make_report([a_run(tmp_path / "first"), a_run(tmp_path / "second", 2.0)]), path)
    page = reader.open(path, width=400)
    assert fits_its_width(page)


def test_without_scripts_figures_and_events_are_there(reader: Reader, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write_page(make_report([a_run(tmp_path / "run")]), path)
    page = reader.open(path, scripts=False)
    assert page.get_by_text("checkpoint-80").count() > 0 and page.get_by_text("held-out loss, last").count() > 0
