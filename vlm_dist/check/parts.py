"""The parts of a run that several stages look at: each is made once, when first asked for."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from vlm_dist.build.continuation import planned_by
from vlm_dist.build.data import (
    find_family,
    make_materialisers,
    make_plan,
    make_processor,
    open_one_source,
)
from vlm_dist.build.lengths import make_lengths
from vlm_dist.config import DataSource, Drafted, RunConfig
from vlm_dist.config.arithmetic import BatchArithmetic, resolve_batch
from vlm_dist.data.materialise import Materialiser
from vlm_dist.data.plan.plan import Plan
from vlm_dist.data.purposes import ByPurpose
from vlm_dist.data.types import Source
from vlm_dist.engine import load_deepspeed_json
from vlm_dist.errors import ConfigError, VlmDistError
from vlm_dist.families import Family

T = TypeVar("T")


class NotThereError(Exception):
    """A stage cannot be run, for another one has failed, which says why itself.

    Args:
        stage: that has failed.
    """

    def __init__(self, stage: str) -> None:
        super().__init__(stage)
        self.stage = stage


class Parts:
    """What a configuration is made into, as far as it can be.

    Everything here raises `NotThereError` where what it is made of has failed, and the error itself the first time, to
    the stage that is to tell it.

    Args:
        drafted: the configuration and what is wrong with it.
        world_size: ranks of the run.
    """

    def __init__(self, drafted: Drafted, world_size: int) -> None:
        self._drafted = drafted
        self.world_size = world_size
        self._made: dict[str, Any] = {}
        self._failed: dict[str, VlmDistError] = {}
        self._told: set[str] = set()

    def config(self, *sections: str) -> RunConfig:
        """The configuration, whose named sections are sound."""
        if self._drafted.config is None or self._drafted.broken & {*sections}:
            raise NotThereError("config")
        return self._drafted.config

    def sources(self, which: str) -> list[Source]:
        """All of `data.train` or `data.eval`; the stage of the data tells what cannot be opened."""
        config = self.config("data", "collator")
        settings: list[DataSource] = getattr(config.data, which)
        if which == "train" and not settings:
            raise NotThereError("data")
        opened = []
        for number in range(len(settings)):
            try:
                opened.append(self.source(which, number))
            except VlmDistError as error:
                raise NotThereError("data") from error
        return opened

    def source(self, which: str, number: int) -> Source:
        """One entry of `data.train` or `data.eval`."""
        config = self.config("data", "collator")
        return self._once(f"{which}[{number}]", lambda: open_one_source(config, getattr(config.data, which)[number]))

    def family(self) -> Family:
        """The model's row in the table of families."""
        return self._told_by("processor", "family", lambda: find_family(self.config("model")))

    def processor(self) -> tuple[Any, Family]:
        """The processor, and the family that it belongs to."""
        return self._told_by("processor", "processor", lambda: make_processor(self.config("model", "collator")))

    def materialise(self) -> ByPurpose:
        """What makes micro-batches, for each purpose."""
        sources = self.sources("train"), self.sources("eval")
        processor, family = self.processor()
        config = self.config("model", "collator", "data", "train")
        return self._told_by(
            "processor", "materialise", lambda: make_materialisers(config, *sources, processor, family)
        )

    def training_materialiser(self) -> Materialiser:
        """What makes micro-batches of training."""
        made = self.materialise().materialisers["train"]
        assert isinstance(made, Materialiser)
        return made

    def batch(self) -> BatchArithmetic:
        """How large a step is; of a run that has a checkpoint it is that one's."""
        train = self.config("train").train

        def resolve() -> BatchArithmetic:
            config = self.config("train")
            checkpoint = planned_by(config)
            saved = checkpoint.info["global_batch_size"] if checkpoint is not None else None
            return resolve_batch(train, self.world_size, saved, allow_idle=True)

        return self._told_by("batch", "arithmetic", resolve)

    def plan(self) -> Plan:
        """Of the run."""
        config = self.config("model", "collator", "data", "train")
        materialise, batch = self.materialise(), self.batch()
        processor, family = self.processor()

        def make() -> Plan:
            sources = self.sources("train")
            checkpoint = planned_by(config)
            planned_with = checkpoint.info["plan"].get("lengths") if checkpoint is not None else None
            lengths = make_lengths(config, sources, processor, family, materialise, planned_with)
            return make_plan(config, sources, batch, lengths, self.world_size)

        return self._told_by("batch", "plan", make)

    def deepspeed(self) -> dict[str, Any]:
        """DeepSpeed's own JSON."""
        return self._told_by("model", "deepspeed", lambda: load_deepspeed_json(self.config("deepspeed").deepspeed))

    def _told_by(self, stage: str, name: str, make: Callable[[], T]) -> T:
        """Make a part; a failure is told by one stage, once, and keeps the others from running."""
        try:
            return self._once(name, make)
        except VlmDistError as error:
            if name in self._told:
                raise NotThereError(stage) from error
            self._told.add(name)
            raise OfStageError(stage, error) from error

    def _once(self, name: str, make: Callable[[], T]) -> T:
        if name in self._failed:
            raise self._failed[name]
        if name not in self._made:
            try:
                self._made[name] = make()
            except VlmDistError as error:
                self._failed[name] = error
                raise
        made: T = self._made[name]
        return made


class OfStageError(Exception):
    """An error that belongs to a stage, whichever asked for the part.

    Args:
        stage: that tells it.
        error: to be told.
    """

    def __init__(self, stage: str, error: VlmDistError) -> None:
        super().__init__(str(error))
        self.stage = stage
        self.error = error


@contextmanager
def heard_warnings() -> Iterator[list[str]]:
    """Within, what our own code warns of goes into the list that this gives, and nowhere else."""
    heard: list[str] = []

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.levelno >= logging.WARNING and record.getMessage() not in heard:
                heard.append(record.getMessage())

    logger, ear = logging.getLogger("vlm_dist"), Ear()
    kept, propagated = list(logger.handlers), logger.propagate
    logger.handlers, logger.propagate = [ear], False
    try:
        yield heard
    finally:
        logger.handlers, logger.propagate = kept, propagated


def must_be_positive(world_size: int) -> None:
    """Refuse a number of ranks that there cannot be.

    Raises:
        ConfigError: it is below 1.
    """
    if world_size < 1:
        raise ConfigError(f"--world-size {world_size}: expected 1 or more")
