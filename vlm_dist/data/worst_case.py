"""The largest micro-batch that a run may meet: made of nothing, by the model's own processor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from vlm_dist.data.made_samples import MadeSample
from vlm_dist.data.materialise import Materialiser
from vlm_dist.data.media.images import Picture, as_pil, resize_image
from vlm_dist.data.media.video import Clip, blank_clip, repeat_last_frame
from vlm_dist.data.types import MicroBatch, MicroBatchJob, PackBudget, RawSample, SampleOrigin, SampleRef
from vlm_dist.errors import ModelError

#: Sides of a picture and of a frame before processor and max_length make them smaller; larger is beyond both.
_PICTURE_SIDE, _FRAME_SIDE = 3584, 1024
_WORD = " a"
_PROBE = 64


class _Rows:
    """A source of rows that are set as they are needed."""

    name = "memory check"
    manifest_hash = ""

    def __init__(self, columns: Sequence[str]) -> None:
        self.columns = tuple(columns)
        self.rows: list[dict[str, Any]] = []

    def __len__(self) -> int:
        return len(self.rows)

    def origin(self, index: int) -> SampleOrigin:
        return SampleOrigin(self.name, "synthetic", str(index))

    def read(self, index: int) -> RawSample:
        return RawSample(self.rows[index], self.origin(index))


class WorstCase(Materialiser):
    """Makes micro-batches as large as the caps allow. See `Materialiser` for the arguments but the sources.

    A row has one picture (or one clip, where that has more patches), as large as processor, max_size and max_length
    let it be; the rest up to max_length is answer. A pack is filled with pictures first, up to either budget.

    Args:
        columns: of the data.
        *args: of a `Materialiser`, behind its sources.
        **kwargs: of a `Materialiser`.
    """

    def __init__(self, columns: Sequence[str], *args: Any, **kwargs: Any) -> None:
        self._rows = _Rows(columns)
        self._made: dict[int, MadeSample] = {}
        super().__init__([self._rows], *args, **kwargs)  # type: ignore[list-item]

    def rows(self, count: int) -> MicroBatch:
        """A padded micro-batch of so many rows.

        Raises:
            ModelError: the processor cannot make it.
        """
        self._start()
        longest = self._config.text_processing.max_length
        picture = self._largest()
        index = picture if picture is not None else self._add(None, 0)
        room = longest - self._tokens(index)
        if room > 0:
            index = self._add(self._rows.rows[index], room)
        return self._checked(MicroBatchJob(0, 0, (SampleRef(0, index),) * count))

    def pack(self, budget: PackBudget) -> MicroBatch:
        """A pack up to its budget.

        Raises:
            ModelError: the processor cannot make it.
        """
        self._start()
        longest = self._config.text_processing.max_length
        room = int(budget.max_tokens * (1 + budget.headroom))
        refs = []
        picture = self._largest()
        if picture is not None:
            sample = self._make(picture)
            count = room // sample.example.labels.shape[0]
            if budget.max_patches is not None and sample.num_patches:
                count = min(count, int(budget.max_patches * (1 + budget.headroom)) // sample.num_patches)
            refs += [SampleRef(0, picture)] * max(1, count)
            room -= len(refs) * sample.example.labels.shape[0]
        shortest = self._tokens(self._add(None, 0))
        while room >= shortest:
            text = self._add(None, min(room, longest) - shortest)
            length = self._tokens(text)
            if length > room:
                break
            refs += [SampleRef(0, text)] * (room // length)
            room %= length
        return self._checked(MicroBatchJob(0, 0, tuple(refs), pack=budget))

    def _start(self) -> None:
        self._rows.rows, self._made = [], {}

    def _checked(self, job: MicroBatchJob) -> MicroBatch:
        batch = self(job)
        if not batch.num_samples:
            raise ModelError(
                "memory check: the processor cannot make the largest sample: "
                + "; ".join(dict.fromkeys(slot.message for slot in batch.null_slots))
            )
        return batch

    def _largest(self) -> int | None:
        """The row with the picture or clip of most patches, with no answer; None where the run shows none."""
        candidates = [self._add({self._builder.media_columns[kind]: b"-"}, 0) for kind in self._kinds]
        made = [(self._make(index).num_patches, index) for index in candidates]
        return max(made)[1] if made else None

    @property
    def _kinds(self) -> list[str]:
        return [kind for kind in self._builder.media_columns if kind in self._towers]

    def _add(self, media: dict[str, Any] | None, num_tokens: int) -> int:
        """A row with an answer of about so many tokens, rather fewer; its index."""
        shown = {name: (media or {}).get(name) for name in self._builder.media_columns.values()}
        words = 0
        if num_tokens > 0:
            empty, probed = (self.measure_text(self._fields({}, count)) for count in (0, _PROBE))
            words = int(num_tokens * _PROBE / max(1, probed - empty))
        self._rows.rows.append(self._fields(shown, words))
        return len(self._rows.rows) - 1

    def _fields(self, shown: dict[str, Any], words: int) -> dict[str, Any]:
        fields = self._builder.empty_fields() | shown
        answer = _WORD * words
        columns = self._builder.text_columns
        if "messages_column" in columns:
            turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer or _WORD}]
            return fields | {columns["messages_column"]: turns}
        if columns:
            name = "answer_column" if "answer_column" in columns else next(reversed(columns))
            fields[columns[name]] = answer or _WORD
        return fields

    def _tokens(self, index: int) -> int:
        return int(self._make(index).example.labels.shape[0])

    def _make(self, index: int) -> MadeSample:
        made = self._try(MicroBatchJob(0, 0, (SampleRef(0, index),)), 0, self._materialise)
        if not isinstance(made, MadeSample):
            raise ModelError(f"memory check: the processor cannot make the largest sample: {made.message}")
        return made

    def _materialise(self, raw: RawSample, ref: SampleRef, step: int) -> MadeSample:
        if ref.index not in self._made:  # rows are many, and all alike
            self._made[ref.index] = super()._materialise(raw, ref, step)
        return self._made[ref.index]

    def _decode_image(self, media: bytes) -> Picture:
        settings = self._config.image_processing
        side = settings.max_size or _PICTURE_SIDE
        blank = torch.full((3, side, side), 127, dtype=torch.uint8)
        picture = resize_image(blank, settings.resize_mode, settings.max_size)
        return picture if settings.convert_to_rgb else as_pil(picture)

    def _decode_video(self, media: bytes) -> Clip:
        num_frames = self._config.video_processing.frame_extraction.num_frames
        return repeat_last_frame(blank_clip(num_frames, _FRAME_SIDE, _FRAME_SIDE), self._family.min_frames)
