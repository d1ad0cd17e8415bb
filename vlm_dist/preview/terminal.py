"""A preview on a terminal: the same as the page, without the pictures themselves."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from vlm_dist.preview.figures import bin_edges
from vlm_dist.preview.lengths import Lengths
from vlm_dist.preview.preview import Preview
from vlm_dist.preview.samples import SampleView
from vlm_dist.preview.tokens import Piece
from vlm_dist.preview.wording import QUANTILES, describe_medium, file_of, visible

#: Without colours, what carries loss stands between these.
_OPEN, _CLOSE = "⟦", "⟧"
_INDENT = (0, 0, 0, 3)
_BAR_WIDTH = 40
_NUM_BARS = 16
_MARKS = {"good": "green", "warn": "yellow", "bad": "red", "info": "dim"}
_PIECES = {"special": "dim cyan", "visual": "green", "gap": "dim"}


def print_preview(preview: Preview, console: Console | None = None) -> None:
    """Print all of it.

    Args:
        preview: to print.
        console: where to; None: the standard output, with colours where it is a terminal.
    """
    out = console if console is not None else Console(highlight=False)
    _heading(out, f"Preview of {preview.run_file}")
    facts = Table.grid(padding=(0, 2))
    for name, value in preview.facts:
        facts.add_row(Text(name, "dim"), Text(value))
    out.print(facts)
    _heading(out, "Samples")
    out.print(Text(preview.intro, "dim"))
    for remark in preview.remarks:
        out.print(Text.assemble((f"{remark.word}: ", _MARKS[remark.level]), visible(remark.text)))
    if not _has_colours(out):
        out.print(Text(f"{_OPEN}tokens between these brackets carry loss{_CLOSE}"))
    for view in preview.samples.views:
        out.print()
        for line in describe_sample(view, _has_colours(out)):
            out.print(line)
    _heading(out, "Lengths")
    out.print(Text(preview.lengths_intro, "dim"))
    for line in _bars(preview.lengths):
        out.print(line)
    out.print(_length_table(preview.lengths))
    _heading(out, "Batching")
    out.print(Text(preview.batching_intro, "dim"))
    out.print(_mode_table(preview))
    out.print(
        Text("*: this run; samples of a micro-batch, micro-batches of a step and rank, the largest of them", "dim")
    )


def _has_colours(out: Console) -> bool:
    return out.color_system is not None and not out.no_color


def _heading(out: Console, text: str) -> None:
    out.print()
    out.print(Text(text, "bold"))


def describe_sample(view: SampleView, has_colours: bool) -> Iterator[Text | Padding]:
    """Lines on one sample: where it comes from, its media, its tokens."""
    origin = " · ".join(visible(part) for part in (view.origin.source, view.origin.shard, view.origin.key))
    yield Text.assemble((f"{view.number}  {origin}", "bold"), (f"  {view.place}", "dim"))
    if view.error is not None:
        yield Padding(Text(f"{view.error_class}: {visible(view.error)}", "red"), _INDENT, expand=False)
        return
    for medium in view.media:
        text = Text.assemble(file_of(medium), (f"  {describe_medium(medium)}", "dim"))
        if medium.kind == "video":
            times = ", ".join(f"{shot.seconds:.2f}" for shot in medium.shots if shot.seconds is not None)
            text.append(f"; at {times} s", "dim")
        yield Padding(text, _INDENT, expand=False)
    prompt = view.num_tokens - view.num_visual - view.num_answer
    yield Padding(
        Text(
            f"{view.num_tokens:,} of {view.max_length:,} tokens: {view.num_visual:,} visual, {prompt:,} prompt, "
            f"{view.num_answer:,} answer; {view.num_targets:,} with loss; its row has {view.row_tokens:,}"
        ),
        (0, 0, 0, 3),
    )
    for note in view.notes:
        yield Padding(Text(note, "yellow"), _INDENT, expand=False)
    yield Padding(_tokens(view, has_colours), _INDENT, expand=False)


def _tokens(view: SampleView, has_colours: bool) -> Text:
    text = Text(no_wrap=False)
    was_loss = False
    for piece in view.pieces:
        if piece.has_loss != was_loss and not has_colours:
            text.append(_OPEN if piece.has_loss else _CLOSE)
        was_loss = piece.has_loss
        style = "bold underline blue" if piece.has_loss else _PIECES.get(piece.kind, "")
        text.append(_said(piece), style)
    if was_loss and not has_colours:
        text.append(_CLOSE)
    return text


def _said(piece: Piece) -> str:
    if piece.kind == "gap":
        return f" … {piece.text} … "
    told = "\n".join(visible(line) for line in piece.text.split("\n"))
    return f"{told} x {piece.count:,} " if piece.kind == "visual" and piece.count > 1 else told


def _bars(lengths: Lengths) -> Iterator[Text]:
    """A histogram that lies on its side."""
    tokens = np.concatenate([source.tokens for source in lengths.sources])
    edges = bin_edges(int(tokens.max(initial=0)), _NUM_BARS)
    counts, _ = np.histogram(tokens, edges)
    most, last = max(int(counts.max()), 1), int(np.flatnonzero(counts).max(initial=0)) + 1
    for low, high, count in list(zip(edges[:-1], edges[1:], counts, strict=True))[:last]:
        limit = " ← max_length" if low <= lengths.max_length < high else ""
        bar = "█" * round(_BAR_WIDTH * int(count) / most) or ("▏" if count else "")
        yield Text.assemble(f"{int(low):>8,} ", (f"{bar:<{_BAR_WIDTH}}", "blue"), f" {int(count):,}", (limit, "red"))


def _length_table(lengths: Lengths) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", expand=False)
    table.add_column("source")
    ends = ("at limit",) if lengths.outcomes is None else ()  # a remark has told what becomes of them
    for name in ("samples", "repeat", *(name for name, _ in QUANTILES), *ends, "patches", "most"):
        table.add_column(name, justify="right")
    for source in lengths.sources:
        share = source.num_at_limit / max(len(source.tokens), 1)
        table.add_row(
            Text(visible(source.name)),
            f"{source.num_samples:,}",
            f"{source.repeat:g}",
            *(f"{source.tokens_at(share):,}" for _, share in QUANTILES),
            *([f"{share:.1%}"] if lengths.outcomes is None else []),
            f"{source.patches_at(0.5):,}",
            f"{source.patches_at(1.0):,}",
        )
    return table


def _mode_table(preview: Preview) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", expand=False)
    table.add_column("mode")
    names = ["padding", "samples each", "a step", "most tokens", "patches"]
    for name in [*names, *(("slowest", "idle") if preview.world_size > 1 else ())]:
        table.add_column(name, justify="right")
    for mode in preview.modes:
        name = Text(f"{mode.mode}{' *' if mode.is_own else ''}", "bold" if mode.is_own else "")
        figures = mode.figures
        if figures is None:
            table.add_row(name, Text("cannot be had", "dim"))
            continue
        row = [
            f"{figures.padding_share:.1%}",
            f"{figures.samples_per_micro_batch:.1f}",
            f"{figures.micro_batches_per_rank:.1f}",
            f"{figures.max_tokens:,}",
            f"{figures.max_patches:,}",
        ]
        if preview.world_size > 1:
            row += [f"{figures.token_max_over_mean:.3f}", f"{figures.idle_share:.1%}"]
        table.add_row(name, *row)
    return table
