"""Evaluation on held-out data: the loss, and metrics of generated answers."""

from vlm_dist.evaluate.early_stopping import EarlyStopping
from vlm_dist.evaluate.evaluator import Evaluator
from vlm_dist.evaluate.matching import normalise_answer
from vlm_dist.evaluate.predictions import Prediction, write_predictions
from vlm_dist.evaluate.walk import distinct_names

__all__ = ["EarlyStopping", "Evaluator", "Prediction", "distinct_names", "normalise_answer", "write_predictions"]
