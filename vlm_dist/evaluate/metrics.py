"""The metrics of generated answers: a table by name.

Two kinds. A *mean* has a score of each answer, the best over its references, and is their mean. A *corpus metric*, of
torchmetrics, is not a mean of scores: BLEU counts n-grams over all answers. It is computed over all answers at once,
and over each answer alone for the score that stands beside it in the file of predictions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from vlm_dist.config.answer_metrics import ANSWER_METRICS
from vlm_dist.evaluate.matching import anls, exact_match, relaxed_match

#: An answer, and the references that it may match.
Pair = tuple[str, Sequence[str]]


class Metric(Protocol):
    """How good answers are."""

    def score(self, pair: Pair) -> float | None:
        """Of one answer; None where it is not defined."""

    def figure(self, pairs: Sequence[Pair]) -> float:
        """Of all answers; NaN where it is not defined."""


@dataclass(frozen=True)
class Mean:
    """The mean of a score, the best over an answer's references.

    Attributes:
        of: answer, reference -> score.
    """

    of: Callable[[str, str], float]

    def score(self, pair: Pair) -> float | None:
        """See `Metric`."""
        answer, references = pair
        return max(self.of(answer, reference) for reference in references)

    def figure(self, pairs: Sequence[Pair]) -> float:
        """See `Metric`."""
        return math.fsum(self.score(pair) or 0.0 for pair in pairs) / len(pairs) if pairs else math.nan


@dataclass(frozen=True)
class Corpus:
    """A text metric of torchmetrics.

    Attributes:
        name: its class in `torchmetrics.text`.
        arguments: of the class.
        key: of its result, where that has several figures.
        per_answer: it takes one reference; of several that with the best score is taken.
        greater_is_better: of its scores.
        scale: that its figure is divided by.
    """

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    key: str | None = None
    per_answer: bool = False
    greater_is_better: bool = True
    scale: float = 1.0

    def score(self, pair: Pair) -> float | None:
        """See `Metric`."""
        value = self._compute([self._best_of(pair)])
        return value if math.isfinite(value) else None

    def figure(self, pairs: Sequence[Pair]) -> float:
        """See `Metric`."""
        return self._compute([self._best_of(pair) for pair in pairs]) if pairs else math.nan

    def _best_of(self, pair: Pair) -> Pair:
        answer, references = pair
        if not self.per_answer or len(references) == 1:
            return pair
        sign = 1 if self.greater_is_better else -1

        def worth(reference: str) -> float:
            value = sign * self._compute([(answer, [reference])])
            return -math.inf if math.isnan(value) else value

        return answer, [max(references, key=worth)]

    def _compute(self, pairs: Sequence[Pair]) -> float:
        import torchmetrics.text  # takes seconds

        # it would sum over all ranks by itself, and wait for them; here one process has all answers
        metric = getattr(torchmetrics.text, self.name)(**self.arguments, sync_on_compute=False)
        if self.name == "SQuAD":
            metric.update(*_as_squad(pairs))
        else:
            answers = [answer for answer, _ in pairs]
            metric.update(answers, [refs[0] if self.per_answer else list(refs) for _, refs in pairs])
        result = metric.compute()
        return float(result if self.key is None else result[self.key]) / self.scale


def _as_squad(pairs: Sequence[Pair]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Answers and references in the form of SQuAD."""
    answers = [{"prediction_text": answer, "id": str(i)} for i, (answer, _) in enumerate(pairs)]
    references = [
        {"answers": {"text": list(refs), "answer_start": [0] * len(refs)}, "id": str(i)}
        for i, (_, refs) in enumerate(pairs)
    ]
    return answers, references


def _rouge(key: str) -> Corpus:
    return Corpus("ROUGEScore", {"rouge_keys": key, "accumulate": "best"}, key=f"{key}_fmeasure")


def _errors(name: str, greater_is_better: bool = False) -> Corpus:
    return Corpus(name, per_answer=True, greater_is_better=greater_is_better)


#: By name. TER is left out: torchmetrics gives an empty answer no error. rougeLsum needs data from the network.
METRICS: dict[str, Metric] = {
    "exact_match": Mean(exact_match),
    "relaxed_match": Mean(relaxed_match),
    "anls": Mean(anls),
    "squad_f1": Corpus("SQuAD", key="f1", scale=100),
    "bleu": Corpus("BLEUScore"),
    "sacrebleu": Corpus("SacreBLEUScore"),
    "chrf": Corpus("CHRFScore"),
    "rouge1": _rouge("rouge1"),
    "rouge2": _rouge("rouge2"),
    "rougeL": _rouge("rougeL"),
    "wer": _errors("WordErrorRate"),
    "cer": _errors("CharErrorRate"),
    "mer": _errors("MatchErrorRate"),
    "wil": _errors("WordInfoLost"),
    "wip": _errors("WordInfoPreserved", greater_is_better=True),
    "eed": Corpus("ExtendedEditDistance", greater_is_better=False),
    "edit_distance": _errors("EditDistance"),
}
assert METRICS.keys() == ANSWER_METRICS.keys()


def scores(names: Sequence[str], pair: Pair) -> dict[str, float | None]:
    """Of one answer, by metric."""
    return {name: METRICS[name].score(pair) for name in names}


def figures(names: Sequence[str], pairs: Sequence[Pair]) -> Iterator[tuple[str, float]]:
    """Of all answers, by metric."""
    for name in names:
        yield name, METRICS[name].figure(pairs)
