"""Opens all that a preview looks at: data, processor, lengths and plan, as the trainer does, without the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_dist.build import make_lengths, make_materialisers, make_plan, make_processor, open_sources_alone
from vlm_dist.build.continuation import planned_by
from vlm_dist.config import RunConfig, load_run
from vlm_dist.config.arithmetic import BatchArithmetic, resolve_batch
from vlm_dist.data.lengths import LengthModel
from vlm_dist.data.materialise import Materialiser
from vlm_dist.data.plan.plan import Mode, Plan
from vlm_dist.data.purposes import Purpose
from vlm_dist.data.types import Source
from vlm_dist.errors import ConfigError
from vlm_dist.families import Family


@dataclass
class OpenRun:
    """A run before its model.

    Attributes:
        config: of the run.
        train_sources: `data.train`.
        eval_sources: `data.eval`.
        processor: of the model.
        family: its row.
        materialise: the trainer's own, by purpose.
        lengths: predicts the costs of training samples; the run's own where it plans by length.
        batch: how large a step is.
        plan: of training.
    """

    config: RunConfig
    train_sources: list[Source]
    eval_sources: list[Source]
    processor: Any
    family: Family
    materialise: dict[Purpose, Materialiser]
    lengths: LengthModel
    batch: BatchArithmetic
    plan: Plan

    @property
    def tokenizer(self) -> Any:
        """Of the processor."""
        return getattr(self.processor, "tokenizer", self.processor)

    @property
    def are_exact(self) -> bool:
        """Whether the lengths were counted."""
        return self.lengths.digest.startswith("exact:")

    def plan_in(self, mode: Mode) -> Plan:
        """The plan that the run would have in a mode; of one epoch."""
        switches = {"packing": mode == "packing", "group_by_length": mode == "group_by_length"}
        epoch = {"max_steps": -1, "num_train_epochs": 1.0}
        config = self.config.model_copy(update={"train": self.config.train.model_copy(update={**switches, **epoch})})
        return make_plan(config, self.train_sources, self.batch, self.lengths, self.plan.layout.ranks_per_node)


def open_run(run_file: Path, overrides: Sequence[str] = (), world_size: int = 1) -> OpenRun:
    """Open a run; a run that has a checkpoint has its global batch from there, as the trainer on resume.

    Args:
        run_file: of the run.
        overrides: as `--set` takes them.
        world_size: ranks of the run.

    Raises:
        ConfigError: the configuration does not fit itself or the data.
        DataError: a source cannot be opened.
        ModelError: the processor cannot be loaded.
    """
    if world_size < 1:
        raise ConfigError(f"--world-size {world_size}: expected 1 or more")
    config = load_run(run_file, overrides)
    train_sources = open_sources_alone(config, "train")
    eval_sources = open_sources_alone(config, "eval")
    processor, family = make_processor(config)
    by_purpose = make_materialisers(config, train_sources, eval_sources, processor, family)
    materialise = {name: made for name, made in by_purpose.materialisers.items() if isinstance(made, Materialiser)}
    checkpoint = planned_by(config)
    saved = checkpoint.info["global_batch_size"] if checkpoint is not None else None
    planned_with = checkpoint.info["plan"].get("lengths") if checkpoint is not None else None
    batch = resolve_batch(config.train, world_size, saved, allow_idle=True)
    # the other modes are to be compared by the same lengths, whether or not this run plans by any
    by_length = config.model_copy(update={"train": config.train.model_copy(update={"group_by_length": True})})
    lengths = make_lengths(by_length, train_sources, processor, family, by_purpose, planned_with)
    plan = make_plan(config, train_sources, batch, lengths, world_size)
    return OpenRun(config, train_sources, eval_sources, processor, family, materialise, lengths, batch, plan)
