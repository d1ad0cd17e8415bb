"""A report: all that a page or a terminal shows of some runs."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from vlm_dist.report.answers import Answers, choose_answers
from vlm_dist.report.comparison import Row, differing_settings, final_figures
from vlm_dist.report.curves import Chart, make_charts
from vlm_dist.report.happenings import CheckpointRow, Happening, checkpoint_rows, happenings_of
from vlm_dist.report.pictures import Shots, Wanted, take_pictures
from vlm_dist.report.run_files import RunRecord, read_runs
from vlm_dist.report.skipped import Skipped, SkippedSample, count_skipped
from vlm_dist.report.state import State, state_of

_NUM_PROCESSES = 4


@dataclass
class RunView:
    """One run as it is shown.

    Attributes:
        record: as read.
        state: of it.
        happenings: in order.
        checkpoints: by step.
        skipped: samples that could not be used.
        answers: some of the last evaluation.
    """

    record: RunRecord
    state: State
    happenings: list[Happening]
    checkpoints: list[CheckpointRow]
    skipped: Skipped
    answers: Answers | None


@dataclass
class Report:
    """What is shown.

    Attributes:
        views: of the runs, in the order of the command line.
        charts: of all runs.
        figures: final ones, a cell per run.
        differing: settings that differ, a cell per run.
        shots: pictures of samples, by what they were wanted for.
    """

    views: list[RunView]
    charts: list[Chart]
    figures: list[Row]
    differing: list[Row]
    shots: dict[Wanted, Shots] = field(default_factory=dict)

    @property
    def records(self) -> list[RunRecord]:
        """Of the runs."""
        return [view.record for view in self.views]


def make_report(paths: Sequence[Path], *, with_pictures: bool = True) -> Report:
    """Read runs and gather what is shown of them.

    Args:
        paths: their directories; one that is named twice counts once.
        with_pictures: of skipped samples and of answers, where their media can be read.

    Raises:
        DataError: a directory is no run, or cannot be read.
    """
    unique = list({path.resolve(): path for path in paths}.values())
    records = read_runs(unique)
    views = [
        RunView(
            record,
            state_of(record),
            happenings_of(record),
            checkpoint_rows(record),
            count_skipped(record.quarantine),
            choose_answers(record),
        )
        for record in records
    ]
    report = Report(
        views,
        make_charts(records),
        final_figures(records),
        differing_settings([record.config for record in records]) if len(records) > 1 else [],
    )
    if with_pictures:
        with ThreadPoolExecutor(_NUM_PROCESSES) as pool:  # each waits for a process
            for shots in pool.map(
                lambda number: take_pictures(records[number], number, _wanted(views[number], number)), range(len(views))
            ):
                report.shots |= shots
    return report


def _wanted(view: RunView, number: int) -> list[Wanted]:
    samples: list[SkippedSample] = view.skipped.shown
    wanted = [Wanted(number, one.purpose, one.source, one.shard, one.key) for one in samples]
    for answer in view.answers.shown if view.answers is not None else ():
        wanted.append(Wanted(number, "eval", answer.source, answer.shard, answer.key))
    return list(dict.fromkeys(wanted))
