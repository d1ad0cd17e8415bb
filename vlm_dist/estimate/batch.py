"""The counts of a micro-batch: rows, tokens, patches."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from vlm_dist.model.flops import TextTokens
from vlm_dist.model.visual_tokens import VisualLayout, VisualTokens


@dataclass(frozen=True)
class BatchShape:
    """A micro-batch, by its counts.

    Attributes:
        rows: of tokens; 1 of a pack.
        num_samples: in it.
        text: tokens of the language model.
        visual: of the vision tower.
        num_labelled: positions with a label.
        is_packed: samples share a row.
        is_padded: rows have different lengths.
    """

    rows: float
    num_samples: float
    text: TextTokens
    visual: VisualTokens
    num_labelled: int
    is_packed: bool = False
    is_padded: bool = False

    @property
    def has_mask(self) -> bool:
        """Whether attention is told by a mask what not to see."""
        return self.is_packed or self.is_padded

    def times(self, factor: float) -> BatchShape:
        """A micro-batch of so many times as many samples of the same kind."""
        text = self.text
        segments = text.segments * max(1, int(factor))
        squares = text.computed_squares * (factor**2 if self.is_packed else factor)
        grown = TextTokens(int(text.real * factor), int(text.computed * factor), segments, squares, text.is_packed)
        visual = VisualTokens(
            {name: count * factor for name, count in self.visual.streams.items()},
            {name: count * factor for name, count in self.visual.squares.items()},
            None if self.visual.dense_squares is None else self.visual.dense_squares * factor**2,
        )
        rows = 1.0 if self.is_packed else self.rows * factor
        return replace(
            self, rows=rows, num_samples=self.num_samples * factor, text=grown, visual=visual,
            num_labelled=int(self.num_labelled * factor), is_padded=self.is_padded or rows > 1,
        )  # fmt: skip


def visual_of(patches: float, num_samples: float, layout: VisualLayout) -> VisualTokens:
    """Patches of a micro-batch of which only their number is known, as one picture of each sample.

    Args:
        patches: in all.
        num_samples: that share them.
        layout: of the model.
    """
    if patches <= 0:
        return VisualTokens()
    if layout.is_fixed:
        return layout.of_pictures(patches / patches_of_one(layout))
    samples = max(1, round(num_samples))
    side = max(layout.merge, round(math.sqrt(patches / samples) / layout.merge) * layout.merge)
    made = layout.of_grids([(1, side, side)] * samples)
    exact = patches / max(1.0, made.streams["patches"])
    return VisualTokens(
        {name: count * exact for name, count in made.streams.items()},
        {name: count * exact for name, count in made.squares.items()},
        patches**2 if layout.is_one_row else None,
    )


def patches_of_one(layout: VisualLayout) -> float:
    """Patches of a picture of the fixed size."""
    return float(max(1, (layout.crop_side // layout.patch[0]) * (layout.crop_side // layout.patch[1])))
