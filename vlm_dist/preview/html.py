"""A preview as a page."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from markupsafe import Markup, escape

from vlm_dist.observability.page import Page, data_uri
from vlm_dist.preview.figures import padding_bars, patch_histogram, token_histogram
from vlm_dist.preview.preview import Preview
from vlm_dist.preview.tokens import Piece
from vlm_dist.preview.wording import QUANTILES, describe_medium, file_of, size, visible

_NAV = [("samples", "Samples"), ("lengths", "Lengths"), ("batching", "Batching")]


def write_page(preview: Preview, path: Path) -> None:
    """Write the page; it appears under its name only when it is whole."""
    page = Page(
        "Preview",
        f"{preview.run_file}, {'held-out' if preview.held_out else 'training'} samples",
        templates=Path(__file__).parent,
        template="preview.html.jinja",
        facts=preview.facts,
        nav=_NAV,
        script="preview.js",
        filters={
            "visible": _marked,
            "uri": data_uri,
            "size": size,
            "describe": describe_medium,
            "file_of": file_of,
            "groupby_loss": _by_loss,
        },
    )
    page.write(
        path,
        preview=preview,
        quantiles=QUANTILES,
        token_chart=token_histogram(preview.lengths),
        patch_chart=patch_histogram(preview.lengths),
        padding_chart=padding_bars(preview.modes),
    )


def _marked(text: str) -> Markup:
    """Text of tokens: line ends are shown, and kept; nothing in it is taken for HTML."""
    return Markup('<i class="nl">↵</i>\n').join(escape(visible(line)) for line in text.split("\n"))


def _by_loss(pieces: Sequence[Piece]) -> list[tuple[bool, list[Piece]]]:
    """Runs of tokens with and without loss."""
    return [(has_loss, list(some)) for has_loss, some in groupby(pieces, key=lambda piece: piece.has_loss)]
