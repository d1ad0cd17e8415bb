"""A preview shows every family's samples, whatever its processor makes of a picture."""

from __future__ import annotations

import numpy as np
import pytest

from tests.unit.families.subjects import job, subject
from vlm_dist.data.encoding.inside import SampleInside
from vlm_dist.preview.samples import media_of
from vlm_dist.preview.tokens import TokenReader


@pytest.mark.parametrize(
    ("name", "sample", "model_size", "num_tiles"),
    [
        ("llava", "wide", (28, 28), 0),
        ("pixtral", "wide", (98, 42), 0),
        ("glm4v", "wide", (84, 28), 0),
        ("llava_next", "wide", None, 3),
        ("idefics3", "wide", None, 3),
        ("internvl", "wide", None, 3),
        ("glm4v", "clip", (56, 56), 0),
        ("llava_next_video", "clip", (28, 28), 0),
        ("internvl", "clip", None, 0),
    ],
)
def test_media_and_tokens_of(name: str, sample: str, model_size: tuple[int, int] | None, num_tiles: int) -> None:
    one = subject(name)
    kind = "video" if sample == "clip" else "image"
    batch, (inside,) = one.materialiser(kinds=(kind,)).look_inside(job(sample))
    assert isinstance(inside, SampleInside)
    (medium,) = media_of(one.processor, inside)
    assert (medium.kind, medium.model_size, medium.num_tiles) == (kind, model_size, num_tiles)
    assert len(medium.shots) == (4 if kind == "video" else 1)
    own = slice(inside.start, inside.start + len(inside.answers))
    ids = batch.inputs["input_ids"][inside.row, own].tolist()
    has_loss = (batch.labels[inside.row, own] != -100).tolist()
    pieces = TokenReader(one.processor.tokenizer).pieces(
        ids, has_loss, inside.answers.tolist(), inside.is_visual.tolist()
    )
    assert sum(piece.count for piece in pieces) == len(ids)
    assert any(piece.kind == "visual" for piece in pieces)
    assert np.sum([piece.count for piece in pieces if piece.has_loss]) == sum(has_loss) > 0
    said = "".join(piece.text for piece in pieces if piece.has_loss)
    assert ("grey" if kind == "video" else "noise") in said
