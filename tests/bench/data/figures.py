"""Which figures there are: what each loader is asked, in which order, and what the answers come to."""

from __future__ import annotations

import statistics
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.bench.data.processes import LoaderProcess, MeasureError
from tests.bench.data.task import GLOBAL_BATCH_SIZE, Task

OURS = "ours"
PEERS = ("webdataset", "energon", "streaming", "hf_datasets")
#: A peer with a decoder that its documentation does not have; of interest where pixels count.
TUNED = "webdataset_tuned"
POSITIONS = {"1%": 0.01, "50%": 0.5, "99%": 0.99}

AIM_RAW_RATIO = 8.0  # x webdataset
AIM_TRAIN_RATIO = 1.5  # x the best peer
AIM_RESUME_SPREAD = 1.3  # slowest over fastest position


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is measured.

    Attributes:
        rounds: measurements of each figure and loader.
        raw_seconds: of one measurement of reading.
        seconds: of one measurement of decoding or of training batches.
        memory_samples: read by the measurement of memory.
    """

    rounds: int
    raw_seconds: float
    seconds: float
    memory_samples: int


FULL_SCALE = Scale(rounds=5, raw_seconds=0.3, seconds=0.8, memory_samples=10_000)
QUICK_SCALE = Scale(rounds=1, raw_seconds=0.1, seconds=0.3, memory_samples=512)


@dataclass(frozen=True, slots=True)
class Question:
    """One figure of one loader.

    Attributes:
        key: of the figure.
        what: the runner does.
        task: of the runner.
        one_core: the process is kept on one core.
    """

    key: str
    what: str
    task: Task
    one_core: bool = False


@dataclass(slots=True)
class Answers:
    """All measurements.

    Attributes:
        values: (figure, loader) -> one value per round.
        failures: (figure, loader) -> why there are none.
        points: loader -> (samples, resident MiB, the same with shared pages counted once), as samples go by.
        ready: loader -> what it says of itself.
    """

    values: dict[tuple[str, str], list[float]] = field(default_factory=lambda: defaultdict(list))
    failures: dict[tuple[str, str], str] = field(default_factory=dict)
    points: dict[str, list[tuple[int, float, float]]] = field(default_factory=dict)
    ready: dict[str, dict[str, Any]] = field(default_factory=dict)

    def median(self, key: str, loader: str) -> float | None:
        """The middle of the rounds; None where nothing was measured."""
        values = self.values.get((key, loader))
        return statistics.median(values) if values else None

    def spread(self, key: str, loader: str) -> float:
        """(Largest - smallest) / median."""
        values = self.values[key, loader]
        return (max(values) - min(values)) / statistics.median(values)

    def ratio(self, key: str, peer: str, lower_is_better: bool = False) -> float | None:
        """How many times as good ours is: the median over the rounds, in each of which both were measured in turn."""
        pairs = zip(self.values.get((key, OURS), ()), self.values.get((key, peer), ()), strict=False)
        ratios = [theirs / ours if lower_is_better else ours / theirs for ours, theirs in pairs]
        return statistics.median(ratios) if ratios else None


def questions(sets: Sequence[tuple[str, Path, int]], processor: str, scale: Scale) -> list[Question]:
    """List what is asked in every round.

    Args:
        sets: label, folder and number of samples of each set of pictures, small pictures first.
        processor: its directory.
        scale: how much is measured.
    """
    found: list[Question] = []
    for label, folder, num_samples in sets:
        task = Task(str(folder), num_samples, processor, scale.seconds)
        raw = Task(str(folder), num_samples, processor, scale.raw_seconds)
        found.append(Question(f"raw read/{label}", "raw", raw, one_core=True))
        found.append(Question(f"decode and resize/{label}", "decode", task, one_core=True))
        found.append(Question(f"training batches/{label}", "train", task, one_core=True))
    label, folder, num_samples = sets[0]
    two = Task(str(folder), num_samples, processor, 2 * scale.seconds, num_workers=2)
    found.append(Question(f"training batches, 2 workers/{label}", "train", two))
    found.append(Question("first batch", "first", Task(str(folder), num_samples, processor)))
    for name, start in _starts(num_samples):
        found.append(Question(f"resume/{name}", "first", Task(str(folder), num_samples, processor, start=start)))
    return found


def _starts(num_samples: int) -> Iterator[tuple[str, int]]:
    for name, share in POSITIONS.items():
        yield name, max(1, round(num_samples * share / GLOBAL_BATCH_SIZE)) * GLOBAL_BATCH_SIZE


def ask_all(loaders: Sequence[str], asked: Sequence[Question], scale: Scale, memory: Task, log: Path) -> Answers:
    """Measure everything: in every round, every figure of every loader in turn.

    A loader that cannot do something is left out of that figure, with its reason.
    """
    answers = Answers()
    for number in range(scale.rounds):
        print(f"round {number + 1} of {scale.rounds} ...", file=sys.stderr, flush=True)
        # a fresh process per round, so that start-up is measured as often as the rest
        processes = _start(loaders, answers, log)
        try:
            if number == 0:
                _prepare(processes, asked, memory, answers)
            for question in asked:
                for process in processes.values():
                    _ask(process, question, answers)
            if number == 0:
                for name, process in processes.items():
                    if name != TUNED:
                        _ask_memory(name, process, memory, answers)
        finally:
            for process in processes.values():
                process.close()
    return answers


def _start(loaders: Sequence[str], answers: Answers, log: Path) -> dict[str, LoaderProcess]:
    processes = {}
    for name in loaders:
        try:
            processes[name] = process = LoaderProcess(name, log)
        except MeasureError as error:
            if name == OURS:
                raise
            answers.failures["imports", name] = str(error)
            continue
        answers.ready[name] = process.ready
        if name != TUNED:
            answers.values["imports", name].append(process.ready["import_seconds"])
    return processes


def _prepare(processes: dict[str, LoaderProcess], asked: Sequence[Question], memory: Task, answers: Answers) -> None:
    for name, process in processes.items():
        folders = {question.task.pictures: question.task for question in asked} | {memory.pictures: memory}
        for task in folders.values():
            process.do("prepare", task, limit_seconds=300)
        for question in asked:
            if question.task.start and name != TUNED:
                try:
                    process.do("save_state", question.task, limit_seconds=300)
                except MeasureError as error:
                    answers.failures[question.key, name] = str(error)


def _ask(process: LoaderProcess, question: Question, answers: Answers) -> None:
    place = question.key, process.name
    is_other = question.what in ("raw", "first") or question.task.num_workers > 0
    if place in answers.failures or (process.name == TUNED and is_other):
        return
    try:
        found = process.do(question.what, question.task, one_core=question.one_core)
    except MeasureError as error:
        if process.name == OURS:
            raise
        answers.failures[place] = str(error)
        answers.values.pop(place, None)
        return
    answers.values[place].append(found["rate"] if "rate" in found else found["seconds"])


def _ask_memory(name: str, process: LoaderProcess, task: Task, answers: Answers) -> None:
    try:
        answers.points[name] = process.do("memory", task, limit_seconds=240)["points"]
    except MeasureError as error:
        if name == OURS:
            raise
        answers.failures["memory", name] = str(error)


def slope(points: Sequence[tuple[int, float, float]]) -> float:
    """MiB per 1000 samples, by least squares over the later three quarters: at first every loader fills its buffers."""
    later = points[len(points) // 4 :]
    if len(later) < 2:
        return 0.0
    fit = statistics.linear_regression([one[0] / 1000 for one in later], [one[1] for one in later])
    return fit.slope
