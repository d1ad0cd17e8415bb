"""What was trained on, written by several ranks and read after kills and resumes."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from vlm_dist.data.ledger import SampleLedger, _last_attempt, read_ledger
from vlm_dist.data.types import MicroBatch, MicroBatchJob, NullSlot, SampleOrigin, SampleRef, StepPlan
from vlm_dist.errors import DataError


def batch(keys: str, null_classes: Sequence[str] = (), repeat: int = 0) -> MicroBatch:
    """A micro-batch whose samples have one letter each as a key."""
    return MicroBatch(
        job=MicroBatchJob(0, 0, ()),
        inputs={},
        labels=torch.empty(0),
        num_samples=len(keys),
        num_target_tokens=1,
        num_tokens=1,
        num_computed_tokens=1,
        null_slots=[NullSlot(None, name, "") for name in null_classes],
        origins=[SampleOrigin("vqa", "0.tar", key) for key in keys],
        refs=[SampleRef(0, ord(key), repeat) for key in keys],
    )


def attempt(directory: Path, number: int, start: int, steps: Sequence[Sequence[str]]) -> None:
    """One start of a run: `steps` has the keys of each rank, per step; an empty text is a line never written."""
    ledgers = [SampleLedger(directory, rank, len(steps[0]), number, start) for rank in range(len(steps[0]))]
    for step, per_rank in enumerate(steps, start):
        for ledger, keys in zip(ledgers, per_rank, strict=True):
            if keys:
                ledger.record(StepPlan(step, (step + 1) / 4, ()), [batch(keys)], is_applied=True)
    for ledger in ledgers:
        ledger.close()


def keys(directory: Path) -> dict[int, str]:
    return {step: "".join(sample.key for sample in record.samples) for step, record in read_ledger(directory).items()}


def test_the_ranks_of_a_step_are_joined(tmp_path: Path) -> None:
    attempt(tmp_path, 1, 0, [("ab", "cd"), ("ef", "gh")])
    assert keys(tmp_path) == {0: "abcd", 1: "efgh"}
    assert all(not step.missing_ranks and step.is_applied for step in read_ledger(tmp_path).values())


def test_a_resumed_run_replaces_the_steps_that_it_repeats(tmp_path: Path) -> None:
    attempt(tmp_path, 1, 0, [("ab", "cd"), ("ef", "gh"), ("ij", "")])  # rank 1 was killed before its third line
    with (tmp_path / "ledger" / "rank-00001.jsonl").open("a") as file:
        file.write('{"attempt": 1, "step": 2, "app')
    assert read_ledger(tmp_path)[2].missing_ranks == (1,)
    attempt(tmp_path, 2, 1, [("efgh",), ("ijkl",), ("mnop",)])  # on one rank, from the first step's checkpoint
    assert keys(tmp_path) == {0: "abcd", 1: "efgh", 2: "ijkl", 3: "mnop"}
    attempt(tmp_path, 3, 2, [("ij", "kl")])  # on two again: the cut line is gone
    assert keys(tmp_path) == {0: "abcd", 1: "efgh", 2: "ijkl"}
    assert [record.attempt for record in read_ledger(tmp_path).values()] == [1, 2, 3]
    assert not any(record.missing_ranks for record in read_ledger(tmp_path).values())
    for line in (tmp_path / "ledger" / "rank-00001.jsonl").read_text().splitlines():
        assert line.endswith("}")


def test_what_an_earlier_attempt_did_beyond_the_resumed_position_does_not_count(tmp_path: Path) -> None:
    attempt(tmp_path, 1, 0, [("a",), ("b",), ("c",)])
    attempt(tmp_path, 2, 1, [("x",)])
    assert keys(tmp_path) == {0: "a", 1: "x"}


def test_attempts_count_up_whatever_was_cut(tmp_path: Path) -> None:
    assert _last_attempt(tmp_path) == 0
    attempt(tmp_path, 1, 0, [("a", "b")])
    attempt(tmp_path, 2, 0, [("a" * 70_000,)])
    with (tmp_path / "ledger" / "rank-00000.jsonl").open("a") as file:
        file.write('{"attempt": 9, "start')
    assert _last_attempt(tmp_path) == 2


def test_epochs_and_repeats_are_told_apart_and_null_slots_counted(tmp_path: Path) -> None:
    with SampleLedger(tmp_path, 0, 1, 1, 0) as ledger:
        ledger.record(StepPlan(0, 1.0, ()), [batch("a"), batch("a", ["tail", "decode"], repeat=1)], is_applied=True)
        ledger.record(StepPlan(1, 1.25, ()), [batch("a")], is_applied=True)
    first, second = read_ledger(tmp_path).values()
    assert [(sample.epoch, sample.repeat) for sample in first.samples] == [(0, 0), (0, 1)]
    assert [(sample.epoch, sample.repeat) for sample in second.samples] == [(1, 0)]
    assert first.null_slots == {"tail": 1, "decode": 1}


def test_a_step_that_updated_nothing_has_no_samples(tmp_path: Path) -> None:
    with SampleLedger(tmp_path, 0, 1, 1, 0) as ledger:
        ledger.record(StepPlan(0, 0.5, ()), [batch("a")], is_applied=False)
    (step,) = read_ledger(tmp_path).values()
    assert (step.samples, step.is_applied) == ((), False)


def test_a_disk_that_fails_costs_lines_and_not_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "ledger").write_text("in the way")
    with caplog.at_level(logging.WARNING), SampleLedger(tmp_path, 0, 1, 1, 0) as ledger:
        ledger.record(StepPlan(0, 0.5, ()), [batch("a")], is_applied=True)
    assert caplog.text.count("cannot be written") == 1


def test_without_a_ledger_the_setting_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="sample_ledger"):
        read_ledger(tmp_path)
