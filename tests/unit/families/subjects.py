"""A tiny checkpoint of each family, loaded by the product's own path, and the rows it is tried on."""

from __future__ import annotations

import functools
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from tests.unit.data.samples import MemorySource, collator, jpeg, mp4
from tests.unit.families.zoo import CHECKPOINTS
from tests.unit.families.zoo.originals import ORIGINALS, OriginalCheckpoint
from vlm_dist.data.materialise import Materialiser
from vlm_dist.data.types import IGNORE_INDEX, MicroBatch, MicroBatchJob, SampleRef
from vlm_dist.families import Family, family_for
from vlm_dist.model import load_model, load_processor, prepare_checkpoint
from vlm_dist.model.positions import load_rope_index

ANSWERS_ALONE = {"mask_input_tokens": True}

_WIDE, _TALL, _SMALL = jpeg(90, 40, seed=1), jpeg(30, 80, seed=2), jpeg(36, 36, seed=3)
_SHORT_CLIP, _LONG_CLIP = mp4(num_frames=4), mp4(num_frames=8, width=64, height=96)


def _turns(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


#: Name -> the columns of a sample.
ROWS: dict[str, Any] = {
    "wide": {"image": _WIDE, "question": "What is it?", "answer": "noise"},
    "tall": {"image": _TALL, "question": "And what may this be?", "answer": "tall noise"},
    "text": {"image": None, "question": "Is this a longer question without a picture?", "answer": "nothing"},
    "text2": {"image": None, "question": "Short?", "answer": "yes"},
    "three": {"image": [_TALL, _WIDE, _SMALL], "question": "How many?", "answer": "three"},
    "long": {"image": _WIDE, "question": "Why? " * 10, "answer": "because " * 60},
    "told": {"image": _WIDE, "context": "A test.", "question": "What is tested?", "answer": "messages"},
    "told more": {"image": _TALL, "context": "Another one.", "question": "What else?", "answer": "their order"},
    "damaged": None,
    "clip": {"video": _SHORT_CLIP, "question": "What moves?", "answer": "grey"},
    "clip2": {"video": _LONG_CLIP, "question": "What else moves, and where?", "answer": "more grey"},
    "clip and picture": {"video": _SHORT_CLIP, "image": _WIDE, "question": "Both?", "answer": "both"},
}
#: Conversations, in a column of their own.
TALKS: dict[str, Any] = {
    "turns": {"image": _WIDE, "messages": _turns("<image>What is it?", "noise", "Of what colour?", "all colours")},
    "two shown": {
        "image": [_WIDE, _TALL],
        "messages": _turns("<image>This?", "noise", "<image>And this?", "other noise"),
    },
}


@dataclass(frozen=True)
class Subject:
    """One family under test."""

    name: str
    model: Any
    processor: Any
    family: Family
    directory: Path

    def materialiser(self, *, talks: bool = False, **options: Any) -> Materialiser:
        """Make one over `ROWS` (or `TALKS`).

        Args:
            talks: conversations.
            **options: of `Materialiser`; `kinds` (what is read, "image" by default), `numbers_tokens` (as in a run;
                packs need it) and sections of the collator config besides.
        """
        kinds = frozenset(options.pop("kinds", ("image",)))
        towers = frozenset(options.pop("towers", kinds))
        packing = options.pop("packing", False)
        numbers_tokens = options.pop("numbers_tokens", packing)
        for_generation = options.pop("for_generation", False)
        sections: dict[str, Any] = {"label_masking": ANSWERS_ALONE, **options}
        sections["data_processing"] = {f"{kind}_data": kind in kinds for kind in ("image", "video")}
        sections["video_processing"] = {"frame_extraction": {"num_frames": 4}}
        columns = {"image_column": "image", "video_column": "video"}
        if talks:
            columns |= {"messages_column": "messages"}
            source = MemorySource(list(TALKS.values()), names=("image", "video", "messages"))
        else:
            columns |= {"question_column": "question", "answer_column": "answer", "context_column": "context"}
            names = ("image", "video", "question", "answer", "context")
            source = MemorySource(list(ROWS.values()), names=names)
        sections["dataset_columns"] = columns
        rope = load_rope_index(str(self.directory)) if numbers_tokens and self.family.packing == "mrope" else None
        return Materialiser(
            [source],
            self.processor,
            self.family,
            collator(**sections),
            towers,
            0,
            for_generation=for_generation,
            rope_positions=rope,
        )

    def load_model(self) -> Any:
        """The model once more, for what changes it."""
        return _load_model(self.name, self.directory)

    def prepare(self) -> None:
        """Convert it where that is needed, in the cache of now; ranks that share a model must not begin with that."""
        prepare_checkpoint(str(self.directory), (CHECKPOINTS | ORIGINALS)[self.name].entry)

    def forward(self, batch: MicroBatch) -> Tensor:
        """Logits [B, T, V]."""
        logits: Tensor = self.model(**inputs_of(batch), use_cache=False).logits
        return logits

    def decode(self, ids: Tensor) -> str:
        """Text of tokens; images of some families have ids below 0."""
        text: str = self.processor.tokenizer.decode(ids[ids >= 0])
        return text

    def answers(self, batch: MicroBatch) -> list[str]:
        """The labels of each sample, decoded."""
        tokenizer = self.processor.tokenizer
        return [tokenizer.decode(row[row != IGNORE_INDEX]) for row in batch.labels[: max(1, batch.num_samples)]]


def inputs_of(batch: MicroBatch) -> dict[str, Tensor]:
    return {
        key: value.clone() if isinstance(value, Tensor) else value  # some models change what they are given
        for key, value in batch.inputs.items()
    }


def job(*names: str) -> MicroBatchJob:
    """A micro-batch of rows by name."""
    order = list(ROWS) if names and names[0] in ROWS else list(TALKS)
    return MicroBatchJob(0, 0, tuple(SampleRef(0, order.index(name)) for name in names))


def _load_model(name: str, directory: Path) -> Any:
    params = ORIGINALS[name].params if name in ORIGINALS else {}
    entry = (CHECKPOINTS | ORIGINALS)[name].entry
    return load_model(str(directory), entry, {"torch_dtype": "float32", **params})


@functools.cache
def subject(name: str) -> Subject:
    """Save and load one; kept for the life of the process."""
    checkpoint = (CHECKPOINTS | ORIGINALS)[name]
    directory = checkpoint.save(Path(tempfile.mkdtemp(prefix="vlm-dist-zoo-")) / name)
    model = _load_model(name, directory)
    if isinstance(checkpoint, OriginalCheckpoint):
        params = {**checkpoint.params, **checkpoint.processor_params}
        processor = load_processor(str(directory), checkpoint.entry, params)
        family = family_for(checkpoint.model_type, checkpoint.processor_class)
    else:
        processor = load_processor(str(directory), checkpoint.entry)
        family = family_for(model.config.model_type, checkpoint.processor_class)
    return Subject(name, model.eval(), processor, family, directory)
