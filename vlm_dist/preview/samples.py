"""Samples as they are in the micro-batches of training: media, tokens, labels, and where they come from."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vlm_dist.data.encoding.inside import SampleInside
from vlm_dist.data.index.facts import probe_image, probe_video
from vlm_dist.data.media.images import image_size
from vlm_dist.data.purposes import ByPurpose
from vlm_dist.data.types import MicroBatch, MicroBatchJob, NullSlot, SampleOrigin
from vlm_dist.data.workers.pool import WorkerPool
from vlm_dist.errors import printable
from vlm_dist.preview.choosing import Chosen
from vlm_dist.preview.opening import OpenRun
from vlm_dist.preview.pixels import evenly, pictures_of_tensors, thumbnail
from vlm_dist.preview.tokens import Piece, TokenReader

Size = tuple[int, int]  # width, height in pixels

#: Longest sides of thumbnails, in pixels.
IMAGE_SIDE = 448
FRAME_SIDE = 224
TILE_SIDE = 160
MAX_FRAMES = 16
MAX_TILES = 12
#: Micro-batches that are asked for before the first of them is looked at: each may have hundreds of megabytes.
_AHEAD = 2


@dataclass(frozen=True)
class Shot:
    """A picture to look at.

    Attributes:
        data: JPEG or PNG.
        size: of the picture that it was made from.
        seconds: place in the video; None: it is an image.
    """

    data: bytes
    size: Size
    seconds: float | None = None

    @property
    def mime(self) -> str:
        """Of `data`."""
        return "image/png" if self.data.startswith(b"\x89PNG") else "image/jpeg"


@dataclass(frozen=True)
class Medium:
    """One image or video of a sample.

    Attributes:
        kind: "image" or "video".
        number: in the sample, of its kind, from 1.
        name: of its file, where it has one.
        file_size: of the picture in the file, upright; None: its header does not tell.
        given_size: that the processor got.
        model_size: that the vision tower gets; None: the processor's layout is not known.
        num_bytes: of the file.
        shots: the picture, or frames of the video; what the tower gets where that is known.
        num_frames: that the processor got; 0 for an image.
        file_frames: of the video in the file; None where unknown.
        seconds: length of the video in the file; None where unknown.
        tiles: pieces that the processor cut it into.
        num_tiles: of them all.
    """

    kind: str
    number: int
    name: str
    file_size: Size | None
    given_size: Size
    model_size: Size | None
    num_bytes: int
    shots: Sequence[Shot]
    num_frames: int = 0
    file_frames: int | None = None
    seconds: float | None = None
    tiles: Sequence[Shot] = ()
    num_tiles: int = 0


@dataclass(frozen=True)
class SampleView:
    """One sample, or the slot that it left empty.

    Attributes:
        number: on the page, from 1.
        origin: where it comes from.
        place: where the plan has it.
        is_planned: False: it is shown apart from any planned step.
        error: why the slot is empty; None: it is not.
        error_class: of `NULL_CLASSES`.
        media: its images and videos.
        pieces: its tokens.
        num_tokens: of the sample.
        num_visual: of them, in the place of media.
        num_answer: of them, the assistant's.
        num_targets: of them, with loss.
        num_prompt_targets: of them, with loss though they are not the assistant's.
        max_length: that it has to fit.
        row_tokens: tokens that its row of the micro-batch has, with padding; of a pack all.
        notes: what was done to it.
        is_packed: that row is a pack.
        pads_have_loss: the padding of that row carries loss.
        tensors: names and shapes of what the vision tower gets.
    """

    number: int
    origin: SampleOrigin
    place: str
    is_planned: bool
    error: str | None = None
    error_class: str = ""
    media: Sequence[Medium] = ()
    pieces: Sequence[Piece] = ()
    num_tokens: int = 0
    num_visual: int = 0
    num_answer: int = 0
    num_targets: int = 0
    num_prompt_targets: int = 0
    max_length: int = 1
    row_tokens: int = 0
    is_packed: bool = False
    pads_have_loss: bool = False
    notes: Sequence[str] = ()
    tensors: Sequence[tuple[str, str]] = ()


@dataclass
class Samples:
    """All that are shown.

    Attributes:
        views: in the order of the plan.
        num_targets: tokens with loss, of all.
        num_prompt_targets: of them, those that are not the assistant's.
        num_batches: micro-batches that they come from.
    """

    views: list[SampleView] = field(default_factory=list)
    num_batches: int = 0

    @property
    def num_targets(self) -> int:
        """Tokens with loss, of all."""
        return sum(view.num_targets for view in self.views)

    @property
    def prompt_share(self) -> float:
        """Share of the loss that is on tokens which the assistant does not say."""
        return sum(view.num_prompt_targets for view in self.views) / max(self.num_targets, 1)


def view_samples(run: OpenRun, chosen: Sequence[Chosen], num_workers: int = 1) -> Samples:
    """Materialise the micro-batches of the chosen samples, and tell what these are like.

    A worker of the trainer makes them first: what crashes or hangs its decoder costs its slot there, and is not touched
    here. Then they are made once more in this process, which sees what the samples are on their way.

    Args:
        run: that has them.
        chosen: samples.
        num_workers: 0: nothing is made elsewhere, so that a decoder may end this process.

    Raises:
        DataError: the storage fails.
    """
    reader = TokenReader(run.tokenizer)
    found = Samples()
    for batch, slots in _batches(run, chosen, num_workers):
        job = batch.job
        again, insides = run.materialise[job.purpose].look_inside(job)
        assert torch.equal(batch.inputs["input_ids"], again.inputs["input_ids"])
        assert torch.equal(batch.labels, again.labels)
        found.num_batches += 1
        for one in slots:
            inside = insides[one.slot]
            number = len(found.views) + 1
            place = f"step {job.step}, micro-batch {job.micro_batch}, slot {one.slot}"
            if not one.is_planned:
                place = "alone: no step that was looked at has a sample of this source"
            if isinstance(inside, NullSlot):
                origin = inside.origin or SampleOrigin("", "", "")
                message = printable(inside.message)
                view = SampleView(number, origin, place, one.is_planned, message, inside.null_class)
            else:
                view = _view(run, reader, batch, inside, number, place, one.is_planned)
            found.views.append(view)
    return found


def _batches(run: OpenRun, chosen: Sequence[Chosen], num_workers: int) -> Iterator[tuple[MicroBatch, list[Chosen]]]:
    """The micro-batches as the trainer's workers make them, with what is wanted of each."""
    wanted = list(_by_job(chosen))
    seconds = run.config.data.sample_timeout_seconds
    with WorkerPool(ByPurpose(run.materialise), num_workers, sample_timeout_seconds=seconds) as pool:
        pending = deque(pool.submit(job) for job, _ in wanted[:_AHEAD])
        for number, (_, slots) in enumerate(wanted):
            yield pending.popleft().result(), slots
            pending.extend(pool.submit(job) for job, _ in wanted[number + _AHEAD : number + _AHEAD + 1])


def _by_job(chosen: Sequence[Chosen]) -> Iterator[tuple[MicroBatchJob, list[Chosen]]]:
    jobs: dict[int, tuple[MicroBatchJob, list[Chosen]]] = {}
    for one in chosen:
        jobs.setdefault(id(one.job), (one.job, []))[1].append(one)
    yield from jobs.values()


def _view(
    run: OpenRun, reader: TokenReader, batch: MicroBatch, inside: SampleInside, number: int, place: str, planned: bool
) -> SampleView:
    own = slice(inside.start, inside.start + len(inside.answers))
    ids = batch.inputs["input_ids"][inside.row, own]
    row_has_loss = batch.labels[inside.row] != run.config.collator.label_masking.ignore_index
    has_loss, is_packed = row_has_loss[own], batch.job.pack is not None
    columns = [ids.tolist(), has_loss.tolist(), inside.answers.tolist(), inside.is_visual.tolist()]
    settings = run.config.collator.text_processing
    return SampleView(
        number=number,
        origin=inside.origin,
        place=place,
        is_planned=planned,
        media=media_of(run.processor, inside),
        pieces=reader.pieces(*columns),
        num_tokens=len(ids),
        num_visual=int(inside.is_visual.sum()),
        num_answer=int(inside.answers.sum()),
        num_targets=int(has_loss.sum()),
        num_prompt_targets=int((has_loss & ~inside.answers).sum()),
        max_length=settings.max_length,
        row_tokens=batch.labels.shape[1],
        is_packed=is_packed,
        pads_have_loss=not is_packed and bool(row_has_loss.sum() > has_loss.sum()),
        notes=list(_notes(inside, has_loss, settings.max_length)),
        tensors=[(name, _shape(tensor)) for name, tensor in inside.visual.items()],
    )


def _notes(inside: SampleInside, has_loss: Tensor, max_length: int) -> Iterator[str]:
    if inside.was_reduced:
        yield f"its media were made smaller, so that the text fits beside them into max_length {max_length:,}"
    if inside.was_cut:
        yield f"its text was cut at max_length {max_length:,}"
    if not bool(has_loss.any()):
        yield "no token carries loss: nothing is learned from it"
    if len(inside.text) == 0:
        yield "its text is empty"


def _shape(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} [{', '.join(map(str, tensor.shape))}]"


def media_of(processor: Any, inside: SampleInside) -> list[Medium]:
    """What a sample shows: as the vision tower gets it where the layout of its tensors is known."""
    media: list[Medium] = []
    seen = pictures_of_tensors(inside.visual, processor, "image")
    one_each = len(seen) == len(inside.images) and all(len(tiles) == 1 for tiles in seen)
    for index, (data, picture) in enumerate(zip(inside.image_files, inside.images, strict=True)):
        tiles = [] if one_each else [tile for tiles in seen for tile in tiles]
        shown: Any = seen[index][0] if one_each else picture
        size = image_size(picture)
        model_size = _size_of(shown) if one_each else None
        media.append(
            Medium(
                kind="image",
                number=index + 1,
                name=_name(data),
                file_size=probe_image(bytes(data)),
                given_size=size,
                model_size=model_size,
                num_bytes=len(data),
                shots=[Shot(thumbnail(shown, IMAGE_SIDE), model_size or size)],
                # of several pictures nobody knows whose tile is whose
                tiles=[_tile(tile) for tile in tiles[:MAX_TILES]] if index == len(inside.images) - 1 else (),
                num_tiles=len(tiles) if index == len(inside.images) - 1 else 0,
            )
        )
    clips = pictures_of_tensors(inside.visual, processor, "video")
    for index, (data, clip) in enumerate(zip(inside.video_files, inside.clips, strict=True)):
        frames = clips[index] if len(clips) == len(inside.clips) and len(clips[index]) >= len(clip.indices) else None
        shots = []
        for place in evenly(len(clip.indices), MAX_FRAMES):
            frame: NDArray[np.uint8] = clip.frames[place] if frames is None else frames[place]
            shots.append(Shot(thumbnail(frame, FRAME_SIDE), _size_of(frame), clip.indices[place] / clip.fps))
        facts = probe_video(bytes(data))
        media.append(
            Medium(
                kind="video",
                number=index + 1,
                name=_name(data),
                file_size=None if facts is None else (facts[2], facts[3]),
                given_size=(clip.frames.shape[2], clip.frames.shape[1]),
                model_size=None if frames is None else _size_of(frames[0]),
                num_bytes=len(data),
                shots=shots,
                num_frames=len(clip.indices),
                file_frames=None if facts is None else facts[0],
                seconds=None if facts is None else facts[1],
            )
        )
    return media


def _size_of(pixels: NDArray[np.uint8]) -> Size:
    return pixels.shape[1], pixels.shape[0]


def _tile(pixels: NDArray[np.uint8]) -> Shot:
    return Shot(thumbnail(pixels, TILE_SIDE), _size_of(pixels))


def _name(data: bytes) -> str:
    return str(getattr(data, "path", ""))
