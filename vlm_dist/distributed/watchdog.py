"""Ends a run that stands still, and says who stands where.

A thread on every rank looks at this rank's own mark (`progress`) and at the others' heartbeats. It ends the process
when a phase lasts longer than it may, or when a rank is gone and the backend would still wait for it; before, it writes
down the stacks of all threads. Only monotonic clocks are read: a wall clock that jumps changes nothing.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from vlm_dist.distributed.group import Ranks
from vlm_dist.distributed.heartbeat import ENDED, Beat, Heartbeats, Verdict
from vlm_dist.errors import ExitCode

#: A rank is gone when it has been silent for so long, and nothing has moved here for as long.
SILENCE_SECONDS = 90.0
#: A rank that has failed has said so: one that nothing moves on is waiting for it, and need not for longer.
FAILED_SECONDS = 5.0
#: What a phase may take beyond the limit when it is done for the first time: kernels are compiled.
FIRST_USE_SECONDS = 600.0
#: Between two looks.
LOOK_SECONDS = 1.0

#: Launchers whose ranks are their children: one that is gone has no one left to look after them.
_PARENTS = ("deepspeed", "torchrun")


class Watchdog:
    """Watches this rank, and the others; see the module.

    Args:
        ranks: this process among its peers.
        hang_seconds: the longest that one phase may take: one wait for data, one forward, backward or optimizer step,
            one micro-batch of an evaluation, one save. A first use has `FIRST_USE_SECONDS` more; work with a watch of
            its own (`patience.long_work`) and start-up are not watched.
        stacks_dir: where rank-N.txt gets the stacks.
        end: ends the process with an exit code.
    """

    def __init__(
        self, ranks: Ranks, hang_seconds: float, stacks_dir: Path, end: Callable[[int], None] = os._exit
    ) -> None:
        self._ranks = ranks
        self._hang_seconds = hang_seconds
        self._silence_seconds = min(SILENCE_SECONDS, hang_seconds)
        self._stacks_path = stacks_dir / f"rank-{ranks.rank}.txt"
        self._end = end
        self._mark = ranks.progress.mark
        self._moved_at = self._looked_at = time.monotonic()
        self._parent = os.getppid() if ranks.topology.launcher in _PARENTS else None
        self._closing = threading.Event()
        self._beats = Heartbeats(ranks, self._own_age) if ranks.world_size > 1 else None

    def __enter__(self) -> Self:
        """Begin. Collective: every rank calls this."""
        if self._beats is not None:
            self._beats.start()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self, last_word: str = ENDED, exit_code: int = 0) -> None:
        """End watching; tell the others why this rank leaves. May be called twice.

        Args:
            last_word: what has failed here, in a line.
            exit_code: this rank's, where it has failed.
        """
        if self._closing.is_set():
            return
        self._closing.set()
        if self._beats is not None:
            self._beats.leave(last_word, exit_code)

    def who_is_gone(self) -> str:
        """After a collective has failed: which rank is gone, and where it was, as far as the heartbeats tell it.

        Takes a few intervals, as a rank is gone when its heartbeat does not change.
        """
        if self._beats is None:
            return "another rank is gone"
        began = time.monotonic()
        patience = min(4 * self._beats.interval, 20.0) + 1.0
        while time.monotonic() - began < patience:
            self._moved_at = time.monotonic()  # this is no hang
            if any(beat.has_failed for beat in self._others().values()):
                break
            time.sleep(0.2)
        return self._describe_gone(patience * 0.7)

    def exit_code_of_gone(self) -> ExitCode:
        """The exit code of the rank that failed by itself; else that of a rank that was lost.

        All ranks end with it: which of them a launcher looks at first is chance, and a wrong configuration must not
        look like a lost node.
        """
        codes = [beat.exit_code for beat in self._others().values() if beat.has_failed and beat.exit_code]
        return ExitCode(codes[0]) if codes else ExitCode.DISTRIBUTED

    def _own_age(self) -> float:
        return time.monotonic() - self._moved_at

    def _others(self) -> dict[int, Beat]:
        heard = self._beats.heard if self._beats is not None else {}
        return {rank: beat for rank, (beat, _) in sorted(heard.items()) if rank != self._ranks.rank}

    def _watch(self) -> None:
        while not self._closing.wait(LOOK_SECONDS):
            self._look()

    def _look(self) -> None:
        now = time.monotonic()
        pause = now - self._looked_at
        self._looked_at = now
        if pause > 10 * LOOK_SECONDS:
            self._moved_at += (
                pause  # this process stood still as a whole (Ctrl-Z, a machine that slept): nobody's fault
            )
            return
        mark = self._ranks.progress.mark
        if mark is not self._mark:
            self._mark, self._moved_at = mark, now
        if self._parent is not None and os.getppid() != self._parent:
            self._parent = None
            self._ranks.stop.ask("the launcher is gone")
        stood_still = now - self._moved_at
        # one that leaves by itself has files to close, and a checkpoint to write to its end
        is_leaving = self._ranks.progress.is_leaving and stood_still <= self._silence_seconds
        if self._beats is not None and self._beats.verdict is not None and not is_leaving:
            self._finish(self._beats.verdict)
        elif self._beats is not None and not is_leaving and stood_still > FAILED_SECONDS and self._has_one_failed(now):
            self._conclude(self.exit_code_of_gone(), f"error: {self._describe_gone(self._silence_seconds)}")
        elif mark.is_watched:
            first = 0.0 if mark.phase in self._ranks.progress.known_phases else FIRST_USE_SECONDS
            # Asked first: a rank that is gone explains why this one stands still.
            if self._beats is not None and stood_still > self._silence_seconds and self._is_alone(now):
                self._conclude(self.exit_code_of_gone(), f"error: {self._describe_gone(self._silence_seconds)}")
            elif stood_still > self._hang_seconds + first:
                self._conclude(ExitCode.HANG, self._describe_hang())

    def _has_one_failed(self, now: float) -> bool:
        """Whether a rank has left for a reason of its own, so long ago that the backend would have told this one."""
        assert self._beats is not None
        return any(
            beat.has_failed and now - heard_at > FAILED_SECONDS
            for rank, (beat, heard_at) in list(self._beats.heard.items())
            if rank != self._ranks.rank
        )

    def _is_alone(self, now: float) -> bool:
        """Whether a rank has left, or has been silent for so long that it is gone."""
        assert self._beats is not None
        if now - self._beats.last_exchange > self._silence_seconds:
            return True
        return any(
            beat.has_failed or (now - heard_at > self._silence_seconds and not beat.left)
            for rank, (beat, heard_at) in list(self._beats.heard.items())
            if rank != self._ranks.rank
        )

    def _describe_gone(self, silence_seconds: float) -> str:
        assert self._beats is not None
        now = time.monotonic()
        told = []
        for rank, (beat, heard_at) in sorted(self._beats.heard.items()):
            if rank == self._ranks.rank or (beat.left and not beat.has_failed):
                continue
            if beat.has_failed:
                told.append(f"rank {rank} has left at {beat}: {beat.left}")
            elif now - heard_at > silence_seconds and now - self._beats.last_exchange < silence_seconds:
                told.append(f"rank {rank}, last heard of {now - heard_at:.0f} s ago at {beat}")
        if not told and now - self._beats.last_exchange >= silence_seconds:
            keeper = self._beats.heard.get(0)
            at = f", last heard of {now - keeper[1]:.0f} s ago at {keeper[0]}" if keeper and self._ranks.rank else ""
            told.append(f"rank 0, or the process that keeps the ranks' store{at}")
        return "another rank is gone" + (": " + "; ".join(told) if told else "")

    def _describe_hang(self) -> str:
        """Who lags behind, and where the others wait."""
        minutes = self._own_age() / 60
        places = {self._ranks.rank: self._own_beat(), **self._others()}
        least = min(beat.count for beat in places.values())
        behind = [rank for rank, beat in places.items() if beat.count == least]
        if len(behind) == len(places) and len(places) > 1:
            who = f"all ranks are at {places[0]}: a collective, the network or the file system does not come back"
        else:
            lagging = max(behind, key=lambda rank: places[rank].age_seconds)
            who = f"rank {lagging} lags: {places[lagging]}, for {places[lagging].age_seconds / 60:.1f} min"
            rest = [rank for rank in places if rank not in behind]
            if rest:
                who += f"; the others wait at {places[rest[0]].phase} of step {places[rest[0]].step}"
        return (
            f"error: hang: nothing has moved for {minutes:.1f} min. {who[0].upper()}{who[1:]}. The stacks of all "
            f"threads are in {self._stacks_path.parent}. Continue with train.resume=auto; where one phase of a step "
            "may take longer, raise train.hang_timeout_minutes"
        )

    def _own_beat(self) -> Beat:
        mark = self._mark
        samples = tuple(mark.named_samples())
        return Beat(0, mark.count, mark.step, mark.phase, mark.is_watched, samples, len(mark.samples), self._own_age())

    def _conclude(self, code: ExitCode, text: str) -> None:
        """Tell all ranks to end, and end; the first to say so is the one that all follow."""
        verdict = Verdict(int(code), text, self._ranks.rank)
        if self._beats is not None:
            self._beats.propose(verdict)
            deadline = time.monotonic() + 5 * self._beats.interval
            while self._beats.verdict is None and time.monotonic() < deadline:
                time.sleep(0.1)
            verdict = self._beats.verdict or verdict
        self._finish(verdict)

    def _finish(self, verdict: Verdict) -> None:
        """Write the stacks, say why, give the others the time to hear of it, and end the process."""
        self._closing.set()
        self._dump_stacks()
        is_teller = verdict.rank == self._ranks.rank
        _say(
            verdict.text if is_teller else f"rank {self._ranks.rank} ends with the others, as rank {verdict.rank} says"
        )
        if self._beats is not None:
            self._beats.leave(ENDED, and_end=False)
            # rank 0 keeps the store, without which the others do not hear the verdict
            deadline = time.monotonic() + (5 * self._beats.interval if self._ranks.is_main else 0.0)
            while time.monotonic() < deadline and not self._have_all_left():
                time.sleep(0.2)
        self._end(verdict.exit_code)

    def _have_all_left(self) -> bool:
        others = self._others()
        now = time.monotonic()
        assert self._beats is not None
        return all(
            beat.left or now - self._beats.heard[rank][1] > self._silence_seconds for rank, beat in others.items()
        )

    def _dump_stacks(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stacks_path.parent.mkdir(parents=True, exist_ok=True)
            with self._stacks_path.open("w", encoding="utf-8") as file:
                file.write(f"rank {self._ranks.rank} at {self._mark}, for {self._own_age():.0f} s\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        with contextlib.suppress(OSError, ValueError):
            _say(f"rank {self._ranks.rank} at {self._mark}; its stacks:")
            faulthandler.dump_traceback(2, all_threads=True)


def _say(text: str) -> None:
    """Tell the user from a thread."""
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()
