"""Some of the answers that the model gave in the last evaluation: right ones and wrong ones."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlm_dist.config.answer_metrics import ANSWER_METRICS
from vlm_dist.report.lines import as_number
from vlm_dist.report.run_files import RunRecord

#: Of either kind.
MAX_SHOWN = 8
_MAX_TEXT = 1200
#: What an answer is judged by, the first that it has: right where it is 1.
_JUDGES = ("match", "exact_match", "relaxed_match")
#: By another metric, it is right on this side.
_HALF = 0.5


@dataclass(frozen=True)
class Answer:
    """One answer.

    Attributes:
        source: name of its source.
        shard: file that the sample lies in.
        key: its name there.
        prompt: what was asked.
        prediction: what the model said.
        reference: what is right.
        is_right: whether they match, as far as the file says.
        scores: further figures of it, as text.
    """

    source: str
    shard: str
    key: str
    prompt: str
    prediction: str
    reference: str
    is_right: bool
    scores: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Answers:
    """Of one evaluation.

    Attributes:
        step: at which it took place.
        num_all: answers in the file.
        num_right: of them.
        criterion: what counts as right, in words.
        wrong: some.
        right: some.
    """

    step: int
    num_all: int
    num_right: int
    criterion: str
    wrong: tuple[Answer, ...]
    right: tuple[Answer, ...]

    @property
    def shown(self) -> tuple[Answer, ...]:
        """All that are shown."""
        return (*self.wrong, *self.right)


def choose_answers(run: RunRecord) -> Answers | None:
    """Some wrong and some right ones, the same at each call; None without any evaluation of answers."""
    if run.predictions_step is None or not run.predictions:
        return None
    judge = _judge(run.predictions)
    answers = [_answer(row, judge) for row in run.predictions]
    right = [one for one in answers if one.is_right]
    wrong = [one for one in answers if not one.is_right]
    draw = random.Random(run.predictions_step)  # noqa: S311 - a choice of examples
    chosen = [tuple(draw.sample(group, min(len(group), MAX_SHOWN))) for group in (wrong, right)]
    return Answers(run.predictions_step, len(answers), len(right), _criterion(judge), chosen[0], chosen[1])


def _judge(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """By which figure answers are judged; None where they have none."""
    names = (*_JUDGES, *ANSWER_METRICS)
    return next((name for name in names if any(as_number(_plain(row.get(name))) is not None for row in rows)), None)


def _is_right(row: Mapping[str, Any], judge: str | None) -> bool:
    value = as_number(_plain(row.get(judge))) if judge is not None else None
    if value is None or judge is None:
        return False
    if judge in _JUDGES:
        return value >= 1
    return value >= _HALF if ANSWER_METRICS[judge] else value <= _HALF


def _criterion(judge: str | None) -> str:
    if judge is None:
        return "the file does not say which are right"
    if judge in _JUDGES:
        return "exact match" if judge == "match" else judge.replace("_", " ")
    return f"{judge} of at {'least' if ANSWER_METRICS[judge] else 'most'} {_HALF}"


def _plain(value: Any) -> Any:
    return int(value) if isinstance(value, bool) else value


def _answer(row: Mapping[str, Any], judge: str | None) -> Answer:
    def text(*names: str) -> str:
        value = next((row[name] for name in names if row.get(name) is not None), "")
        said = " | ".join(map(str, value)) if isinstance(value, list) else str(value)
        return said if len(said) <= _MAX_TEXT else f"{said[: _MAX_TEXT - 1]}…"

    scores = tuple((name.replace("_", " "), f"{number:.3g}") for name, number in _scores(row).items())
    return Answer(
        text("source"),
        text("shard"),
        text("key"),
        text("prompt", "question"),
        text("prediction", "answer"),
        text("references", "reference"),
        _is_right(row, judge),
        scores,
    )


def _scores(row: Mapping[str, Any]) -> dict[str, float]:
    found = {name: as_number(row.get(name)) for name in ANSWER_METRICS}
    return {name: value for name, value in found.items() if value is not None}
