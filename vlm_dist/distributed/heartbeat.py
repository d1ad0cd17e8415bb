"""What the ranks tell each other about where they are, beside all collectives: over the store that they met at.

A thread posts this rank's place under a key of its own and reads the others'. It has a connection of its own, so that
nobody waits for it; and it may itself wait for ever on a network that is cut: whoever judges (`watchdog`) looks at when
it was last through.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta

from torch.distributed import distributed_c10d as c10d

from vlm_dist.distributed.group import Ranks
from vlm_dist.distributed.progress import describe_place

#: Between two exchanges with up to so many ranks; more ranks wait longer, as rank 0's machine answers all of them.
INTERVAL_SECONDS = 1.0
RANKS_PER_INTERVAL = 32

#: What a rank says last that has not failed by itself.
ENDED = "ended"

_STORE_TIMEOUT = timedelta(seconds=20)
_NO_VERDICT = "-"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Beat:
    """One rank's place.

    Attributes:
        number: of the beat; one that stays the same is that of a process which is gone or stands still.
        count: marks that the rank has made, which all ranks make in the same order.
        step: steps that are done; -1: before the first.
        phase: see `progress.Mark`.
        is_watched: the phase has a limit.
        samples: the first few of the micro-batch.
        num_samples: how many it has.
        age_seconds: how long the rank has been there, by its own monotonic clock.
        left: its last word; "": it is there.
        exit_code: it leaves with that one, where it has failed by itself.
    """

    number: int
    count: int
    step: int
    phase: str
    is_watched: bool
    samples: tuple[str, ...]
    num_samples: int
    age_seconds: float
    left: str = ""
    exit_code: int = 0

    @property
    def has_failed(self) -> bool:
        """Whether the rank has left for a reason of its own."""
        return self.left not in ("", ENDED)

    def __str__(self) -> str:
        return describe_place(self.step, self.phase, self.samples, self.num_samples)


@dataclass(frozen=True)
class Verdict:
    """Why all ranks are to end.

    Attributes:
        exit_code: of all of them.
        text: for the user.
        rank: the one that says it.
    """

    exit_code: int
    text: str
    rank: int


class Heartbeats:
    """Posts and reads beats in a thread.

    Args:
        ranks: this process among its peers; at least two.
        own_age: how long this rank has been at its mark, in seconds.

    Attributes:
        heard: rank -> newest beat, and when it was new, in monotonic seconds of this process.
        last_exchange: when the store last answered.
        verdict: that all are to end, once a rank has said so.
    """

    def __init__(self, ranks: Ranks, own_age: Callable[[], float]) -> None:
        self._ranks = ranks
        self._own_age = own_age
        self.interval = INTERVAL_SECONDS * max(1.0, ranks.world_size / RANKS_PER_INTERVAL)
        self.heard: dict[int, tuple[Beat, float]] = {}
        self.verdict: Verdict | None = None
        self.last_exchange = time.monotonic()
        self._number = 0
        self._left = ""
        self._exit_code = 0
        self._proposed: Verdict | None = None
        self._is_told = threading.Event()  # the last word is out
        self._wake = threading.Event()
        self._closing = False
        store = c10d._get_default_store().clone()
        store.set_timeout(_STORE_TIMEOUT)
        self._store = c10d.PrefixStore("vlm_dist_heartbeat", store)
        self._keys = [f"beat-{rank}" for rank in range(ranks.world_size)]

    def start(self) -> None:
        """Begin. Collective: every rank calls this."""
        if self._ranks.is_main:
            self._store.set("verdict", _NO_VERDICT)
        self._store.set(self._keys[self._ranks.rank], self._beat())
        self._ranks.barrier()  # all keys are there
        self._exchange()
        threading.Thread(target=self._run, name="heartbeat", daemon=True).start()

    def propose(self, verdict: Verdict) -> None:
        """Have all ranks end for this reason, unless another has said another."""
        self._proposed = verdict
        self._wake.set()

    def leave(self, last_word: str, exit_code: int = 0, *, and_end: bool = True, wait_seconds: float = 3.0) -> None:
        """Tell the others that this rank leaves; gives up where the store does not answer.

        Args:
            last_word: `ENDED`, or what has failed.
            exit_code: of this rank, where it has failed.
            and_end: the thread ends, too.
            wait_seconds: the most that it may take.
        """
        self._exit_code = exit_code
        self._left = last_word
        self._closing = and_end
        self._is_told.clear()
        self._wake.set()
        self._is_told.wait(wait_seconds)

    def _run(self) -> None:
        is_last = False
        while not is_last:
            self._wake.wait(self.interval)
            self._wake.clear()
            is_last = self._closing
            try:
                self._exchange()
            except (RuntimeError, ValueError) as error:  # the store is gone; who judges notices by `last_exchange`
                log.debug("heartbeat: %s", error)
            if self._left:
                self._is_told.set()

    def _exchange(self) -> None:
        self._store.set(self._keys[self._ranks.rank], self._beat())
        if self._proposed is not None:
            self._store.compare_set("verdict", _NO_VERDICT, json.dumps(asdict(self._proposed)))
        *beats, verdict = self._store.multi_get([*self._keys, "verdict"])
        now = time.monotonic()
        self.last_exchange = now
        for rank, told in enumerate(beats):
            beat = _read_beat(told)
            if rank not in self.heard or self.heard[rank][0].number != beat.number:
                self.heard[rank] = (beat, now)
        if verdict.decode() != _NO_VERDICT:
            self.verdict = Verdict(**json.loads(verdict))

    def _beat(self) -> str:
        mark = self._ranks.progress.mark
        self._number += 1
        beat = Beat(
            self._number,
            mark.count,
            mark.step,
            mark.phase,
            mark.is_watched,
            tuple(mark.named_samples()),
            len(mark.samples),
            round(self._own_age(), 1),
            self._left,
            self._exit_code,
        )
        return json.dumps(asdict(beat))


def _read_beat(told: bytes) -> Beat:
    content = json.loads(told)
    return Beat(**{**content, "samples": tuple(content["samples"])})
