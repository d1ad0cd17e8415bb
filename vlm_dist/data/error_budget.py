"""When so many samples cannot be used that a run should rather end: counted over all ranks, decided by all alike."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

#: The share is of so many samples, the last ones of all ranks; a younger run is measured by as many.
WINDOW_SAMPLES = 1000

#: Damage. A sample that is too long, or over its pack's budget, is sound: the settings leave it out.
BAD_CLASSES = ("decode", "bad_sample", "timeout", "crash")


@dataclass(frozen=True, slots=True)
class Overdrawn:
    """A budget that is used up; the same on every rank.

    Attributes:
        by_class: unusable samples of the window, by class.
        num_samples: samples of the window, the usable ones too.
        max_share: what is allowed.
    """

    by_class: Mapping[str, int]
    num_samples: int
    max_share: float

    def message(self, examples: Sequence[str]) -> str:
        """What is wrong, where, and what to do.

        Args:
            examples: some unusable samples, of any rank, as `<source>/<file>:<key or line>`.
        """
        counts = ", ".join(f"{count} {name}" for name, count in self.by_class.items() if count)
        shown = "".join(f"\n  {example}" for example in examples)
        # only tars can be verified; of other sources each name above is a place in a file
        find = "`vlm-dist shards verify --decode` finds the others before a run does. "
        find_others = find if any(".tar:" in example for example in examples) else ""
        return (
            f"{sum(self.by_class.values())} of the last {self.num_samples} samples of all ranks cannot be used "
            f"({counts}), more than data.max_bad_share {self.max_share:g} allows{shown}\n"
            "quarantine/rank-*.jsonl in output_dir names all of them, with file and line or key "
            f"(`vlm-dist quarantine OUTPUT_DIR` sums them up). {find_others}"
            "Mend the data, or raise data.max_bad_share; then continue with train.resume=auto"
        )


@dataclass(slots=True)
class ErrorBudget:
    """Counts the samples of the last steps.

    It begins empty, also in a run that is continued. Fewer than `max_share` x 1000 unusable samples end no run, however
    short it is, but with a share of 0, where the first one does.

    Args:
        max_share: of the samples that may be unusable; 1: all of them.
    """

    max_share: float
    _window: deque[tuple[int, Counter[str]]] = field(default_factory=deque)
    _num_samples: int = 0

    def add(self, totals: Mapping[str, int]) -> Overdrawn | None:
        """Count one step.

        Args:
            totals: of all ranks: `num_samples`, and `null_<class>` per class.

        Returns:
            The overdrawn budget, or None.
        """
        nulls = {name.removeprefix("null_"): count for name, count in totals.items() if name.startswith("null_")}
        nulls.pop("tail", None)  # no sample is behind these
        num_samples = totals["num_samples"] + sum(nulls.values())
        self._window.append((num_samples, Counter({name: nulls.get(name, 0) for name in BAD_CLASSES})))
        self._num_samples += num_samples
        while self._num_samples - self._window[0][0] >= WINDOW_SAMPLES:
            self._num_samples -= self._window.popleft()[0]
        bad = sum((counts for _, counts in self._window), Counter())
        allowed = self.max_share * max(self._num_samples, WINDOW_SAMPLES)
        if self.max_share >= 1 or bad.total() <= allowed:
            return None
        return Overdrawn({name: bad[name] for name in BAD_CLASSES}, self._num_samples, self.max_share)
