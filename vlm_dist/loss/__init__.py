"""The one truth for the loss: a sum over target tokens, in float32.

A step's loss is this sum over all micro-batches of all ranks, divided by the step's number of target tokens (the
engine divides). So the gradient does not depend on how the step was cut.
"""

from vlm_dist.loss.cross_entropy import token_loss_sum
from vlm_dist.loss.groups import TokenGroups
from vlm_dist.loss.labelled import LabelledHead

__all__ = ["LabelledHead", "TokenGroups", "token_loss_sum"]
