"""One start of a run, from its first word to its last, as its directory tells of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from vlm_dist.config.masking import masked
from vlm_dist.distributed.group import Ranks
from vlm_dist.distributed.signals import AskedToStop
from vlm_dist.errors import ExitCode, VlmDistError
from vlm_dist.observability.events import EventLog, add_life
from vlm_dist.observability.surroundings import process_facts, rank_facts


class RunLife:
    """Writes down that a run started, where, and how it ended.

    Nothing is written before `begin`: a run that is refused leaves the directory of the one before alone.

    Args:
        output_dir: of the run.
        ranks: this process among its peers; only rank 0 writes.
    """

    def __init__(self, output_dir: Path, ranks: Ranks) -> None:
        self._output_dir = output_dir
        self._ranks = ranks
        self._events = EventLog(output_dir)
        self._is_open = False
        self.step: int | None = None

    def begin(self, step: int, **fields: Any) -> None:
        """Write `started`. Collective: every rank calls this.

        Args:
            step: steps that are done.
            fields: of the event; what is None is left out.
        """
        per_rank = self._ranks.gather_objects(rank_facts())
        self.step = step
        if not self._ranks.is_main:
            return
        told = {name: value for name, value in fields.items() if value is not None}
        me = process_facts()
        life = add_life(
            self._output_dir,
            {**me, "world_size": self._ranks.world_size, "step": step, "devices": grouped(per_rank), **told},
        )
        known = {name: me[name] for name in ("host", "pid", "process_started")}
        self._events.write("started", step, life=life, world_size=self._ranks.world_size, **known, **told)
        self._is_open = True

    def done(self, step: int, adapter: object) -> None:
        """The last step is done, and the adapter is published."""
        self._end("done", step, adapter=str(adapter))

    def stopped(self, step: int, reason: str) -> None:
        """It stops before its last step, as it was told to."""
        signal = self._ranks.stop.signal
        self._end("stopped", step, reason=reason, signal=signal.name if signal is not None else None)

    def _end(self, event: str, step: int | None, **fields: Any) -> None:
        if self._is_open:
            self._is_open = False
            self._events.write(event, step, **fields)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            return
        if isinstance(error, AskedToStop | KeyboardInterrupt):
            self.stopped(self.step or 0, "asked at start-up" if isinstance(error, AskedToStop) else "at once")
            return
        code = error.exit_code if isinstance(error, VlmDistError) else ExitCode.FAILURE
        self._end("failed", None, error=type(error).__name__, message=masked(str(error)), exit_code=int(code))


def grouped(facts: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Equal facts once, with the `ranks` that have them.

    Args:
        facts: of each rank, in rank order.
    """
    groups: list[dict[str, Any]] = []
    for rank, own in enumerate(facts):
        same = next((group for group in groups if all(group.get(name) == own[name] for name in own)), None)
        if same is None:
            groups.append({**own, "ranks": [rank]})
        else:
            same["ranks"].append(rank)
    return groups
