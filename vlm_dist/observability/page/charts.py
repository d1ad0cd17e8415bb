"""Plotly figures in a page: as data, drawn by the page's script in the reader's theme."""

from __future__ import annotations

import html
from functools import cache
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from vlm_dist.observability.page.palette import SERIES

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


def chart_text(text: str) -> str:
    """Text from data for a figure's names and labels, in which plotly would read tags."""
    return html.escape(text, quote=False)


class Charts:
    """Turns figures into HTML, and knows whether the page needs plotly's script at all."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, figure: Figure, label: str, caption: str = "", height: int = 300) -> Markup:
        """A figure's place in the page, and its data.

        Args:
            figure: is not changed.
            label: what it shows, for those who do not see it.
            caption: printed under it.
            height: in CSS pixels.
        """
        self.count += 1
        return Markup(
            '<figure class="chart">'
            '<div class="plot" id="chart-{0}" role="img" aria-label="{1}" style="height:{2}px"></div>'
            '<script type="application/json" data-for="chart-{0}">{3}</script>{4}</figure>'
        ).format(
            self.count,
            label,
            int(height),
            Markup(_as_json(figure)),  # noqa: S704 - JSON without `<`
            Markup("<figcaption>{}</figcaption>").format(caption) if caption else "",
        )


def _as_json(figure: Figure) -> str:
    import plotly.graph_objects as go

    drawn = go.Figure(figure)
    own: dict[str, Any] = drawn.layout.to_plotly_json()
    drawn.update_layout(template=go.layout.Template())
    if "margin" not in own:
        drawn.update_layout(margin={"l": 56, "r": 16, "t": 40 if own.get("title") else 12, "b": 44})
    if "colorway" not in own:
        drawn.update_layout(colorway=list(SERIES))
    if "legend" not in own:
        drawn.update_layout(legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"})
    text = str(drawn.to_json())
    # inside a script element only `<` could end it or begin a comment
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


@cache
def plotly_script() -> str:
    """Plotly's own script, about 5 MB."""
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs())
