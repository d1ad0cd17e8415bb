"""The metrics of generated answers by name, and what is better of each; `vlm_dist.evaluate.metrics` computes them."""

from __future__ import annotations

#: Name -> whether more of it is better. All lie between 0 and 1, but for error rates, which may be larger, and
#: edit_distance, which counts characters.
ANSWER_METRICS: dict[str, bool] = {
    "exact_match": True,
    "relaxed_match": True,
    "anls": True,
    "squad_f1": True,
    "bleu": True,
    "sacrebleu": True,
    "chrf": True,
    "rouge1": True,
    "rouge2": True,
    "rougeL": True,
    "wer": False,
    "cer": False,
    "mer": False,
    "wil": False,
    "wip": True,
    "eed": False,
    "edit_distance": False,
}

#: Hugging Face's prefix of an evaluation's figures.
EVAL_PREFIX = "eval_"

#: What the figures over all held-out samples are called, beside those of each source.
OVERALL = "overall"


def figure_of(metric: str) -> str:
    """The figure that `metric_for_best_model` goes by: `loss` of `eval_loss` and of `images/loss`."""
    return metric.rpartition("/")[2].removeprefix(EVAL_PREFIX)


def is_greater_better(metric: str) -> bool:
    """Which of two values of a metric, as `metric_for_best_model` names it, is the better one."""
    figure = figure_of(metric)
    return ANSWER_METRICS.get(figure, figure != "loss")
