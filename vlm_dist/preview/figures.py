"""Charts of a preview: lengths of samples, padding of the modes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from vlm_dist.observability.page import chart_text
from vlm_dist.observability.page.palette import BAD, MUTED, SERIES

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from vlm_dist.preview.batching import ModeFigures
    from vlm_dist.preview.lengths import Lengths

_NUM_BARS = 40
#: So few samples get an axis of whole numbers.
_FEW = 8
#: A `max_length` so many times the longest sample would leave the bars no room.
_FAR_AWAY = 2.5


def token_histogram(lengths: Lengths) -> Figure:
    """Tokens of samples, bars of the sources on top of each other, with `max_length`."""
    figure = _histogram([source.name for source in lengths.sources], [one.tokens for one in lengths.sources], "tokens")
    longest = max((int(one.tokens.max(initial=0)) for one in lengths.sources), default=0)
    limit = lengths.max_length
    is_near = limit <= max(longest, 1) * _FAR_AWAY
    if is_near:
        figure.add_shape(type="line", x0=limit, x1=limit, y0=0, y1=1, yref="paper", line={"color": BAD, "width": 2})
    figure.add_annotation(
        x=limit if is_near else 1,
        xref="x" if is_near else "paper",
        y=1,
        yref="paper",
        xanchor="right",
        yanchor="top",
        xshift=-5,
        showarrow=False,
        text=f"max_length {limit:,}" + ("" if is_near else " →"),
        font={"color": BAD},
    )
    return figure


def patch_histogram(lengths: Lengths) -> Figure | None:
    """Patches of the vision tower of samples that show something; None where none does."""
    shown = [(one.name, one.patches[one.patches > 0]) for one in lengths.sources]
    if not any(len(patches) for _, patches in shown):
        return None
    return _histogram([name for name, _ in shown], [patches for _, patches in shown], "patches")


def padding_bars(modes: Sequence[ModeFigures]) -> Figure:
    """Padding share of each mode."""
    import plotly.graph_objects as go

    shown = [mode for mode in modes if mode.figures is not None]
    shares = [100 * mode.figures.padding_share for mode in shown if mode.figures is not None]
    figure = go.Figure(
        go.Bar(
            y=[mode.mode.replace("_", " ") for mode in shown],
            x=shares,
            orientation="h",
            text=[f"{share:.1f}%" for share in shares],
            textposition="outside",
            cliponaxis=False,
            marker_color=[SERIES[0] if mode.is_own else SERIES[6] for mode in shown],
            hovertemplate="%{y}: %{x:.1f}% of the computed tokens<extra></extra>",
        )
    )
    figure.update_layout(
        xaxis={"title": {"text": "padding, % of the computed tokens"}, "range": [0, max([*shares, 10]) * 1.15]},
        yaxis={"autorange": "reversed", "showgrid": False},
        bargap=0.45,
        margin={"l": 8, "r": 40, "t": 8, "b": 44},
    )
    return figure


def _histogram(names: Sequence[str], values: Sequence[NDArray[np.int64]], unit: str) -> Figure:
    import plotly.graph_objects as go

    edges = bin_edges(max((int(one.max(initial=0)) for one in values), default=0))
    width = float(edges[1] - edges[0])
    figure = go.Figure()
    most = 0
    for number, (name, some) in enumerate(zip(names, values, strict=True)):
        counts, _ = np.histogram(some, edges)
        most += int(counts.max(initial=0))
        figure.add_bar(
            x=(edges[:-1] + width / 2).tolist(),
            y=counts.tolist(),
            width=width,
            name=chart_text(name),
            showlegend=len(names) > 1 and len(some) > 0,
            marker={"color": SERIES[number % len(SERIES)], "line": {"width": 0}},
            customdata=[f"{int(low):,} to {int(low + width) - 1:,} {unit}" for low in edges[:-1]],
            hovertemplate="%{customdata}: %{y:,} samples",
        )
    figure.update_layout(
        barmode="stack",
        bargap=0,
        xaxis={"title": {"text": f"{unit} of a sample"}, "showgrid": False, "rangemode": "tozero", "tickformat": ","},
        yaxis={"title": {"text": "samples"}, "tickformat": ",", **({"dtick": 1} if most <= _FEW else {})},
        margin={"l": 8, "r": 12, "t": 34, "b": 44},
        hovermode="x unified",
        legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "traceorder": "normal"},
        font={"color": MUTED},
    )
    return figure


def bin_edges(longest: int, num_bars: int = _NUM_BARS) -> NDArray[np.float64]:
    """Edges of about so many bars of a round width, from 0 to beyond the longest."""
    wanted = max(longest, 1) / num_bars
    magnitude = 10.0 ** np.floor(np.log10(wanted))
    width = max(1.0, next(step for step in (1, 2, 2.5, 5, 10) if step * magnitude >= wanted) * magnitude)
    width = float(np.ceil(width))
    return np.arange(0, longest + 2 * width, width)
