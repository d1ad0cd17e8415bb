"""The fault corpus: every damaged sample costs its own slot and says why; every damaged shard is refused by name."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.unit.data.faults import SampleFault, ShardFault, picture, sample_faults, shard_faults, text, write_tar
from tests.unit.data.samples import collator
from vlm_dist.config.vlm_collator import VlmCollatorConfig
from vlm_dist.data.materialise import Materialiser
from vlm_dist.data.sources import open_source
from vlm_dist.data.types import MicroBatch, MicroBatchJob, SampleRef, Source
from vlm_dist.errors import DataError
from vlm_dist.families import family_for

FAULTS = list(sample_faults())


def opened(path: Path, **columns: str) -> Source:
    return open_source(SimpleNamespace(type="tar", path=str(path), columns=columns or None))


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory, processor: Any) -> dict[str, tuple[str | None, str]]:
    """Null class and message by key. Each kind of media is a source, as its column has a name."""
    found: dict[str, tuple[str | None, str]] = {}
    for extension in sorted({next(iter(fault.members)) for fault in FAULTS}):
        faults = [fault for fault in FAULTS if extension in fault.members]
        kind = "video" if extension == "mp4" else "image"
        path = tmp_path_factory.mktemp("faults") / f"{extension}.tar"
        source = opened(write_tar(path, [(fault.name, fault.members) for fault in faults]), **{kind: extension})
        make = Materialiser([source], processor, family_for("qwen2_vl"), only(kind), frozenset({kind}), 0)
        batch: MicroBatch = make(MicroBatchJob(0, 0, tuple(SampleRef(0, row) for row in range(len(source)))))
        assert batch.num_samples + len(batch.null_slots) == len(faults)
        found |= {origin.key: (None, "") for origin in batch.origins}
        found |= {slot.origin.key: (slot.null_class, slot.message) for slot in batch.null_slots if slot.origin}
    return found


def only(kind: str) -> VlmCollatorConfig:
    """A configuration whose messages have one image or one video, and a text."""
    columns = {"image_column": None, "video_column": None, f"{kind}_column": kind}
    question = [{"type": kind}, {"type": "text", "text": "{question_column}"}]
    answer = [{"type": "text", "text": "{answer_column}"}]
    return collator(
        dataset_columns=columns,
        data_processing={"image_data": kind == "image", "video_data": kind == "video"},
        message_format={
            "training_messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        },
    )


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_damaged_sample_has_its_class(outcomes: dict[str, tuple[str | None, str]], fault: SampleFault) -> None:
    null_class, message = outcomes[fault.name]
    assert null_class in fault.outcomes, message
    assert null_class is None or (message and "\n" not in message and len(message) < 500)


@pytest.mark.parametrize("fault", list(shard_faults()), ids=lambda fault: fault.name)
def test_a_damaged_shard_is_refused_by_name(tmp_path: Path, fault: ShardFault) -> None:
    path = tmp_path / f"{fault.name}.tar"
    path.write_bytes(fault.content)
    if fault.refused is None:
        source = opened(path)
        assert len(source) == fault.num_samples
        assert [source.read(row).fields["answer"] for row in range(len(source))] == ["seven"] * fault.num_samples
        return
    with pytest.raises(DataError) as refused:
        opened(path)
    assert path.name in str(refused.value)
    assert fault.refused in str(refused.value)


def test_a_shard_that_changes_after_it_was_indexed_is_no_bad_sample(tmp_path: Path) -> None:
    """Storage that loses data is not a matter of single samples: the run ends."""
    samples = [(key, {"png": picture("PNG"), "json": text()}) for key in "abc"]
    path = write_tar(tmp_path / "a.tar", samples)
    source = opened(path)
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(DataError, match=r"a\.tar"):
        source.read(2)
