"""A run goes on with other ranks, stages, batches and ends; what it refuses, and what it does when told to.

Float32, without dropout; `test_training_resume.py` has what is equal bit for bit, with dropout, on the command line.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.numerics.finished_runs import assert_same_bits, masters, max_difference
from tests.numerics.in_process import run_here
from tests.numerics.mixed_data import ALL_SOURCES
from tests.numerics.table import MODES, make_table_run
from tests.ranks import Ranks, run_ranks
from tests.tiny_run import TinyRun

pytestmark = [pytest.mark.numerics, pytest.mark.engine]

NUM_STEPS = 7  # more than two epochs of three steps
COMMON = (
    *ALL_SOURCES,
    "peft.lora_dropout=0",
    "train.adam_epsilon=1e-6",
    "train.gradient_checkpointing=false",
    "train.per_device_train_batch_size=2",
    "train.resume=auto",
)
LOSS_TOLERANCE = 1e-6  # relative
WEIGHT_TOLERANCE = 3e-6


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    return make_table_run(tmp_path_factory.mktemp("anywhere"))


def train(run: TinyRun, world_size: int, *runs: tuple[str, ...]) -> list[Any]:
    """One after the other on the same ranks; what rank 0 saw of each."""

    def on_ranks(ranks: Ranks) -> list[Any]:
        return [run_here(ranks, run, (*COMMON, *overrides)) for overrides in runs]

    return run_ranks(on_ranks, world_size, timeout_seconds=200)[0]


def case(output_dir: str, stage: int, accumulation: int, mode: str, *more: str) -> tuple[str, ...]:
    return (
        f"train.output_dir={output_dir}",
        f"deepspeed=ds_configs/z{stage}.json",
        f"train.gradient_accumulation_steps={accumulation}",
        *MODES[mode],
        *more,
    )


@pytest.fixture(scope="module")
def alone(run: TinyRun) -> list[Any]:
    """All that one rank has to do; the first is what the chain is compared with."""
    end = f"train.max_steps={NUM_STEPS}"
    constant = ("train.lr_scheduler_type=constant", "train.warmup_ratio=0")
    return train(
        run,
        1,
        case("undisturbed", 2, 4, "padding", end),
        case("short", 2, 4, "padding", "train.max_steps=3"),
        case("short", 2, 4, "padding", end),
        case("constant", 2, 4, "padding", "train.max_steps=3", *constant),
        case("constant", 2, 4, "padding", end, *constant),
        case("constant-undisturbed", 2, 4, "padding", end, *constant),
    )


def test_four_ranks_then_two_then_one_over_stages_and_batches(run: TinyRun, alone: Any) -> None:
    end = f"train.max_steps={NUM_STEPS}"
    for world_size, stage, mode, stop in ((4, 2, "padding", 2), (2, 3, "packing", 4), (1, 2, "padding", None)):
        until = () if stop is None else (f"train.stop_at_step={stop}",)
        # the accumulation of one rank is wrong on four: the checkpoint's global batch wins
        (seen,) = train(run, world_size, case("chain", stage, 4 // world_size, mode, end, *until))
        assert seen.error is None
        assert (run.directory / "chain" / f"checkpoint-{stop or NUM_STEPS}").is_dir()
    ours, theirs = run.metrics("chain"), run.metrics("undisturbed")
    assert [record["step"] for record in ours] == list(range(1, NUM_STEPS + 1))
    for record, wanted in zip(ours, theirs, strict=True):
        assert record["num_target_tokens"] == wanted["num_target_tokens"]
        assert record["learning_rate"] == wanted["learning_rate"]
        assert record["loss"] == pytest.approx(wanted["loss"], rel=LOSS_TOLERANCE)
    final = f"checkpoint-{NUM_STEPS}"
    difference = max_difference(
        masters(run.directory / "chain" / final), masters(run.directory / "undisturbed" / final)
    )
    assert difference < WEIGHT_TOLERANCE


def test_a_longer_run_goes_on_at_the_rates_of_its_new_length(run: TinyRun, alone: Any) -> None:
    records, wanted = run.metrics("short"), run.metrics("undisturbed")
    assert [record["step"] for record in records] == list(range(1, NUM_STEPS + 1))
    assert [r["num_target_tokens"] for r in records] == [r["num_target_tokens"] for r in wanted]  # the same samples
    rates = [record["learning_rate"] for record in records]
    assert rates[3:] == [record["learning_rate"] for record in wanted][3:]
    assert rates[2] < rates[3]  # the old cosine had almost ended
    checkpoint = json.loads((run.directory / "short" / f"checkpoint-{NUM_STEPS}" / "training_state.json").read_text())
    assert checkpoint["scheduler"]["num_steps"] == NUM_STEPS


def test_with_a_constant_rate_it_is_the_longer_run(run: TinyRun, alone: Any) -> None:
    final = f"checkpoint-{NUM_STEPS}"
    assert_same_bits(run.directory / "constant" / final, run.directory / "constant-undisturbed" / final)


def test_other_data_and_another_adapter_are_refused_unless_told(run: TinyRun, alone: Any, capfd: Any) -> None:
    def resumed(*changes: str) -> str:
        """What the log or the error says."""
        try:
            train(run, 1, case("short", 2, 4, "padding", f"train.max_steps={NUM_STEPS}", *changes))
        except AssertionError as error:
            return str(error)
        return capfd.readouterr().out

    other_data, other_model = "train.seed=7", "peft.lora_alpha=64"
    refused = resumed(other_data)
    assert "seed: checkpoint 42, now 7" in refused
    assert "train.resume_anyway=[data]: samples may be repeated or left out" in refused
    refused = resumed(other_model, "train.resume_anyway=[data]")
    assert "peft.lora_alpha: 16 in the checkpoint, now 64" in refused
    assert "train.resume_anyway=[model]" in refused
    told = resumed(other_data, other_model, "train.resume_anyway=[data, model]")
    assert f"train.resume_anyway has data: the run goes on at step {NUM_STEPS} of another order" in told
    assert "seed: checkpoint 42, now 7" in told
    assert "the weights were learned with another one. peft.lora_alpha: 16 in the checkpoint, now 64" in told


def test_the_rule_for_the_rate_is_told(run: TinyRun, alone: Any, capfd: Any, tmp_path: Path) -> None:
    longer = case("short", 2, 4, "padding", "train.max_steps=9", "train.stop_at_step=8")
    train(run, 1, longer)
    told = capfd.readouterr().out
    assert "the run has 9 steps now, and had 7 when the checkpoint was written" in told
    assert "from here on the learning rate is that of 9 steps" in told
