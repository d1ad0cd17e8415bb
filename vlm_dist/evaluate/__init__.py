"""Evaluation on held-out data: the loss, and generated answers."""

from vlm_dist.evaluate.evaluator import Evaluator, distinct_names
from vlm_dist.evaluate.predictions import Prediction, normalise_answer

__all__ = ["Evaluator", "Prediction", "distinct_names", "normalise_answer"]
