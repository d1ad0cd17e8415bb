"""The page of `vlm-dist preview`, as a person meets it in a browser."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.browser.conftest import Reader, fits_its_width
from tests.preview_run import EVIL_NAME, EVIL_QUESTION, KOREAN_ANSWER, write_preview_run
from tests.tiny_run import TinyRun

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Written by the command line."""
    directory = tmp_path_factory.mktemp("preview")
    run_file = write_preview_run(directory)
    command = [sys.executable, "-m", "vlm_dist.cli", "preview", str(run_file.relative_to(directory)), "-n", "16"]
    ended = TinyRun(directory).command([*command, "-o", "pages/preview.html", "--terminal"])
    assert ended.exit_code == 0, ended.output
    assert "wrote pages/preview.html" in ended.stdout
    assert f"⟦{KOREAN_ANSWER}<|im_end|>⟧" in ended.stdout  # not a terminal: brackets instead of colours
    assert [file.name for file in (directory / "pages").iterdir()] == ["preview.html"]
    return directory / "pages" / "preview.html"


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1600])
def test_it_opens_from_a_file_in_any_window(reader: Reader, page_file: Path, theme: str, width: int) -> None:
    page = reader.open(page_file, theme=theme, width=width)
    assert fits_its_width(page)
    assert page.locator("article.sample").count() == 16
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, ground[4:-1].split(","))) < 150) == (theme == "dark")
    # no text is hidden behind the edge of its box
    clipped = """[...document.querySelectorAll('h1, h2, h3, p, dd, summary, .remarks li')]
        .filter(box => box.scrollWidth > box.clientWidth + 1 && getComputedStyle(box).display !== 'inline')
        .map(box => box.textContent)"""
    assert page.evaluate(clipped) == []
    # and no column of a table is squeezed
    assert page.evaluate("Math.max(...[...document.querySelectorAll('tbody tr')].map(row => row.offsetHeight))") < 90


def test_pictures_load_and_are_described(reader: Reader, page_file: Path) -> None:
    page = reader.open(page_file)
    pictures = page.evaluate("[...document.images].map(one => [one.complete && one.naturalWidth, one.alt])")
    assert len(pictures) > 15 and all(width > 0 and alt for width, alt in pictures)
    assert any("china.jpg, 336 × 224 pixels" in alt for _, alt in pictures)
    assert any("Frame at 0.33 s of video 1" in alt and "pan.mp4" in alt for _, alt in pictures)
    assert "640 × 427 → 336 × 224 pixels" in page.locator(".medium.image").first.inner_text()
    times = page.locator(".medium.video").first.locator("figcaption").all_inner_texts()
    assert len(times) == 8 and times == sorted(times)


def test_what_carries_loss_is_marked_not_by_colour_alone(reader: Reader, page_file: Path) -> None:
    page = reader.open(page_file)
    card = page.locator("article", has_text="A pagoda on a hill in China.").first
    marked = card.locator(".said > .tokens mark.loss")
    assert marked.count() == 1
    assert marked.inner_text() == "A pagoda on a hill in China.<|im_end|>"
    assert marked.locator(".p").first.evaluate("one => getComputedStyle(one).borderBottomWidth") == "2px"
    prompt = card.locator(".said > .tokens > .p.text").first
    assert prompt.evaluate("one => getComputedStyle(one).borderBottomWidth") == "0px"
    assert "<|image_pad|> × 96" in card.locator(".p.visual").inner_text()


def test_ids_come_by_pointer_and_by_keys(reader: Reader, page_file: Path) -> None:
    page = reader.open(page_file)
    tip = page.locator("#tip")
    assert tip.is_hidden()
    page.locator("#sample-1 mark.loss .p").first.hover()
    assert "carries loss" in tip.inner_text() and " · id " in tip.inner_text()
    page.mouse.move(0, 0)
    page.keyboard.press("j")
    while page.evaluate("document.activeElement.className") != "tokens":
        page.keyboard.press("Tab")
    assert "token 0" in tip.inner_text()
    page.keyboard.press("ArrowRight")
    assert "token 1 " in tip.inner_text() and "no loss" in tip.inner_text()
    assert page.locator(".p.at").count() == 1


def test_the_keys_walk_through_the_samples(reader: Reader, page_file: Path) -> None:
    page = reader.open(page_file)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    visited = []
    for key in ("j", "j", "ArrowRight", "k", "ArrowLeft"):
        page.keyboard.press(key)
        visited.append(page.evaluate("document.activeElement.id"))
    assert visited == ["sample-1", "sample-2", "sample-3", "sample-2", "sample-1"]
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("?")
    assert page.locator("dialog#keys").is_visible() and "light or dark" in page.locator("dialog#keys").inner_text()
    page.keyboard.press("Escape")
    assert page.locator("dialog#keys").is_hidden()


def test_the_theme_is_toggled_and_remembered(reader: Reader, page_file: Path) -> None:
    page = reader.open(page_file, theme="light")
    colour = "document.querySelector('.plot .bars path').style.fill"
    before = page.evaluate(colour)
    page.keyboard.press("t")
    page.wait_for_selector(".plot[data-drawn=dark]")
    assert page.evaluate(colour) != before
    page.reload()
    page.wait_for_selector(".plot[data-drawn=dark]")
    assert page.locator("#theme").get_attribute("aria-pressed") == "true"
    page.locator("#theme").click()
    page.wait_for_selector(".plot[data-drawn=light]")


def test_charts_are_drawn(reader: Reader, page_file: Path) -> None:
    page = reader.open(page_file)
    assert page.locator(".plot").count() == 3
    assert all(count > 2 for count in page.evaluate(
        "[...document.querySelectorAll('.plot')].map(plot => plot.querySelectorAll('.bars path').length)"
    ))  # fmt: skip
    assert "max_length 512" in page.locator("#lengths .plot").first.inner_text()
    text = page_file.read_text()
    assert text.count("plotly.js v") == 1


def test_what_comes_from_data_stays_text(reader: Reader, page_file: Path) -> None:
    page = reader.open(page_file)
    shown = page.locator("article", has_text="Is it bold?").first
    assert EVIL_QUESTION in shown.locator(".said > .tokens").inner_text()
    assert EVIL_NAME in shown.locator(".medium").inner_text()
    assert page.evaluate("document.querySelectorAll('[onerror], .tokens b b, .tokens script').length") == 0
    # and if something were not escaped, the page's own policy would not let it run
    page.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=\"data:,\" onerror=\"window.ran = 1\">')")
    page.wait_for_timeout(100)
    assert page.evaluate("window.ran") is None
    assert len(reader.problems) == 1 and "Content Security Policy" in reader.problems.pop()


def test_what_cannot_be_used_shows_its_error(reader: Reader, page_file: Path) -> None:
    page = reader.open(page_file)
    broken = page.locator("article.broken")
    assert broken.count() == 1 and broken.locator("img").count() == 0
    assert "torn.jpg: cannot decode the image" in broken.inner_text()


def test_it_can_be_read_without_scripts(reader: Reader, page_file: Path) -> None:
    page = reader.open(page_file, scripts=False)
    assert "switched off" in page.locator("noscript").inner_text()
    assert page.locator("article.sample").count() == 16
