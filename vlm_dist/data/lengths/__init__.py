"""How long and how costly samples will be: estimated from facts, or counted exactly."""

from vlm_dist.data.lengths.costs import Costs, LengthModel
from vlm_dist.data.lengths.estimate import FactLengths

__all__ = ["Costs", "FactLengths", "LengthModel"]
