"""Parity with Hugging Face's Trainer: the same micro-batches and hyperparameters, the same losses and final adapter.

Its loss needed no alignment: with `num_items_in_batch` it, too, is the sum over the tokens of all micro-batches of a
step divided by their number. That counts labels before the shift by one; here no first token has a label, so both
counts are equal. Its warm-up is not ours (its first update has the learning rate 0), so there is none.
"""

from __future__ import annotations

from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainingArguments

from tests.numerics.in_process import Seen, run_here
from tests.numerics.mixed_data import ALL_SOURCES
from tests.numerics.table import GLOBAL_BATCH_SIZE, make_table_run, plain_model
from tests.ranks import run_ranks
from tests.tiny_run import TinyRun
from vlm_dist.build import make_lengths, make_materialisers, make_plan, make_processor, open_sources_alone
from vlm_dist.config import load_run
from vlm_dist.config.arithmetic import resolve_batch

pytestmark = [pytest.mark.numerics, pytest.mark.engine]

NUM_STEPS = 6
ACCUMULATION = 4
HYPERPARAMETERS: dict[str, Any] = {
    "learning_rate": 1e-3,
    "weight_decay": 0.01,
    "adam_beta2": 0.98,
    "adam_epsilon": 1e-6,
    "max_grad_norm": 1.0,
    "lr_scheduler_type": "cosine",
    "max_steps": NUM_STEPS,
    "gradient_accumulation_steps": ACCUMULATION,
    "seed": 42,
}
OVERRIDES = (
    *ALL_SOURCES,
    *(f"train.{key}={value}" for key, value in HYPERPARAMETERS.items()),
    "peft.lora_dropout=0",
    "train.warmup_ratio=0",
    "train.gradient_checkpointing=false",
    "deepspeed=ds_configs/z2.json",
    "train.output_dir=ours",
)
MAX_LOSS_DIFFERENCE = 1e-6  # relative
MAX_WEIGHT_DIFFERENCE = 3e-6  # absolute, of weights that move by up to 4e-3


class Batches(Dataset):
    """The trainer's own micro-batches, in its order."""

    def __init__(self, run: TinyRun) -> None:
        config = load_run(run.config, OVERRIDES)
        sources = open_sources_alone(config, "train")
        processor, family = make_processor(config)
        materialise = make_materialisers(config, sources, [], processor, family)
        lengths = make_lengths(config, sources, processor, family, materialise)
        plan = make_plan(config, sources, resolve_batch(config.train, 1, GLOBAL_BATCH_SIZE), lengths)
        made = [materialise(job) for step in plan.steps() for job in step.for_rank(0, 1)]
        self.batches = [{**batch.inputs, "labels": batch.labels} for batch in made]

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.batches[index]


class TheirTrainer(Trainer):
    """Takes micro-batches as they are, and notes the loss of each."""

    seen: list[float]

    def get_train_dataloader(self) -> DataLoader:
        return DataLoader(self.train_dataset, batch_size=None)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        self.seen.append(float(loss.detach()))
        return loss


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    return make_table_run(tmp_path_factory.mktemp("parity"))


@pytest.fixture(scope="module")
def ours(run: TinyRun) -> Seen:
    def train(ranks: Any) -> Seen:
        return run_here(ranks, run, OVERRIDES, anywhere=True)

    return run_ranks(train, 1, timeout_seconds=120)[0]


def test_the_same_losses_and_the_same_adapter(run: TinyRun, ours: Seen, tmp_path: Path) -> None:
    assert ours.error is None
    model = plain_model(run)
    start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=2,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        remove_unused_columns=False,
        logging_steps=1,
        disable_tqdm=True,
        **HYPERPARAMETERS,
    )
    with chdir(run.directory):
        theirs = TheirTrainer(model=model, args=arguments, train_dataset=Batches(run))
    theirs.seen = []
    theirs.train()
    losses = [sum(theirs.seen[i : i + ACCUMULATION]) for i in range(0, len(theirs.seen), ACCUMULATION)]
    assert len(losses) == NUM_STEPS == len(ours.losses)
    mine = [loss / targets for loss, targets in zip(ours.losses, ours.targets, strict=True)]
    assert mine == pytest.approx(losses, rel=MAX_LOSS_DIFFERENCE)
    assert ours.state is not None
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    difference = max(float((torch.from_numpy(ours.state[n]["master"]) - p).abs().max()) for n, p in trained.items())
    moved = max(float((p - start[name]).abs().max()) for name, p in trained.items())
    assert moved > 1e-3
    assert difference < MAX_WEIGHT_DIFFERENCE
    rates = [record["learning_rate"] for record in theirs.state.log_history if "learning_rate" in record]
    logged = [record["learning_rate"] for record in run.metrics("ours")]
    assert sorted(rates) == pytest.approx(sorted(logged), rel=1e-9)
