"""A sample that crashes or hangs its decoder costs its own slot, and nothing else."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch

from vlm_dist.data.types import MicroBatch, MicroBatchJob, NullSlot, SampleOrigin, SampleRef
from vlm_dist.data.workers import progress
from vlm_dist.data.workers.pool import WorkerPool
from vlm_dist.errors import DataError

CRASHES, EXITS, HANGS, HANGS_ONCE, STOPS_READING = 100, 101, 102, 103, 104
SLOW = 50


@dataclass(frozen=True)
class Decoder:
    """Samples are numbers; some numbers are bad. Works as the materialiser does: suspects first, condemned never."""

    scratch: Path
    leak_bytes: int = 0

    def __call__(self, job: MicroBatchJob) -> MicroBatch:
        batch = MicroBatch(job, {}, torch.zeros(1, 1), 0, 0, 0, 0)
        done: dict[int, SampleOrigin | NullSlot] = {}
        for slot in sorted(range(len(job.refs)), key=lambda slot: slot not in job.suspects):
            number = job.refs[slot].index
            origin = SampleOrigin("s", "t", str(number))
            condemned = [one for one in job.condemned if one.slot == slot]
            if condemned:
                done[slot] = NullSlot(origin, condemned[0].null_class, condemned[0].message)
                continue
            progress.reading(slot)
            if number == STOPS_READING and self._first_time(number):
                time.sleep(1.8)  # slow storage is not the sample's fault
            progress.decoding(slot)
            with (self.scratch / f"tried-{number}").open("a") as stream:
                stream.write(f"{os.getpid()}\n")
            self._decode(number)
            done[slot] = origin
        progress.between_samples()
        for slot in sorted(done):
            (batch.null_slots if isinstance(done[slot], NullSlot) else batch.origins).append(done[slot])
        batch.num_samples = len(batch.origins)
        return batch

    def _decode(self, number: int) -> None:
        if number == CRASHES:
            ctypes.string_at(0)  # a true segmentation fault
        if number == EXITS:
            os._exit(3)
        if number == HANGS or (number == HANGS_ONCE and self._first_time(number)):
            time.sleep(600)
        if number == SLOW:
            time.sleep(0.3)
        if self.leak_bytes:
            LEAKED.append(bytearray(os.urandom(1) * self.leak_bytes))

    def _first_time(self, number: int) -> bool:
        seen = self.scratch / f"seen-{number}"
        if seen.exists():
            return False
        seen.touch()
        return True

    def name_samples(self, job: MicroBatchJob) -> list[str]:
        return [f"s/t:{ref.index}" for ref in job.refs if ref is not None]

    def attempts(self, number: int) -> list[str]:
        """Processes that tried a sample."""
        return (self.scratch / f"tried-{number}").read_text().split()


LEAKED: list[bytearray] = []


def job(step: int, *numbers: int) -> MicroBatchJob:
    return MicroBatchJob(step, 0, tuple(SampleRef(0, number) for number in numbers))


def outcome(batch: MicroBatch) -> tuple[list[str], dict[str, tuple[str, str]]]:
    bad = {slot.origin.key: (slot.null_class, slot.message) for slot in batch.null_slots if slot.origin}
    return [origin.key for origin in batch.origins], bad


@pytest.mark.parametrize("num_workers", [1, 3])
def test_bad_samples_cost_their_slots_and_nothing_else(tmp_path: Path, num_workers: int) -> None:
    decoder = Decoder(tmp_path)
    with WorkerPool(decoder, num_workers, sample_timeout_seconds=1.0) as pool:
        jobs = [
            pool.submit(job(0, 1, CRASHES, 2, EXITS)),
            pool.submit(job(1, 3, 4)),
            pool.submit(job(2, HANGS, 5)),
            pool.submit(job(3, 6, HANGS_ONCE)),
        ]
        made = [outcome(one.result()) for one in jobs]
    assert made == [
        (
            ["1", "2"],
            {
                "100": ("crash", "its decoding ended the worker process twice (died of signal 11)"),
                "101": ("crash", "its decoding ended the worker process twice (ended with exit code 3)"),
            },
        ),
        (["3", "4"], {}),
        (["5"], {"102": ("timeout", "its decoding took longer than 1 s twice")}),
        (["6", "103"], {}),  # the second time it worked
    ]
    assert {len(decoder.attempts(number)) for number in (CRASHES, EXITS, HANGS, HANGS_ONCE)} == {2}
    assert len(set(decoder.attempts(HANGS))) == 2  # on another worker
    assert jobs[2].lost_seconds == pytest.approx(2, abs=1.0)
    assert jobs[1].lost_seconds == 0


def test_slow_is_not_hanging(tmp_path: Path) -> None:
    """The deadline is of one sample's decoding: neither of the micro-batch, nor of the storage."""
    with WorkerPool(Decoder(tmp_path), 1, sample_timeout_seconds=1.0) as pool:
        many = pool.submit(job(0, *[SLOW] * 6))
        slow_to_read = pool.submit(job(1, STOPS_READING))
        assert outcome(many.result()) == (["50"] * 6, {})
        assert outcome(slow_to_read.result()) == (["104"], {})
        assert many.lost_seconds == slow_to_read.lost_seconds == 0


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGKILL])
def test_a_worker_that_is_killed_from_outside_costs_no_sample(tmp_path: Path, sent: signal.Signals) -> None:
    decoder = Decoder(tmp_path)
    with WorkerPool(decoder, 1, sample_timeout_seconds=30) as pool:
        waiting = pool.submit(job(0, 1, HANGS_ONCE, 2))
        while not (tmp_path / "tried-103").exists():
            time.sleep(0.01)
        os.kill(int(decoder.attempts(HANGS_ONCE)[0]), sent)  # in the midst of a sample
        assert outcome(waiting.result()) == (["1", "103", "2"], {})


def test_too_many_samples_that_hang_end_the_run_and_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlm_dist.data.workers.case.MAX_LOST_SECONDS", 2.0)
    with WorkerPool(Decoder(tmp_path), 2, sample_timeout_seconds=0.5) as pool:
        waiting = pool.submit(job(7, HANGS, 1, HANGS, HANGS))
        with pytest.raises(DataError, match=r"step 7.* s/t:102 \(did not come back.*data.sample_timeout_seconds"):
            waiting.result()
        assert outcome(pool.submit(job(8, 2)).result()) == (["2"], {})


def test_a_worker_that_grows_is_replaced_between_jobs(tmp_path: Path) -> None:
    decoder = Decoder(tmp_path, leak_bytes=64 << 20)
    pids: list[int] = []  # in the order in which they came
    num_jobs, longest = 0, 0.0
    with WorkerPool(decoder, 1, max_memory_bytes=1 << 20) as pool:
        while len(pids) < 3 and num_jobs < 100:  # a third, so the second one was watched too
            started = time.monotonic()
            assert outcome(pool.submit(job(num_jobs, num_jobs)).result())[0] == [str(num_jobs)]
            longest = max(longest, time.monotonic() - started) if num_jobs else 0.0
            num_jobs += 1
            pids = list(dict.fromkeys([*pids, *pool.pids]))
        assert len(pids) >= 3
        assert not psutil.pid_exists(pids[0])  # and with it what it had leaked
    assert {len(decoder.attempts(number)) for number in range(num_jobs)} == {1}  # no job was lost to it
    assert longest < 5
