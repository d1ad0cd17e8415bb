"""Lengths of samples: estimates from facts, counting without decoding, and fingerprints of what is counted."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.unit.data.samples import MemorySource, collator, jpeg, mp4
from tests.unit.families.zoo import CHECKPOINTS
from vlm_dist.data.index.facts import FACTS_DTYPE, SampleFacts, text_bytes
from vlm_dist.data.lengths.calibration import NUM_SHARDS, ROWS_PER_SHARD, TextCalibration, calibrate, calibration_rows
from vlm_dist.data.lengths.estimate import BatchKeys
from vlm_dist.data.lengths.fingerprint import fingerprint
from vlm_dist.data.lengths.processor_lengths import ProcessorLengths
from vlm_dist.data.materialise import Materialiser
from vlm_dist.data.types import MicroBatchJob, NullSlot, SampleRef
from vlm_dist.families import family_for

QWEN = family_for("qwen2_vl")
BOTH = {"data_processing": {"image_data": True, "video_data": True}}
FLAT = TextCalibration(template_tokens=10, tokens_per_byte=0.5, num_rows=1)


@dataclass
class FactSource(MemorySource):
    """Rows in memory with the facts that an index would have."""

    def facts(self, rows: np.ndarray) -> np.ndarray:
        return np.array([_facts(self.rows[row]) for row in rows], dtype=FACTS_DTYPE)


def _facts(row: Any) -> np.void:
    facts = SampleFacts()
    for key, value in (row or {}).items():
        items = value if isinstance(value, list) else [value]
        for item in items:
            if isinstance(item, bytes):
                (facts.add_video if key == "video" else facts.add_image)(io.BytesIO(item))
            else:
                facts.add_text(text_bytes(item))
    return facts.row


@dataclass
class FactTable(MemorySource):
    """Facts alone, for millions of rows."""

    table: np.ndarray = None  # type: ignore[assignment]

    def facts(self, rows: np.ndarray) -> np.ndarray:
        return self.table[rows]


def job(*rows: int) -> MicroBatchJob:
    return MicroBatchJob(0, 0, tuple(SampleRef(0, row) for row in rows))


def materialiser(processor: Any, source: Any, name: str = "qwen2_vl", **sections: Any) -> Materialiser:
    config = collator(**({**BOTH, **sections} if name == "qwen2_vl" else sections))
    return Materialiser([source], processor, family_for(name), config, frozenset(), 0)


def estimates(processor: Any, source: Any, calibration: TextCalibration = FLAT, **sections: Any) -> ProcessorLengths:
    make = materialiser(processor, source, **sections)
    config = collator(**{**BOTH, **sections})
    return ProcessorLengths([source], [calibration], make.visual_counter, QWEN, config, "f")


def table(count: int, **columns: Any) -> FactTable:
    facts = np.zeros(count, dtype=FACTS_DTYPE)
    for name, values in columns.items():
        facts[name] = values
    if "image_pixels" not in columns:
        facts["image_pixels"] = facts["num_images"] * facts["image_width"].astype(np.int64) * facts["image_height"]
    return FactTable(range(count), table=facts)


def test_visual_tokens_are_those_of_the_processor(processor: Any) -> None:
    rows: list[dict[str, Any]] = [
        {"image": jpeg(w, h), "question": "q", "answer": "a"} for w, h in ((112, 84), (60, 300), (1000, 700), (28, 28))
    ]
    rows += [{"image": [jpeg(56, 112), jpeg(56, 112)], "question": "q", "answer": "a"}]
    rows += [{"image": None, "video": mp4(n, width=96, height=64), "question": "q", "answer": "a"} for n in (4, 16)]
    source = FactSource(rows)
    costs = estimates(processor, source).costs(0, np.arange(len(rows)))
    make = materialiser(processor, source)
    lengths: list[Any] = make.measure(job(*range(len(rows))))
    assert costs.patches.tolist() == [4 * length.num_visual_tokens for length in lengths]
    text = 10 + np.ceil(source.facts(np.arange(len(rows)))["text_bytes"] * 0.5)
    assert costs.tokens.tolist() == (text + [length.num_visual_tokens for length in lengths]).astype(int).tolist()
    assert costs.batch_key.tolist() == [0] * len(rows)


def test_settings_that_change_what_the_processor_sees_change_the_estimate(processor: Any) -> None:
    def patches(source: Any, **sections: Any) -> list[int]:
        return estimates(processor, source, **sections).costs(0, np.arange(len(source))).patches.tolist()

    picture = table(1, num_images=1, image_width=560, image_height=280)
    assert patches(picture) == [40 * 20]
    assert patches(picture, image_processing={"max_size": 280}) == [20 * 10]
    assert patches(picture, image_processing={"max_size": 280, "resize_mode": "stretch"}) == [20 * 20]
    assert patches(picture, data_processing={"image_data": False, "video_data": True}) == [0]
    clip = table(1, num_videos=1, video_frames=100, video_seconds=10, video_width=280, video_height=280)
    assert patches(clip) == [4 * 20 * 20]
    assert patches(clip, video_processing={"frame_extraction": {"num_frames": 4}}) == [2 * 20 * 20]
    assert patches(clip, video_processing={"file_processing": {"max_duration": 0.2}}) == [1 * 20 * 20]


def test_what_does_not_fit_is_clipped_as_the_materialiser_would(processor: Any) -> None:
    source = table(3, num_images=1, image_width=1120, image_height=1120, text_bytes=[100, 380, 5000])
    costs = estimates(processor, source, text_processing={"max_length": 400}).costs(0, np.arange(3))
    assert costs.tokens.tolist() == [400, 400, 400]
    assert (costs.patches // 4).tolist() == [400 - 60, 400 - 200, 200]
    loose = estimates(processor, source, text_processing={"max_length": 400, "truncation": False})
    assert loose.costs(0, np.arange(3)).tokens.tolist() == [400, 400, 400]


def test_a_cost_is_the_same_whatever_it_is_asked_for_with(processor: Any) -> None:
    rng = np.random.default_rng(0)
    count = 3000
    source = table(
        count,
        num_images=rng.integers(0, 3, count),
        image_width=rng.integers(1, 4000, count),
        image_height=rng.integers(1, 4000, count),
        text_bytes=rng.integers(0, 4000, count),
    )
    whole = estimates(processor, source).costs(0, np.arange(count))
    parts = estimates(processor, source)
    for rows in (np.arange(count)[::-1], rng.integers(0, count, 500), np.array([7])):
        again = parts.costs(0, rows)
        assert (again.tokens == whole.tokens[rows]).all()
        assert (again.patches == whole.patches[rows]).all()


def test_few_sizes_stand_for_many(processor: Any) -> None:
    """Sides are rounded by less than 1%, so that a window of millions of samples costs seconds."""
    rng = np.random.default_rng(0)
    count = 200_000
    source = table(
        count, num_images=1, image_width=rng.integers(200, 1500, count), image_height=rng.integers(200, 1500, count)
    )
    lengths = estimates(processor, source, text_processing={"max_length": 100_000})
    costs = lengths.costs(0, np.arange(count))
    assert len(lengths._known) < 40_000
    chosen = rng.integers(0, count, 300)
    counter = materialiser(processor, source).visual_counter
    sizes = source.table[chosen][["image_width", "image_height"]].tolist()
    exact = np.array([counter.count("image", 1, size) for size in sizes])
    error = np.abs(costs.patches[chosen] / 4 / exact - 1)
    assert error.mean() < 0.03
    assert error.max() < 0.15


def test_a_processor_that_cannot_estimate_is_measured_on_few_blank_pictures() -> None:
    made = CHECKPOINTS["smolvlm"].build()[1]
    family = family_for("smolvlm")
    source = table(500, num_images=1, image_width=np.arange(100, 600), image_height=300)
    make = Materialiser([source], made, family, collator(), frozenset(), 0)
    counter = make.visual_counter
    assert counter.estimated == frozenset()
    lengths = ProcessorLengths([source], [FLAT], counter, family, collator(), "f")
    tokens = lengths.costs(0, np.arange(500)).patches // family.patches_per_token
    exact = np.array([counter.count("image", 1, (width, 300)) for width in range(100, 600)])
    assert np.median(np.abs(tokens / exact - 1)) < 0.1
    assert len(lengths._known) < 20


def test_a_processor_whose_pictures_all_cost_the_same_needs_no_blank_ones() -> None:
    made = CHECKPOINTS["gemma3"].build()[1]  # tells nothing about sizes
    source = table(500, num_images=1, image_width=np.arange(100, 600), image_height=300)
    make = Materialiser([source], made, family_for("gemma3"), collator(), frozenset(), 0)
    assert make.visual_counter.estimated == {"image"}
    lengths = ProcessorLengths([source], [FLAT], make.visual_counter, family_for("gemma3"), collator(), "f")
    (patches,) = set(lengths.costs(0, np.arange(500)).patches.tolist())
    assert patches == 16 * (4 + 2 + 4)  # features, the two tokens round them, and two pairs of line breaks


def test_clips_of_different_numbers_of_frames_get_different_batch_keys() -> None:
    family = replace(family_for("llava"), equal_frames=True)
    source = table(4, num_videos=[0, 1, 1, 1], video_frames=[0, 100, 5, 8], video_seconds=[0, 10, 1, 1])
    keys = BatchKeys(family, collator().video_processing)
    assert keys(source.table).tolist() == [0, 8, 5, 8]
    assert not keys.mixes_all
    assert BatchKeys(family_for("llava"), collator().video_processing)(source.table).tolist() == [0] * 4


@pytest.mark.parametrize("max_length", [2048, 300, 60])
@pytest.mark.parametrize("truncation", [True, False])
def test_counting_without_decoding_is_what_the_materialiser_makes(
    processor: Any, max_length: int, truncation: bool
) -> None:
    """The fast way must never be another way."""
    words = ["seven", "one two three four " * 20, "нечто, 何か " * 12]
    rows: list[Any] = [
        {"image": jpeg(*size), "question": "what?", "answer": answer}
        for size in ((560, 560), (61, 340), (33, 20))
        for answer in words
    ]
    rows += [{"image": [jpeg(56, 112), jpeg(300, 50), jpeg(90, 90, exif=_turned())], "question": "q", "answer": "a"}]
    rows += [{"image": None, "question": "text alone", "answer": word} for word in words]
    rows += [{"video": mp4(n, width=160, height=96), "question": "q", "answer": "a"} for n in (3, 9, 32)]
    rows += [
        {"image": jpeg(2100, 4), "question": "q", "answer": "a"},
        None,
        {"image": b"?", "question": "", "answer": ""},
    ]
    for masking in ({"mask_input_tokens": True}, {}):
        make = materialiser(
            processor,
            MemorySource(rows),
            text_processing={"max_length": max_length, "truncation": truncation},
            label_masking=masking,
        )
        for row in range(len(rows)):
            assert _measured(make, row) == _made(make, row), row


def test_headers_and_text_are_enough(processor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        {"image": jpeg(600, 400), "question": "q", "answer": "a"},
        {"image": [jpeg(90, 60), jpeg(60, 30)], "video": mp4(32), "question": "q", "answer": "a"},
    ]
    make = materialiser(processor, MemorySource(rows), text_processing={"max_length": 200})

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("nothing needs to be decoded")

    monkeypatch.setattr("vlm_dist.data.media.configured.decode_image", fail)
    monkeypatch.setattr("vlm_dist.data.media.configured.decode_video", fail)
    lengths: list[Any] = make.measure(job(0, 1))
    assert all(length.num_tokens <= 200 for length in lengths)


@pytest.mark.parametrize("name", sorted(set(CHECKPOINTS) - {"qwen2_vl", "mllama"}))
def test_counting_equals_making_in_other_families(name: str) -> None:
    checkpoint = CHECKPOINTS[name]
    processor, family = checkpoint.build()[1], family_for(name, checkpoint.processor_class)
    rows = [
        {"image": jpeg(60, 40), "question": "What is it?", "answer": "noise"},
        {"image": None, "question": "And what is this?", "answer": "nothing"},
        {"image": [jpeg(30, 90), jpeg(20, 20)], "question": "Two?", "answer": "yes " * 40},
    ]
    for max_length in (2048, 110, 60):
        config = collator(text_processing={"max_length": max_length})
        make = Materialiser([MemorySource(rows)], processor, family, config, frozenset(), 0)
        for row in range(len(rows)):
            measured, made = _measured(make, row), _made(make, row)
            if not isinstance(made, str):  # what is written round features has no ids of its own
                measured, made = (measured[0], *measured[2:]), (made[0], *made[2:])
            assert measured == made, (max_length, row)


def _measured(make: Materialiser, row: int) -> Any:
    (length,) = make.measure(job(row))
    if isinstance(length, NullSlot):
        return length.null_class
    return length.num_tokens, length.num_visual_tokens, length.was_reduced, length.was_cut


def _made(make: Materialiser, row: int) -> Any:
    batch = make(job(row))
    if batch.null_slots:
        return batch.null_slots[0].null_class
    ids = batch.inputs["input_ids"]
    visual = int(sum((ids == token).sum() for token in make._encoder._visual_ids))
    return batch.num_tokens, visual, bool(batch.num_reduced), bool(batch.num_cut)


def _turned() -> Any:
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def test_calibration_reads_few_rows_of_few_shards_and_takes_a_quantile(processor: Any) -> None:
    rows = [{"image": None, "question": "what is it", "answer": "word " * (i % 50)} for i in range(400)]
    source = FactSource(rows)
    read: list[int] = []
    make = materialiser(processor, source)
    original = source.read
    source.read = lambda row: read.append(row) or original(row)  # type: ignore[method-assign, func-returns-value]
    found = calibrate(source, make.measure_text)
    assert len(read) == found.num_rows == ROWS_PER_SHARD
    assert found.template_tokens == make.measure_text(None) > 5
    assert calibrate(source, make.measure_text) == found
    lengths = estimates(processor, source, found).costs(0, np.arange(400)).tokens
    measured: list[Any] = make.measure(job(*range(400)))
    true = np.array([length.num_tokens for length in measured])
    assert 0.5 < (lengths >= true).mean() <= 1
    assert np.abs(lengths / true - 1).mean() < 0.25


def test_calibration_survives_damaged_and_empty_samples(processor: Any) -> None:
    source = FactSource([None, {"image": None, "question": 3.5, "answer": None}, {}])
    found = calibrate(source, materialiser(processor, source).measure_text)
    assert found.num_rows == 0
    assert found.tokens_per_byte == pytest.approx(1 / 3.5)


@pytest.mark.parametrize("sizes", [[5], [0, 3, 0], [100, 100, 7], [1] * 1000, [0]])
def test_calibration_rows_are_rows(sizes: Sequence[int]) -> None:
    rows = calibration_rows(sizes)
    assert len(rows) == len(set(rows)) <= NUM_SHARDS * ROWS_PER_SHARD
    assert all(0 <= row < sum(sizes) for row in rows)
    assert bool(rows) == bool(sum(sizes))


def test_the_fingerprint_changes_with_whatever_changes_the_counts(processor: Any, tmp_path: Path) -> None:
    from vlm_dist.demo.tiny_model import TinyShape, build_processor, build_tokenizer

    def of(made: Any = processor, family: Any = QWEN, renames: Any = None, **sections: Any) -> str:
        return fingerprint(made, family, collator(**sections), renames)

    base = of()
    shape = TinyShape(max_pixels=14 * 14 * 4 * 1280)
    templated = build_processor(shape)
    templated.chat_template = "{{ messages }}"
    others = [
        of(build_processor(TinyShape())),
        of(build_processor(shape, build_tokenizer(num_merges=50))),
        of(templated),
        of(family=replace(QWEN, frame_step=1)),
        of(renames={"image": "png"}),
        of(message_format={"system_prompt": "Other."}),
        of(dataset_columns={"question_column": "query"}),
        of(data_processing={"image_data": False}),
        of(image_processing={"max_size": 500}),
        of(video_processing={"frame_extraction": {"num_frames": 4}}),
        of(text_processing={"max_length": 100}),
        of(text_processing={"truncation": False}),
        of(label_masking={"mask_input_tokens": True}),
    ]
    assert len({base, *others}) == len(others) + 1
    assert of(build_processor(shape)) == base
    assert of(label_masking={"ignore_index": -7}) == base
    assert of(text_processing={"pad_to_multiple_of": 64}) == base
    used = build_processor(shape)
    used.tokenizer(["one", "one two"], truncation=True, max_length=1, padding="max_length")
    assert of(used) == base
    build_processor(shape).save_pretrained(tmp_path)
    from transformers import AutoProcessor

    assert of(AutoProcessor.from_pretrained(tmp_path)) == of(AutoProcessor.from_pretrained(tmp_path))
    assert len(json.dumps(base)) == 34
