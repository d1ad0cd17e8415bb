"""What a run knows of the lengths of its samples when it plans."""

from __future__ import annotations

from typing import Any

from vlm_dist.build.data import is_packed
from vlm_dist.config import RunConfig
from vlm_dist.data.lengths import LengthModel
from vlm_dist.data.lengths.fingerprint import fingerprint
from vlm_dist.data.lengths.opening import LengthChoice, choose_lengths, fact_lengths, open_lengths
from vlm_dist.data.lengths.token_store import TokenStore
from vlm_dist.data.materialise import Materialiser
from vlm_dist.data.purposes import ByPurpose
from vlm_dist.data.types import Source
from vlm_dist.distributed.failures import agree_on_failure
from vlm_dist.distributed.group import Ranks
from vlm_dist.families import Family


def plans_by_length(config: RunConfig) -> bool:
    """Whether the lengths of samples decide anything: then they are part of the plan's identity."""
    return config.train.group_by_length or is_packed(config)


def make_stores(config: RunConfig, processor: Any, family: Family) -> list[TokenStore]:
    """Where the token counts of each training source lie."""
    return [
        TokenStore(config.data.index_dir, fingerprint(processor, family, config.collator, source.columns))
        for source in config.data.train
    ]


def make_lengths(
    config: RunConfig,
    sources: list[Source],
    processor: Any,
    family: Family,
    materialise: ByPurpose,
    planned_with: str | None = None,
    ranks: Ranks | None = None,
) -> LengthModel:
    """The length model of a run. Collective where there are ranks: every rank calls this.

    Rank 0 looks for counts and measures texts, so that samples are read once, and all ranks decide alike.

    Args:
        config: of the run.
        sources: `data.train`.
        processor: of the model.
        family: its row.
        materialise: has the materialiser of training.
        planned_with: digest of the lengths that the checkpoint to continue was planned with.
        ranks: this process among its peers; None: it is alone, without a run.
    """
    if not plans_by_length(config):
        return fact_lengths(sources, family, config.collator)

    def choose() -> LengthChoice:
        stores = make_stores(config, processor, family)
        measure_text = training_materialiser(materialise).measure_text
        decides_order = not is_packed(config)
        return choose_lengths(config.data.lengths, sources, stores, measure_text, planned_with, decides_order)

    def open_chosen(choice: LengthChoice) -> LengthModel:
        stores = make_stores(config, processor, family)
        counter = training_materialiser(materialise).visual_counter
        return open_lengths(choice, sources, stores, counter, family, config.collator)

    if ranks is None:
        return open_chosen(choose())
    choice: LengthChoice | None = None
    with agree_on_failure(ranks):
        if ranks.is_main:
            choice = choose()
    choice = ranks.broadcast_object(choice)
    with agree_on_failure(ranks):
        return open_chosen(choice)


def describe_lengths(config: RunConfig, lengths: LengthModel) -> str | None:
    """One line for the log; None where lengths decide nothing."""
    if not plans_by_length(config):
        return None
    if lengths.digest.startswith("exact:"):
        return "lengths of samples: counted"
    return "lengths of samples: estimated; vlm-dist shards tokens RUN.yaml counts them"


def training_materialiser(materialise: ByPurpose) -> Materialiser:
    """The materialiser of training."""
    made = materialise.materialisers["train"]
    assert isinstance(made, Materialiser)
    return made
