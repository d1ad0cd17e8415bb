"""Text alone, one picture, several pictures and clips in one run: every rank takes part in every tower's call.

ZeRO-2 and ZeRO-3 on two ranks and plain Python on one are compared with a loop of plain PyTorch over single samples,
which knows neither padding nor dummies. Some micro-batches lack a kind of media, some have none at all.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.numerics.finished_runs import figures, train
from tests.numerics.mixed_data import ALL_SOURCES, NUM_SAMPLES, make_mixed_run
from tests.numerics.test_training_invariance import (
    GLOBAL_BATCH_SIZE,
    LOSS_TOLERANCE,
    NUM_STEPS,
    ONE_RANK,
    SETTINGS,
    ZERO3,
    PlainLoop,
)
from tests.tiny_run import TinyRun
from vlm_dist.build import make_lengths, make_materialisers, make_plan, make_processor, open_sources_alone
from vlm_dist.config import load_run
from vlm_dist.config.arithmetic import resolve_batch
from vlm_dist.data.materialise import Materialiser
from vlm_dist.data.types import MicroBatch, MicroBatchJob

pytestmark = [pytest.mark.numerics, pytest.mark.e2e]

#: Neighbours in the plan share a micro-batch whatever they are, so that all combinations occur.
MIXED = (*SETTINGS, *ALL_SOURCES, "train.group_by_length=false")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    return make_mixed_run(tmp_path_factory.mktemp("mixed"))


@pytest.fixture(scope="module")
def reference(run: TinyRun) -> tuple[PlainLoop, list[list[MicroBatch]], list[list[MicroBatch]]]:
    """A plain loop over single samples; these samples; and the micro-batches of the trainer on two ranks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(run.directory)
        config = load_run(run.config, MIXED)
        sources = open_sources_alone(config, "train")
        processor, family = make_processor(config)
        alone = Materialiser(sources, processor, family, config.collator, frozenset(), config.train.seed)
        materialise = make_materialisers(config, sources, [], processor, family)
        lengths = make_lengths(config, sources, processor, family, materialise)
        plan = make_plan(config, sources, resolve_batch(config.train, 2), lengths)
        loop, singles, batches = PlainLoop(run, config), [], []
        for step in plan.steps():
            jobs = [job for rank in range(2) for job in step.for_rank(rank, 2)]
            refs = [ref for job in jobs for ref in job.refs if ref is not None]
            singles.append([alone(MicroBatchJob(step.step, i, (ref,))) for i, ref in enumerate(refs)])
            batches.append([materialise(job) for job in jobs])
            loop.step([(batch.inputs, batch.labels) for batch in singles[-1]])
    return loop, singles, batches


def test_the_run_has_every_mixture(reference: Any) -> None:
    _, singles, batches = reference
    assert len(batches) == NUM_STEPS
    assert [sum(batch.num_samples for batch in step) for step in batches] == [GLOBAL_BATCH_SIZE] * 5 + [5]
    kinds = {frozenset(origin.source for origin in batch.origins) for step in batches for batch in step}
    assert frozenset({"texts"}) in kinds  # nothing to see at all
    assert frozenset() in kinds
    assert len(kinds) >= 6
    for batch in (batch for step in batches for batch in step):  # and yet all call the same towers
        assert {"pixel_values", "pixel_values_videos"} <= batch.inputs.keys()
    without = [batch for step in singles for batch in step if batch.origins[0].source == "texts"]
    assert len(without) == NUM_SAMPLES["texts"]
    assert not any("pixel" in name for batch in without for name in batch.inputs)
    albums = [batch for step in singles for batch in step if batch.origins[0].source == "albums"]
    assert {len(batch.inputs["image_grid_thw"]) for batch in albums} == {2, 3, 4}


@pytest.mark.parametrize(
    ("name", "processes", "overrides"),
    [("zero2", 2, ()), ("zero3", 2, ZERO3), ("one-rank", 0, ONE_RANK)],
    ids=["zero2", "zero3", "one-rank"],
)
def test_it_equals_a_plain_loop_over_single_samples(
    run: TinyRun, reference: Any, name: str, processes: int, overrides: tuple[str, ...]
) -> None:
    loop, singles, _ = reference
    train(run, name, *MIXED, *overrides, processes=processes)
    records = list(figures(run, name).values())
    targets = [sum(batch.num_target_tokens for batch in step) for step in singles]
    assert [record["num_target_tokens"] for record in records] == targets
    assert [record["loss"] for record in records] == pytest.approx(loop.losses, rel=LOSS_TOLERANCE)
    assert [record["grad_norm"] for record in records] == pytest.approx(loop.grad_norms, rel=LOSS_TOLERANCE)
    assert not (Path(run.directory) / name / "quarantine").exists()
