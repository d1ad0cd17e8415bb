"""Metrics of answers, against published examples and values that were worked out by hand."""

from __future__ import annotations

import math

import pytest

from vlm_dist.config.answer_metrics import ANSWER_METRICS, is_greater_better
from vlm_dist.evaluate.matching import anls, exact_match, normalise_answer, relaxed_match
from vlm_dist.evaluate.metrics import METRICS, Pair, figures, scores


def test_an_exact_match_is_of_case_and_space_alone() -> None:
    assert normalise_answer("  Ten\n  PAST two ") == normalise_answer("ten past Two") != normalise_answer("ten")
    assert (exact_match("Ten ", "ten"), exact_match("10", "ten")) == (1, 0)


@pytest.mark.parametrize(
    ("answer", "reference", "right"),
    [
        # the published examples: 5% off is right, more is not; percentages are shares; text is compared as it is
        ("100", "101", True),
        ("105", "100", True),
        ("94.9", "100", False),
        ("-95", "-100", True),
        ("12%", "0.12", True),
        ("12%", "12", False),
        ("Yes", "yes", True),
        ("0.0", "0", False),  # nothing is within 5% of 0
        ("0", "0", True),
        ("1,000", "1,000", True),  # as text
        ("1,001", "1,000", False),
        ("1000", "1,000", False),
        ("nan", "3", False),
    ],
)
def test_relaxed_accuracy(answer: str, reference: str, right: bool) -> None:
    assert relaxed_match(answer, reference) == right


def test_anls_has_a_threshold() -> None:
    assert anls("Coca Cola", "coca  cola") == 1
    assert anls("coca colas", "coca cola") == pytest.approx(0.9)
    assert anls("abcdefgh", "abcdxxxx") == 0  # half of it is wrong: not an error of reading any more
    assert anls("abcdefgh", "abcdexxx") == pytest.approx(0.625)
    assert anls("", "") == 1 and anls("", "a") == 0


def test_of_several_references_the_best_counts() -> None:
    pair: Pair = ("two hundred", ["200", "Two hundred", "two"])
    assert scores(["exact_match", "anls", "wer", "squad_f1", "cer"], pair) == {
        "exact_match": 1,
        "anls": 1,
        "wer": 1.0 / 2,  # of "Two hundred", which has another first letter
        "squad_f1": 1,
        "cer": pytest.approx(1 / 11),
    }


#: From the documentation of torchmetrics.
CATS: list[Pair] = [("the cat is on the mat", ["there is a cat on the mat", "a cat is on the mat"])]
SAMPLES: list[Pair] = [
    ("this is the prediction", ["this is the reference"]),
    ("there is an other sample", ["there is another one"]),
]


@pytest.mark.parametrize(
    ("name", "pairs", "value"),
    [
        ("bleu", CATS, 0.7598),
        ("sacrebleu", CATS, 0.7598),
        ("chrf", CATS, 0.8640),
        ("wer", SAMPLES, 0.5),
        ("cer", SAMPLES, 0.3415),
        ("mer", SAMPLES, 0.4444),
        ("wil", SAMPLES, 0.6528),
        ("wip", SAMPLES, 0.3472),
        ("eed", [*SAMPLES[:1], ("here is an other sample", ["here is another one"])], 0.3078),
        ("edit_distance", [("rain", ["shine"])], 3.0),
        ("rouge1", [("My name is John", ["Is your name John"])], 0.75),
        ("rouge2", [("My name is John", ["Is your name John"])], 0.0),
        ("rougeL", [("My name is John", ["Is your name John"])], 0.5),
        ("squad_f1", [("1976", ["1976"]), ("a cat", ["dog"])], 0.5),
    ],
)
def test_published_examples(name: str, pairs: list[Pair], value: float) -> None:
    assert METRICS[name].figure(pairs) == pytest.approx(value, abs=1e-4)


def test_a_corpus_metric_is_no_mean_of_scores() -> None:
    """One wrong word of four, and one of one: two of five, not the mean of a quarter and one."""
    pairs: list[Pair] = [("a b c x", ["a b c d"]), ("y", ["z"])]
    assert dict(figures(["wer"], pairs))["wer"] == pytest.approx(2 / 5)
    assert [scores(["wer"], pair)["wer"] for pair in pairs] == [0.25, 1]


def test_what_is_not_defined_is_no_number() -> None:
    assert scores(["wer"], ("a", [""])) == {"wer": None}
    for name in METRICS:
        assert math.isnan(METRICS[name].figure([]))


def test_each_metric_knows_its_direction() -> None:
    for name, metric in METRICS.items():
        right, wrong = (
            metric.figure([(answer, ["one two three four five"])])
            for answer in ("one two three four five", "something else")
        )
        assert (right > wrong) is ANSWER_METRICS[name], name
    assert not is_greater_better("eval_loss") and not is_greater_better("images/wer")
    assert is_greater_better("eval_anls") and is_greater_better("eval_images/rougeL")
