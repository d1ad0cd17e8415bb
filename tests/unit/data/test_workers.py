"""Worker processes: the same micro-batches as without them, whatever happens to a worker."""

import os
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.unit.data.samples import MemorySource, collator, jpeg
from vlm_dist.data.materialise import Materialiser
from vlm_dist.data.types import MicroBatch, MicroBatchJob, NullSlot, SampleOrigin, SampleRef
from vlm_dist.data.workers import pool as pool_module
from vlm_dist.data.workers import progress
from vlm_dist.data.workers.pool import PoolClosedError, WorkerPool
from vlm_dist.data.workers.process import pack, unpack
from vlm_dist.errors import DataError
from vlm_dist.families import family_for

CRASH, HANG, LOST, BUG, SLOW = 11, 12, 13, 14, 15


@dataclass(frozen=True)
class Maker:
    """Makes a micro-batch that tells its job; misbehaves for some jobs, the first time only where `once` is set."""

    scratch: Path | None = None
    between_samples: bool = False

    def __call__(self, job: MicroBatchJob) -> MicroBatch:
        if not self.between_samples:
            progress.decoding(0)
        if self._first_time(job):
            if job.micro_batch == CRASH:
                os.kill(os.getpid(), signal.SIGSEGV)
            if job.micro_batch == HANG:
                time.sleep(600)
        if job.micro_batch == SLOW:
            time.sleep(0.3)
        if job.micro_batch == LOST:
            raise DataError("disk is gone")
        if job.micro_batch == BUG:
            raise ZeroDivisionError("a bug")
        values = torch.full((2, 3), job.step)
        inputs = {"input_ids": values, "pixel_values": torch.randn(500, 500).bfloat16()}
        return MicroBatch(job, inputs, values.clone(), 1, 2, 3, 6)

    def _first_time(self, job: MicroBatchJob) -> bool:
        if self.scratch is None:
            return True
        seen = self.scratch / f"{job.step}-{job.micro_batch}"
        if seen.exists():
            return False
        seen.touch()
        return True

    def name_samples(self, job: MicroBatchJob) -> list[str]:
        return [f"vqa/000.tar:{ref.index}" for ref in job.refs if ref is not None]


def job(step, kind=0):
    return MicroBatchJob(step, kind, (SampleRef(0, step), None))


def test_packing_is_exact():
    inputs = {
        "ids": torch.arange(6).reshape(2, 3),
        "bf16": torch.randn(3, 4).bfloat16(),
        "f32": torch.randn(4, 3).T,
        "mask": torch.tensor([True, False]),
        "none": torch.empty(0, 7),
    }
    batch = MicroBatch(job(1), inputs, torch.full((2, 3), -100), 1, 2, 3, 6)
    batch.null_slots.append(NullSlot(SampleOrigin("a", "b", "c"), "decode", "cut"))
    again = unpack(pack(batch))
    for key, value in inputs.items():
        assert torch.equal(again.inputs[key], value)
        assert again.inputs[key].dtype == value.dtype
    assert again.inputs["ids"].add_(1).tolist() == [[1, 2, 3], [4, 5, 6]]  # writable
    assert (again.job, again.null_slots, again.num_computed_tokens) == (batch.job, batch.null_slots, 6)


def test_without_workers_everything_happens_here():
    with WorkerPool(Maker(), 0) as pool:
        assert pool.submit(job(3)).result().job.step == 3
        with pytest.raises(ZeroDivisionError):
            pool.submit(job(0, BUG)).result()
    with pytest.raises(PoolClosedError):
        pool.submit(job(0))


def test_workers_their_errors_and_their_deaths(tmp_path):
    """One pool for all of it: starting workers is what takes time."""
    with WorkerPool(Maker(tmp_path), 2, sample_timeout_seconds=2) as pool:
        jobs = [pool.submit(job(step)) for step in range(6)]
        assert [one.result().job.step for one in jobs] == list(range(6))
        assert jobs[0].result().inputs["pixel_values"].dtype == torch.bfloat16

        with pytest.raises(DataError, match="disk is gone"):
            pool.submit(job(0, LOST)).result()
        with pytest.raises(RuntimeError, match="ZeroDivisionError: a bug"):
            pool.submit(job(0, BUG)).result()

        before = pool.pids
        # a scheduler's SIGTERM to all processes of a job is the trainer's business: it still needs the workers
        for number, stays in ((signal.SIGTERM, True), (signal.SIGKILL, False)):
            jobs = [pool.submit(job(step, SLOW)) for step in range(4)]
            for pid in before:
                os.kill(pid, number)
            assert [one.result().job.step for one in jobs] == list(range(4))
            assert set(before) == set(pool.pids) if stays else not set(before) & set(pool.pids)

        jobs = [pool.submit(job(step, kind)) for step, kind in ((0, 0), (1, CRASH), (2, HANG), (3, 0))]
        assert [one.result().job.step for one in jobs] == list(range(4))  # the second time they work


def test_a_job_that_kills_its_workers_between_its_samples_is_named_and_the_others_go_on():
    with WorkerPool(Maker(between_samples=True), 2) as pool:
        jobs = [pool.submit(job(step, CRASH if step == 1 else 0)) for step in range(4)]
        with pytest.raises(DataError, match=r"signal 11.* 3 times .*step 1.* vqa/000\.tar:1"):
            jobs[1].result()
        assert [jobs[step].result().job.step for step in (0, 2, 3)] == [0, 2, 3]


def test_closing_does_not_wait_for_a_job():
    pool = WorkerPool(Maker(), 1)
    waiting = [pool.submit(job(0, HANG)), pool.submit(job(1))]
    while not pool.pids:
        time.sleep(0.01)
    started = time.monotonic()
    pool.close()
    assert time.monotonic() - started < 5
    for one in waiting:
        with pytest.raises(PoolClosedError):
            one.result()
    pool.close()


class CannotTravel:
    """Its pickle cannot be read."""

    def __reduce__(self):
        return (eval, ("1/0",))


def test_a_pool_that_is_closed_while_it_starts_workers_leaves_nothing_behind(monkeypatch):
    """Starting takes longer than closing waits: the pipe stays open for the thread, and no more workers are started."""
    started, go_on, real = threading.Event(), threading.Event(), pool_module.start_worker
    workers = []

    def start_slowly(*arguments):
        started.set()
        assert go_on.wait(30)
        workers.append(real(*arguments))
        return workers[-1]

    monkeypatch.setattr(pool_module, "start_worker", start_slowly)
    monkeypatch.setattr(pool_module, "END_SECONDS", 0.05)
    pool = WorkerPool(Maker(), 2)
    waiting = pool.submit(job(1))
    assert started.wait(30)
    pool.close()
    os.fstat(pool._woken)  # still open: another file under its number would be read from
    go_on.set()
    with pytest.raises(PoolClosedError):
        waiting.result(30)
    pool._thread.join(30)
    assert len(workers) == 1
    assert not workers[0].process.is_alive()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(pool._woken)


def test_a_materialiser_that_cannot_be_set_up_says_so():
    with (
        WorkerPool(CannotTravel(), 1) as pool,
        pytest.raises(DataError, match="could not be set up"),
    ):
        pool.submit(job(0)).result()


def test_a_worker_makes_the_micro_batch_that_this_process_makes(processor):
    rows = [{"image": jpeg(64, 48), "question": "q", "answer": "a"}]
    make = Materialiser([MemorySource(rows)], processor, family_for("qwen2_vl"), collator(), frozenset({"image"}), 0)
    one = MicroBatchJob(0, 0, (SampleRef(0, 0),))
    with WorkerPool(make, 1) as pool:
        there, here = pool.submit(one).result(), make(one)
    assert there.inputs.keys() == here.inputs.keys()
    assert all(torch.equal(there.inputs[key], here.inputs[key]) for key in here.inputs)
    assert there.origins == here.origins
