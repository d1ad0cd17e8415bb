"""The composition root: the only reader of the whole config. Builds the parts in the order in which data flows.

sources -> processor -> materialiser -> lengths -> plan -> feed -> model -> engine -> checkpoint -> trainer
"""

from vlm_dist.build.data import (
    describe_plan,
    find_family,
    make_materialisers,
    make_plan,
    make_processor,
    open_sources_alone,
)
from vlm_dist.build.lengths import make_lengths, plans_by_length
from vlm_dist.build.run import RunParts, run_parts, train

__all__ = [
    "RunParts",
    "describe_plan",
    "find_family",
    "make_lengths",
    "make_materialisers",
    "make_plan",
    "make_processor",
    "open_sources_alone",
    "plans_by_length",
    "run_parts",
    "train",
]
