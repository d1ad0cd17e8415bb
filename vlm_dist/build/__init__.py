"""The composition root: the only reader of the whole config. Builds the parts in the order in which data flows.

sources -> plan -> processor -> materialiser -> feed -> model -> engine -> checkpoint -> trainer
"""

from vlm_dist.build.data import make_materialisers, make_plan, make_processor, open_sources_alone
from vlm_dist.build.run import RunParts, run_parts, train

__all__ = [
    "RunParts",
    "make_materialisers",
    "make_plan",
    "make_processor",
    "open_sources_alone",
    "run_parts",
    "train",
]
