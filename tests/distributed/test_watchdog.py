"""A rank that hangs, one that is gone, one that fails: the others say which, where it was, and end in time."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import Ranks, run_doomed_ranks, run_ranks
from vlm_dist.build.ending import told_clearly
from vlm_dist.config.train import TrainConfig
from vlm_dist.distributed import watchdog as watchdog_module
from vlm_dist.distributed.group import LostPeerError
from vlm_dist.distributed.watchdog import Watchdog
from vlm_dist.errors import ExitCode

HANG_SECONDS = 3.0


@pytest.fixture(autouse=True)
def _short_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog_module, "LOOK_SECONDS", 0.2)
    monkeypatch.setattr(watchdog_module, "SILENCE_SECONDS", 5.0)  # heartbeats come once a second


def jump_about() -> None:
    """A wall clock that jumps by an hour, forth and back, all the time."""
    now = time.time
    time.time = lambda: now() + 3600 * (int(time.monotonic() * 7) % 3 - 1)  # type: ignore[assignment]


def in_their_own_words(ranks: Ranks, disturb: Any, directory: Path, hang_seconds: float, results: Any) -> None:
    """Steps of a barrier each, with what `disturb` does; tells how this rank ended, and what it said."""
    sys.stderr = (directory / f"stderr-{ranks.rank}").open("w")
    jump_about()

    def end(code: int) -> None:
        results.put((ranks.rank, code, time.monotonic()))
        os._exit(0)

    with Watchdog(ranks, hang_seconds, directory / "stacks", end):
        for step in range(10**6):
            ranks.progress.at("forward", step, [f"images/a.tar:{ranks.rank}-{step}"])
            disturb(ranks, step)
            time.sleep(0.02)
            ranks.progress.at("backward")
            with contextlib.suppress(RuntimeError):
                ranks.barrier()
                continue
            time.sleep(60)  # as NCCL, which does not tell that a rank is gone


def run_disturbed(
    disturb: Any, world_size: int, directory: Path, wait_seconds: float = 45.0, hang_seconds: float = HANG_SECONDS
) -> dict[int, int]:
    """Rank -> exit code, of those that told."""
    results = multiprocessing.get_context("fork").SimpleQueue()
    run_doomed_ranks(
        in_their_own_words, world_size, disturb, directory, hang_seconds, results, timeout_seconds=wait_seconds
    )
    codes = {}
    while not results.empty():
        rank, code, _ = results.get()
        codes[rank] = code
    return codes


def hang(ranks: Ranks, step: int) -> None:
    if ranks.rank == 1 and step == 20:
        the_line_that_hangs = threading.Event()
        the_line_that_hangs.wait()


def test_a_rank_that_hangs_is_named_and_all_write_their_stacks_and_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # on a machine with other work a heartbeat may be seconds late, which would be taken for a rank that is gone
    monkeypatch.setattr(watchdog_module, "SILENCE_SECONDS", 60.0)
    codes = run_disturbed(hang, 3, tmp_path, hang_seconds=8.0)
    assert codes == dict.fromkeys(range(3), int(ExitCode.HANG))
    said = "".join((tmp_path / f"stderr-{rank}").read_text() for rank in range(3))
    assert said.count("error: hang") == 1
    assert re.search(r"Rank 1 lags: step 20, forward, samples images/a.tar:1-20, for 0.[12] min; the others wait", said)
    for rank in range(3):
        stacks = (tmp_path / "stacks" / f"rank-{rank}.txt").read_text()
        assert stacks.startswith(f"rank {rank} at step 20")
        assert ("in hang" if rank == 1 else "in barrier") in stacks


def be_killed(ranks: Ranks, step: int) -> None:
    if ranks.rank == 1 and step == 20:
        time.sleep(1.5)  # the others hear of it once a second
        os.kill(os.getpid(), signal.SIGKILL)


def stand_still(ranks: Ranks, step: int) -> None:
    if ranks.rank == 0 and step == 20:  # the one that keeps the store
        time.sleep(1.5)
        os.kill(os.getpid(), signal.SIGSTOP)


@pytest.mark.parametrize(
    ("disturb", "gone", "words"),
    [
        (be_killed, 1, "another rank is gone: rank 1, last heard of [4-9] s ago at step 20, forward, samples images"),
        (stand_still, 0, "another rank is gone: rank 0, or the process that keeps the ranks' store, last heard of"),
    ],
)
def test_a_rank_that_is_gone_is_named_though_the_backend_waits(
    disturb: Any, gone: int, words: str, tmp_path: Path
) -> None:
    # as in earnest, a hang is long after a silence
    codes = run_disturbed(disturb, 3, tmp_path, hang_seconds=5 * HANG_SECONDS)
    left = [rank for rank in range(3) if rank != gone]
    assert codes == dict.fromkeys(left, int(ExitCode.DISTRIBUTED))
    said = "".join((tmp_path / f"stderr-{rank}").read_text() for rank in left)
    assert re.search(words, said), said


def fail_or_be_killed(ranks: Ranks, is_killed: bool, directory: Path) -> tuple[str, str]:
    sys.stderr = (directory / f"stderr-{ranks.rank}").open("w")
    settings = TrainConfig(output_dir=directory)
    try:
        with told_clearly(settings, ranks):
            ranks.progress.at("forward", 7, ["images/a.tar:0003"])
            time.sleep(1.5)
            if ranks.rank == 1:
                if is_killed:
                    os.kill(os.getpid(), signal.SIGKILL)
                raise RuntimeError("CUDA out of memory")
            ranks.barrier()
    except LostPeerError as error:
        return f"lost {int(error.exit_code)}", str(error)
    except RuntimeError as error:
        sys.stderr.flush()
        if "/gloo/" not in str(error) and ranks.rank == 1:
            os._exit(1)  # what the entry does
        return "failed", str(error)
    return "", ""


@pytest.mark.parametrize("is_killed", [False, True])
def test_the_others_say_who_left_and_why(is_killed: bool, tmp_path: Path) -> None:
    results: list[Any] = []

    def note(ranks: Ranks) -> None:
        (tmp_path / f"told-{ranks.rank}").write_text(str(fail_or_be_killed(ranks, is_killed, tmp_path)))

    run_doomed_ranks(note, 3)
    results = [(tmp_path / f"told-{rank}").read_text() for rank in (0, 2)]
    for told in results:
        code = ExitCode.DISTRIBUTED if is_killed else ExitCode.FAILURE  # a launcher may look at any rank first
        assert told.startswith(f"('lost {int(code)}'")
        if is_killed:
            assert "another rank is gone: rank 1, last heard of" in told
        else:
            assert "another rank is gone: rank 1 has left at" in told
            assert "RuntimeError: CUDA out of memory" in told
        assert "at step 7, forward, samples images/a.tar:0003" in told
        assert "train.resume=auto" in told
    if not is_killed:
        said = (tmp_path / "stderr-1").read_text()
        assert said == (
            "error: rank 1 failed at step 7, forward, samples images/a.tar:0003: RuntimeError: CUDA out of memory\n"
        )


def fail_by_itself(ranks: Ranks, phase: str, directory: Path, results: Any) -> None:
    """Rank 1 fails, rank 0 hears of it and is taking its run apart, the others wait in a collective of NCCL."""
    sys.stderr = (directory / f"stderr-{ranks.rank}").open("w")

    def end(code: int) -> None:
        results.put((ranks.rank, code, time.monotonic()))
        os._exit(0)

    watchdog = Watchdog(ranks, 60.0, directory / "stacks", end)
    with watchdog:
        ranks.progress.at(phase)
        time.sleep(1.5)
        if ranks.rank == 1:
            watchdog.close("ConfigError: too large", ExitCode.CONFIG)
            end(-1)
        if ranks.rank == 0:
            with ranks.progress.until_leaving():
                pass
            time.sleep(8.0)
            end(0)
        time.sleep(60)


@pytest.mark.parametrize("phase", ["forward", "start-up"])
def test_a_rank_that_has_failed_is_not_waited_for(phase: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog_module, "SILENCE_SECONDS", 30.0)
    monkeypatch.setattr(watchdog_module, "FAILED_SECONDS", 1.0)
    results = multiprocessing.get_context("fork").SimpleQueue()
    run_doomed_ranks(fail_by_itself, 3, phase, tmp_path, results, timeout_seconds=20.0)
    ends = {}
    while not results.empty():
        rank, code, at = results.get()
        ends[rank] = code, at
    assert {rank: code for rank, (code, _) in ends.items()} == {0: 0, 1: -1, 2: int(ExitCode.CONFIG)}
    assert ends[2][1] - ends[1][1] < 6.0
    assert "rank 1 has left at" in (tmp_path / "stderr-2").read_text()


def alone(ranks: Ranks, directory: Path) -> list[int]:
    codes: list[int] = []
    with Watchdog(ranks, 1.0, directory, codes.append):
        ranks.progress.at("building")  # start-up has no limit of its own
        time.sleep(1.6)
        assert not codes
        for _ in range(8):  # longer than the limit in all, but it moves
            ranks.progress.at("forward", 3)
            time.sleep(0.3)
        assert not codes
        time.sleep(1.5)
    return codes


def test_only_a_watched_phase_that_does_not_move_is_a_hang(tmp_path: Path) -> None:
    assert run_ranks(alone, 1, tmp_path) == [[int(ExitCode.HANG)]]
