"""Evaluation on held-out data: the loss, and generated answers."""

from vlm_dist.evaluate.evaluator import Evaluator
from vlm_dist.evaluate.predictions import Prediction, normalise_answer

__all__ = ["Evaluator", "Prediction", "normalise_answer"]
