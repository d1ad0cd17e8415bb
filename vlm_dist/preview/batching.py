"""What the ways of making micro-batches would cost on these data, as the planner itself measures it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

from vlm_dist.data.encoding.packing import check_packing
from vlm_dist.data.plan.measure import PlanFigures, measure
from vlm_dist.data.plan.plan import Mode
from vlm_dist.errors import ConfigError, DataError
from vlm_dist.preview.opening import OpenRun

#: Steps of the first epoch that are measured.
MAX_STEPS = 64

#: Mode -> the switch of train_config.yaml.
SWITCHES: dict[Mode, str] = {
    "padding": "the default",
    "group_by_length": "train.group_by_length",
    "packing": "train.packing",
}


@dataclass(frozen=True)
class ModeFigures:
    """One mode.

    Attributes:
        mode: of the plan.
        is_own: the run has it.
        figures: of some steps; None: the mode cannot be had.
        refusal: why not.
    """

    mode: Mode
    is_own: bool
    figures: PlanFigures | None
    refusal: str = ""


def measure_modes(run: OpenRun) -> Sequence[ModeFigures]:
    """Plan the first steps of an epoch in every mode, on the ranks of the run, and add up what they cost."""
    found = []
    for mode in get_args(Mode):
        own = run.plan.settings.mode == mode
        try:
            if mode == "packing":
                check_packing(run.family)
            plan = run.plan_in(mode)
            steps = (plan.step(index) for index in range(min(MAX_STEPS, plan.num_steps)))
            found.append(ModeFigures(mode, own, measure(plan, steps, run.batch.world_size)))
        except (ConfigError, DataError) as error:
            found.append(ModeFigures(mode, own, None, str(error)))
    return found
