"""Rows that are no samples: they keep a tower or the language model at work where a micro-batch has nothing for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from PIL import Image

from vlm_dist.data.encoding.collate import Example
from vlm_dist.data.encoding.encode import Encoded, Encoder
from vlm_dist.data.encoding.labels import RenderedText, markers_alone
from vlm_dist.data.media.video import blank_clip
from vlm_dist.data.types import IGNORE_INDEX
from vlm_dist.errors import ModelError, SkipSample
from vlm_dist.families import Family

_SMALLEST_TEXT = "."


class DummyRows:
    """The smallest text, and the smallest image and clip with their placeholders; made once.

    Args:
        encoder: calls the processor.
        family: says how small they may be.
        markers: kind -> what a text has in the place of one image or video.
        towers: kinds that every micro-batch must have.

    Raises:
        ModelError: the processor fails on them, so it would fail on every sample.
    """

    def __init__(self, encoder: Encoder, family: Family, markers: Mapping[str, str], towers: Sequence[str]) -> None:
        resize = None if family.dummy_resize else False
        num_frames = max(family.min_frames, family.frame_step)
        try:
            self._text = _as_dummy(encoder.encode(RenderedText(_SMALLEST_TEXT)), frozenset())
            self._rows = {}
            for kind in towers:
                rendered = markers_alone(markers[kind])
                side = encoder.dummy_side(kind)
                if kind == "image":
                    encoded = encoder.encode(rendered, images=[Image.new("RGB", (side, side))], do_resize=resize)
                else:
                    encoded = encoder.encode(rendered, clips=[blank_clip(num_frames, side, side)], do_resize=resize)
                self._rows[kind] = _as_dummy(encoded, frozenset([kind]))
        except SkipSample as skip:
            shown = ", ".join(f"{markers[kind]!r} for one {kind}" for kind in towers)
            raise ModelError(
                f"{type(encoder.processor).__name__} cannot make the smallest sample of all: {skip.message}. The text "
                f"has {shown}: model_classes.<model>.family.image_marker and video_marker say otherwise"
            ) from skip

    def missing(self, examples: Sequence[Example]) -> list[Example]:
        """Choose the rows that a micro-batch lacks: one per kind, and a text where there is no row at all."""
        present = frozenset(kind for example in examples for kind in example.kinds)
        rows = [] if examples else [self._text]
        return rows + [row for kind, row in self._rows.items() if kind not in present]


def _as_dummy(encoded: Encoded, kinds: frozenset[str]) -> Example:
    labels = torch.full_like(encoded.tokens["input_ids"], IGNORE_INDEX)
    return Example(encoded.tokens, encoded.visual, labels, kinds, is_dummy=True)
