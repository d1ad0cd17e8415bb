"""Samples that are ready, and which of them a micro-batch can take together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vlm_dist.data.encoding.collate import Example
from vlm_dist.data.encoding.inside import SampleInside
from vlm_dist.data.encoding.packing import PackRoom
from vlm_dist.data.types import NullSlot, SampleOrigin, SampleRef
from vlm_dist.errors import SkipSample


@dataclass(slots=True)
class MadeSample:
    """One sample that is ready to be collated."""

    example: Example
    origin: SampleOrigin
    ref: SampleRef
    num_patches: int = 0
    num_frames: int | None = None  # of its clips
    reference: str = ""
    other_references: tuple[str, ...] = ()
    was_reduced: bool = False
    was_cut: bool = False
    inside: SampleInside | None = None  # for whoever looks; otherwise pictures are not kept until all are there


def take_room(room: PackRoom, sample: MadeSample) -> MadeSample | NullSlot:
    """Give a sample its room in the pack; None is left for a sample that is longer than planned."""
    try:
        room.take(sample.example.labels.shape[0], sample.num_patches)
    except SkipSample as skip:
        return NullSlot(sample.origin, skip.null_class, skip.message)
    return sample


def with_equal_frames(samples: Sequence[MadeSample]) -> tuple[list[MadeSample], dict[int, NullSlot]]:
    """Leave out the samples whose clips are not as long as those of the first sample that has one.

    The plan puts clips of equal numbers of frames together, by what the files' headers say; a damaged file has fewer.

    Returns:
        Those that are kept, and the slots of the others by the sample's `id`.
    """
    planned = next((sample.num_frames for sample in samples if sample.num_frames), None)
    kept: list[MadeSample] = []
    left_out: dict[int, NullSlot] = {}
    for sample in samples:
        if sample.num_frames in (None, planned):
            kept.append(sample)
            continue
        message = (
            f"its clip gives {sample.num_frames} frames, the others of its micro-batch {planned}; models of this "
            "family take clips of one length at a time"
        )
        left_out[id(sample)] = NullSlot(sample.origin, "bad_sample", message)
    return kept, left_out
