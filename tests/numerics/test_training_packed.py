"""Packed training is padded training: the same samples in each step give the same losses and the same weights.

On two ranks, through the real command line, with pictures, clips and texts of different lengths, in float32 and without
dropout.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.numerics.finished_runs import masters, max_difference, train
from tests.tiny_run import TinyRun, make_tiny_run

pytestmark = [pytest.mark.numerics, pytest.mark.e2e]

NUM_STEPS = 4
SETTINGS = (
    "peft.lora_dropout=0",
    "train.group_by_length=false",  # packing has the steps of a shuffled run
    f"train.max_steps={NUM_STEPS}",
    "train.save_steps=2",
    "train.adam_epsilon=1e-6",
)
PACKED = ("train.packing=true",)
LOSS_TOLERANCE = 1e-6  # relative
WEIGHT_TOLERANCE = 3e-6


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    return make_tiny_run(tmp_path_factory.mktemp("packed"), num_images=21, num_clips=7)


@pytest.fixture(scope="module")
def padded(run: TinyRun) -> Path:
    train(run, "padded", *SETTINGS, processes=2)
    return run.directory / "padded"


def same_training(run: TinyRun, output_dir: str) -> None:
    losses, wanted = run.losses(output_dir), run.losses("padded")
    assert list(losses) == list(range(1, NUM_STEPS + 1))
    assert list(losses.values()) == pytest.approx(list(wanted.values()), rel=LOSS_TOLERANCE)
    ours, theirs = (masters(run.directory / one / f"checkpoint-{NUM_STEPS}") for one in (output_dir, "padded"))
    assert max_difference(ours, theirs) < WEIGHT_TOLERANCE


def test_packed_on_two_ranks_is_padded_on_two_ranks(run: TinyRun, padded: Path) -> None:
    finished = train(run, "packed", *SETTINGS, *PACKED, processes=2)
    same_training(run, "packed")
    assert "packs of up to 512 tokens" in finished.output
    told = "attention: varlen: samples of a pack, and pictures in the vision tower, each over itself, by SDPA sample"
    assert told in finished.output
    assert "lengths of samples: estimated" in finished.output
    records = [(run.metrics(name)[0]) for name in ("packed", "padded")]
    assert records[0]["num_target_tokens"] == records[1]["num_target_tokens"]


def test_counted_lengths_and_small_packs_change_nothing_either(run: TinyRun, padded: Path) -> None:
    """One rank, packs of a few samples, lengths that were counted; then on with the other ranks of the checkpoint.

    Samples are told apart by a mask here.
    """
    counted = run.command(["vlm-dist", "shards", "tokens", str(run.config), "--workers", "0"])
    assert counted.exit_code == 0, counted.output
    masked = "model.loading_params.attn_implementation=sdpa"
    small = (*SETTINGS, *PACKED, masked, "train.pack_max_tokens=120", "train.gradient_accumulation_steps=4")
    finished = train(run, "small", *small, "train.stop_at_step=2")
    assert "lengths of samples: counted" in finished.output
    assert "attention: varlen" not in finished.output
    train(run, "small", *small, "train.resume=auto", processes=2)
    same_training(run, "small")
