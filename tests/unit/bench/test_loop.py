"""The benchmark of the loop: what the stopwatches make of its parts."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest

from tests.bench.loop.__main__ import CASES, QUICK_CASES, _body
from tests.bench.loop.parts import Parts
from tests.bench.loop.ranks import MemoryPool
from vlm_dist import trainer as loop
from vlm_dist.data.types import MicroBatchJob


def trainer(seconds: dict[str, float]) -> Any:
    """Parts of a trainer that take as long as is said."""

    def part(*names: str) -> SimpleNamespace:
        return SimpleNamespace(**{name: lambda name=name: time.sleep(seconds.get(name, 0.0)) for name in names})

    return SimpleNamespace(
        engine=part("loss", "backward", "step"), ranks=SimpleNamespace(progress=part("at")), nonfinite=part("judge"),
        ledger=None, meter=part("add", "report_window"), log=part("advance"), garbage=part("step_done"),
    )  # fmt: skip


def test_each_part_has_its_own_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "seed_micro_batch", lambda: None)
    made = trainer({"loss": 0.004, "add": 0.002, "report_window": 0.01})
    parts = Parts(made)
    parts.begin()
    for step in range(11):
        loop.seed_micro_batch()  # type: ignore[call-arg]
        made.engine.loss()
        made.meter.add()
        if step in (5, 10):
            made.meter.report_window()
        time.sleep(0.003)  # nobody's
        with parts.of("feed and agreement of the ranks"):
            time.sleep(0.001)
        time.sleep(0.02)  # of the bare step, behind it
        parts.end_step(0.003)
    found = parts.microseconds()
    assert list(found.values()) == sorted(found.values(), reverse=True)
    assert "forward, backward, update" not in found
    expected = {"sums of the meter, count of operations": 2000, "feed and agreement of the ranks": 1000}
    expected |= {"everything else of the loop": 3000, "around DeepSpeed's three calls": 1000}
    expected |= {"a line of the log (one step in ten)": 2000}  # two in the ten steps behind the first
    for part, microseconds in expected.items():
        assert microseconds * 0.9 < found[part] < 15_000, (part, found)  # not the 20 milliseconds of the bare step
    assert found["seed of a micro-batch"] < 900


def test_without_parted_steps_there_are_no_parts() -> None:
    assert Parts(trainer({})).microseconds() == {}


def test_the_thread_of_the_feed_is_timed_from_step_to_step(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([1.0, 1.5, 2.5, 3.0, 3.5])
    monkeypatch.setattr(time, "thread_time", lambda: next(times))
    jobs = [MicroBatchJob(step, 0, ()) for step in range(4)]
    pool = MemoryPool({(job.step, job.micro_batch): f"batch {job.step}" for job in jobs})  # type: ignore[misc]
    assert [pool.submit(job).result() for job in jobs] == ["batch 0", "batch 1", "batch 2", "batch 3"]
    assert pool.thread_seconds() == 0.5


def test_the_page_says_what_was_measured() -> None:
    page = _body(["| a | 24 |"], {"one": 1200.0, "two": 34.0}, 760.0, 0.01)
    words = page.replace("\n", " ")
    assert "collector of garbage is off in both loops" in words and "24 pairs" in words
    assert "steps measured, each" in page and "| one | 1,200 |" in page and "| together | 1,234 |" in page
    assert "760 microseconds" in words
    assert len(QUICK_CASES) < len(CASES) and QUICK_CASES[-1].num_parted
