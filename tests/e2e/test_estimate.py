"""`vlm-dist estimate` through the real command line, and what it says a run holds against what the run does hold."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.numerics.in_process import run_here
from tests.ranks import Ranks, run_ranks
from tests.tiny_run import Finished, TinyRun, make_tiny_run
from tests.unit.estimate.runs import write_run
from vlm_dist.build import RunParts
from vlm_dist.config import load_run
from vlm_dist.estimate.estimate import estimate, machine_of

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    return make_tiny_run(tmp_path_factory.mktemp("run"), num_images=24, num_clips=8)


def ask(run: TinyRun, *arguments: str) -> Finished:
    return run.command([sys.executable, "-m", "vlm_dist.cli", "estimate", *arguments])


def own(run: TinyRun, file: Path, *settings: str) -> dict[str, Any]:
    """Figures of the run as the file and the settings have it, on 8 GPUs of 48 GiB."""
    overrides = [part for setting in settings for part in ("--set", setting)]
    ended = ask(run, str(file), "--gpus", "8", "--gpu-memory", "48", "--json", *overrides)
    assert ended.exit_code == 0, ended.output
    (row,) = [row for row in json.loads(ended.stdout)["variants"] if row["as_the_run_file"]]
    return row


def test_out_of_memory_is_walked_out_of_before_the_run(tmp_path: Path) -> None:
    """Each step of the guide's walk-through shows its effect: half the batch, checkpointing, a smaller adapter."""
    file = write_run(tmp_path, "Qwen2.5-VL-7B")
    run = TinyRun(tmp_path)
    first = ("train.gradient_checkpointing=false", "peft.r=64", "peft.lora_alpha=16")
    halved = ("train.per_device_train_batch_size=4", "train.gradient_accumulation_steps=4")
    again, smaller = ("train.gradient_checkpointing=true",), ("peft.r=32", "peft.lora_alpha=8")
    steps = [first, first + halved, first + halved + again, first + halved + again + smaller]
    rows = [own(run, file, *settings) for settings in steps]
    totals = [row["largest_total_bytes"] for row in rows]
    assert totals == sorted(totals, reverse=True)
    assert [row["fits"] for row in rows] == [False, False, True, True]
    bytes_of = [row["largest_bytes"] for row in rows]
    kept = [parts["activations"] + parts["vision activations"] for parts in bytes_of]
    assert 0.45 < kept[1] / kept[0] < 0.55  # half the batch
    assert kept[2] < 0.3 * kept[1]  # gradient checkpointing
    for part in ("adapter", "optimizer", "gradients"):
        assert bytes_of[3][part] == pytest.approx(bytes_of[2][part] / 2, rel=0.01)  # half of r
    assert rows[0]["hours"] is None and rows[1]["tokens_per_second"] == pytest.approx(
        rows[0]["tokens_per_second"], rel=0.05
    )


def test_what_a_person_reads(tiny: TinyRun) -> None:
    """With data and a processor: both micro-batches, the hours, tables without colours, a recommendation at the end."""
    ended = ask(tiny, str(tiny.config), "--gpus", "2", "--gpu", "L4", "--nodes", "2")
    assert ended.exit_code == 0, ended.output
    lines = ended.stdout.splitlines()
    assert "\x1b" not in ended.stdout and max(map(len, lines)) < 400
    assert "on 2 x 2 x L4 with 24 GiB, over infiniband (50 GB/s)" in lines[0]
    assert lines[1] == "global batch 16 = 2 per device x 2 accumulation x 4 ranks"
    assert lines[2].startswith("largest micro-batch: 2 samples in 51") and "patches" in lines[2]
    assert lines[3].startswith("typical micro-batch: 2 samples in ") and "2 of them in a step" in lines[3]
    for name in ("ZeRO-2, kept", "ZeRO-3, kept", "ZeRO-2 + offload, recomputed", "* ZeRO-2, recomputed"):
        assert ended.stdout.count(name) == 2, name
    rest = "\n".join(lines[-4:])
    assert "Recommendation: The run fits" in rest
    wrong = ask(tiny, str(tiny.config), "--gpu", "abacus")
    assert wrong.exit_code == 2
    assert wrong.stderr.strip().splitlines()[-1].startswith("error: --gpu abacus: not known")


def hold(ranks: Ranks, run: TinyRun, overrides: tuple[str, ...]) -> dict[str, int]:
    found: dict[str, int] = {}

    def note(into: dict[str, int], parts: RunParts) -> None:
        into |= parts.trainer.engine.held_bytes()

    run_here(ranks, run, overrides, prepare=partial(note, found))
    return found


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_what_is_held_is_held(tiny: TinyRun, stage: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, masters and moments of each of two ranks, byte by byte; padding of ZeRO's shares aside."""
    file = "zero1" if stage == 1 else f"tiny{stage}"
    overrides = (f"deepspeed=ds_configs/{file}.json", "train.max_steps=1", f"train.output_dir=held-{stage}")
    real = run_ranks(hold, 2, tiny, overrides, timeout_seconds=120)
    monkeypatch.chdir(tiny.directory)
    parts = estimate(load_run(tiny.config, list(overrides)), machine_of(2, 1, 80, "H100", None, 0.4)).run.largest.parts
    for rank in real:
        assert parts["base"] + parts["adapter"] == pytest.approx(rank["weights"], rel=0.005)
        assert parts["optimizer"] == pytest.approx(rank["masters"] + rank["moments"], rel=0.005)
