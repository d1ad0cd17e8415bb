"""How large micro-batches are: the largest that the caps allow, and the mean of what the plan makes of the data."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlm_dist.build.data import (
    find_family,
    is_packed,
    make_materialisers,
    make_plan,
    make_processor,
    open_sources_alone,
    pack_budget,
    towers_in_use,
)
from vlm_dist.build.lengths import make_stores, training_materialiser
from vlm_dist.build.memory_check import make_worst_case
from vlm_dist.config import RunConfig
from vlm_dist.config.arithmetic import BatchArithmetic
from vlm_dist.data.lengths.opening import choose_lengths, open_lengths
from vlm_dist.data.plan.measure import job_costs
from vlm_dist.data.plan.plan import Plan
from vlm_dist.errors import ConfigError, DataError, ModelError
from vlm_dist.estimate.batch import BatchShape, patches_of_one, visual_of
from vlm_dist.families import Family
from vlm_dist.model.flops import TextTokens, text_tokens
from vlm_dist.model.visual_tokens import VisualLayout, VisualTokens

logger = logging.getLogger(__name__)

#: Tokens of a template and a question beside a picture, where there is no processor to count them.
_TEMPLATE_TOKENS = 64
_NUM_STEPS = 8


@dataclass(frozen=True)
class Shapes:
    """What a run's micro-batches are like.

    Attributes:
        unit: one row of the largest micro-batch; of packs, the whole pack.
        largest: the largest micro-batch that the configuration allows.
        typical: the mean micro-batch; None where there is no data to tell.
        micro_batches: of a step, per rank.
        num_steps: of the run; None where nothing tells.
        notes: what had to be assumed.
    """

    unit: BatchShape
    largest: BatchShape
    typical: BatchShape | None
    micro_batches: float
    num_steps: int | None
    notes: tuple[str, ...]


class _Columns:
    """In the place of data that is not there: it has the columns that the configuration names."""

    def __init__(self, columns: Sequence[str]) -> None:
        self.columns = tuple(columns)


def make_shapes(config: RunConfig, layout: VisualLayout, batch: BatchArithmetic) -> Shapes:
    """Find out how large micro-batches are, as exactly as what is there allows.

    Args:
        config: of the run.
        layout: how the model cuts pictures up.
        batch: of the run, on its ranks.
    """
    notes: list[str] = []
    sources: list[Any] = []
    try:
        sources = open_sources_alone(config, "train")
    except (DataError, ConfigError, OSError) as error:
        notes.append(f"the data is not there ({_first_line(error)}): no typical micro-batch, no hours")
    columns = config.collator.dataset_columns.mapping.values()
    shown: list[Any] = list(sources) or [_Columns([str(column) for column in columns])]
    processor, family = None, find_family(config)
    try:
        processor, family = make_processor(config)
    except ModelError as error:
        notes.append(f"no processor ({_first_line(error)}): sizes of pictures are assumed, not counted")
    rows = 1 if is_packed(config) else batch.per_device
    if processor is not None:
        unit = _by_processor(config, shown, processor, family, layout)
    else:
        unit = _assumed(config, shown, family, layout)
    largest = unit.times(rows)
    typical, micro_batches, num_steps = None, float(batch.accumulation), None
    if config.train.max_steps > 0:
        num_steps = config.train.max_steps
    if sources and processor is not None:
        plan = _plan(config, sources, processor, family, batch)
        typical, micro_batches = _typical(
            plan, batch.world_size, family, layout, config.collator.text_processing.pad_to_multiple_of or 1
        )
        num_steps = plan.num_steps
    return Shapes(unit, largest, typical, micro_batches, num_steps, tuple(notes))


def _by_processor(config: RunConfig, sources: list[Any], processor: Any, family: Family, layout: Any) -> BatchShape:
    """What the model's processor makes of the largest sample: a row of it, or a pack."""
    made = make_worst_case(config, sources, [], processor, family, 1)
    text = text_tokens(made.inputs, made.labels)
    ignored = config.collator.label_masking.ignore_index
    labelled = int((made.labels[:, 1:] != ignored).sum())
    return BatchShape(1, made.num_samples, text, layout.tokens(made.inputs), labelled, is_packed(config))


def _assumed(config: RunConfig, sources: list[Any], family: Family, layout: VisualLayout) -> BatchShape:
    """A row of max_length, or a full pack, filled with pictures as far as they go."""
    longest = config.collator.text_processing.max_length
    towers = towers_in_use(config, sources)
    budget = pack_budget(config) if is_packed(config) else None
    length = longest if budget is None else int(budget.max_tokens * (1 + budget.headroom))
    samples = max(1, length // longest)
    visual = VisualTokens()
    if towers:
        room = max(0, longest - _TEMPLATE_TOKENS) * family.patches_per_token
        patches = float(samples * (room if family.follows_resolution else patches_of_one(layout)))
        if budget is not None and budget.max_patches is not None:
            patches = min(patches, budget.max_patches * (1 + budget.headroom))
        visual = visual_of(patches, samples, layout)
    segments = (length // samples,) * samples
    multiple = config.collator.text_processing.pad_to_multiple_of or 1
    width = -(-length // multiple) * multiple
    text = TextTokens(sum(segments), width, segments, float(width) ** 2, budget is not None)
    return BatchShape(1, samples, text, visual, length, budget is not None)


def _plan(config: RunConfig, sources: list[Any], processor: Any, family: Family, batch: BatchArithmetic) -> Plan:
    """The run's plan, with predicted lengths even where its order does not need them."""
    materialiser = training_materialiser(make_materialisers(config, sources, [], processor, family))
    stores = make_stores(config, processor, family)
    choice = choose_lengths("auto", sources, stores, materialiser.measure_text, None, False)
    lengths = open_lengths(choice, sources, stores, materialiser.visual_counter, family, config.collator)
    return make_plan(config, sources, batch, lengths, batch.world_size)


def _typical(
    plan: Plan, world_size: int, family: Family, layout: VisualLayout, multiple: int
) -> tuple[BatchShape, float]:
    """The mean micro-batch of some steps all over the run, and how many of them a rank has in a step."""
    chosen = np.unique(np.linspace(0, plan.num_steps - 1, min(_NUM_STEPS, plan.num_steps)).astype(int))
    steps = [plan.step(int(number)) for number in chosen]
    jobs = [job for step in steps for rank in range(world_size) for job in step.for_rank(rank, world_size)]
    made = [cost for cost in job_costs(plan, jobs) if cost.num_samples]
    count = max(1, len(made))
    samples, tokens, computed, patches = (
        sum(getattr(cost, name) for cost in made) / count
        for name in ("num_samples", "tokens", "computed_tokens", "patches")
    )
    is_pack = plan.settings.pack is not None
    computed += (multiple - 1) / 2 * (1 if is_pack else samples)  # half of what may be added to a row
    segments = (max(1, round(tokens / samples)),) * max(1, round(samples))
    squares = computed**2 if is_pack else computed**2 / samples
    visible = patches / family.patches_per_token
    text = TextTokens(round(tokens), round(computed), segments, squares, is_pack)
    shape = BatchShape(
        1 if is_pack else samples, samples, text, visual_of(patches, samples, layout), round(max(1, tokens - visible)),
        is_pack, computed > tokens * 1.001,
    )  # fmt: skip
    return shape, len(jobs) / len(steps) / world_size


def _first_line(error: BaseException) -> str:
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line.split(". ", 1)[0].removesuffix(".")
