"""Every rank writes its own share: the same state as through rank 0, on any layout, or a failure that all hear of."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import Qwen2VLForConditionalGeneration

from tests.engine import tiny
from tests.engine.test_elastic_resume import STEPS, bits, probe_losses, third_step, weights_match
from tests.ranks import Ranks, run_ranks
from vlm_dist.checkpoint import (
    Checkpoint,
    CheckpointStore,
    Places,
    RunFacts,
    SlicedCheckpointSaver,
    choose_checkpoint,
    restore_checkpoint,
    sliced_saver,
    slices,
)
from vlm_dist.engine import Engine
from vlm_dist.errors import CheckpointError

pytestmark = pytest.mark.engine

#: name -> (stage, bf16); each is saved by 3 ranks after two steps.
SAVED = {"zero1-bf16": (1, True), "zero2": (2, False), "zero3": (3, False), "zero0": (0, False)}
LOADED = {
    1: [("zero3", 2, False), ("zero1-bf16", 3, True)],
    2: [("zero2", 3, False), ("zero3", 2, False), ("zero1-bf16", 3, True), ("zero0", 3, False), ("zero2", 0, False)],
    3: [("zero2", 2, False), ("zero3", 3, False), ("zero1-bf16", 1, True)],
}


def make_saver(engine: Engine, ranks: Ranks, directory: Path) -> SlicedCheckpointSaver:
    log: Any = SimpleNamespace(message=lambda text: None, log_save=lambda *_: None, event=lambda *_, **__: None)
    facts = RunFacts(plan={"position": 2}, global_batch_size=6)
    return SlicedCheckpointSaver(
        CheckpointStore(directory), engine, ranks, Places(is_writer=ranks.is_main), lambda position: facts, log
    )


def trained(ranks: Ranks, model: Path, stage: int, bf16: bool) -> Engine:
    engine = tiny.make_engine(model, tiny.ds_config(stage, ranks.world_size, bf16=bf16))
    for batches in STEPS[:2]:
        tiny.run_step(engine, batches[ranks.rank :: ranks.world_size], tiny.num_targets(batches))
    return engine


def save_all(ranks: Ranks, model: Path, output: Path) -> dict[str, Any]:
    found = {}
    for name, (stage, bf16) in SAVED.items():
        engine = trained(ranks, model, stage, bf16)
        saver = make_saver(engine, ranks, output / name)
        if ranks.is_main:  # what a killed run has left is not taken for a file of this one
            slices.write_slices(output / name / "checkpoint-2", 1, ranks.world_size, "another", [])
        ranks.barrier()
        saver.begin(2)
        wanted = {"bits": bits(engine), "losses": probe_losses(engine), "third": third_step(engine, ranks)}  # meanwhile
        saver.finish()
        found[name] = wanted
        engine.close()
    return found


def load_all(ranks: Ranks, model: Path, output: Path) -> list[dict[str, Any]]:
    found = []
    for name, stage, bf16 in LOADED[ranks.world_size]:
        engine = tiny.make_engine(model, tiny.ds_config(stage, ranks.world_size, bf16=bf16))
        checkpoint = choose_checkpoint(CheckpointStore(output / name), ranks, "auto")
        assert checkpoint is not None
        assert checkpoint.is_sliced
        restore_checkpoint(checkpoint, engine, ranks)
        assert weights_match(engine, checkpoint)
        found.append({"bits": bits(engine), "losses": probe_losses(engine), "third": third_step(engine, ranks)})
        engine.close()
    return found


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[dict[str, Any]]]:
    root = tmp_path_factory.mktemp("slices")
    model = tiny.save_tiny_vlm(root / "model")
    return model, root / "runs", run_ranks(save_all, 3, model, root / "runs", timeout_seconds=240)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_resumes_bit_for_bit_from_slices(saved: Any, world_size: int) -> None:
    model, output, by_rank = saved
    loaded = run_ranks(load_all, world_size, model, output, timeout_seconds=240)
    for index, (name, stage, bf16) in enumerate(LOADED[world_size]):
        case = (name, f"zero{stage} on {world_size}")
        wanted, got = by_rank[0][name], loaded[0][index]
        assert got["bits"] == wanted["bits"], case
        assert got["losses"] == pytest.approx(wanted["losses"], rel=2e-3 if bf16 else 1e-6), case
        assert got["third"][0] == pytest.approx(wanted["third"][0], rel=2e-2 if bf16 else 1e-5), case
        if world_size == 3:  # as if it had not been interrupted
            assert got["third"] == wanted["third"], case


@pytest.mark.parametrize("name", list(SAVED))
def test_a_sliced_checkpoint_is_small_whole_and_peft_s(saved: Any, name: str) -> None:
    model, output, _ = saved
    checkpoint = Checkpoint.open(output / name / "checkpoint-2")
    files = {path.name for path in checkpoint.path.iterdir()}
    assert {f"training_state-0000{rank}-of-00003.safetensors" for rank in (1, 2, 3)} <= files
    assert "training_state.safetensors" not in files
    assert not list(checkpoint.path.parent.glob(".*"))
    trainable = checkpoint.read_trainable()
    assert sum(path.stat().st_size for path in checkpoint.path.iterdir()) <= 16 * trainable.num_elements + 1_000_000
    dtype = torch.bfloat16 if SAVED[name][1] else torch.float32
    base = Qwen2VLForConditionalGeneration.from_pretrained(model, dtype=dtype)
    weights = dict(PeftModel.from_pretrained(base, checkpoint.path, autocast_adapter_dtype=False).named_parameters())
    for key, state in trainable.parameters.items():
        assert torch.equal(weights[key], state.master.to(dtype)), key


def fail_on_one(ranks: Ranks, model: Path, output: Path, is_waited_for: bool) -> tuple[str, float]:
    engine = trained(ranks, model, 2, False)
    sliced_saver._LAST_SECONDS = 1.0
    saver = make_saver(engine, ranks, output)
    saver.begin(1)
    saver.finish()
    if ranks.rank == 1:

        def full(*_: Any) -> None:
            raise CheckpointError("rank 1 could not write: no space left")

        sliced_saver.write_slices = full
    began = time.monotonic()
    try:
        with saver:
            saver.begin(2)
            while not is_waited_for and not any(ranks.gather_objects(saver.has_failed)):  # as the loop's agreement
                time.sleep(0.05)
            saver.finish() if is_waited_for else saver.settle()
    except CheckpointError as error:
        return str(error), time.monotonic() - began
    return "", 0.0


@pytest.mark.parametrize("is_waited_for", [False, True])
def test_all_ranks_hear_that_one_could_not_write(saved: Any, tmp_path: Path, is_waited_for: bool) -> None:
    told = run_ranks(fail_on_one, 3, saved[0], tmp_path, is_waited_for, timeout_seconds=60)
    assert {message for message, _ in told} == {"rank 1 could not write: no space left"}
    assert max(seconds for _, seconds in told) < 20
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]


def test_a_hole_in_the_slices_is_told(saved: Any, tmp_path: Path) -> None:
    path = saved[1] / "zero2" / "checkpoint-2"
    checkpoint = Checkpoint.open(path)
    name = next(name for name in checkpoint.info["files"] if name.endswith("-00002-of-00003.safetensors"))
    info = checkpoint.info | {"files": {n: facts for n, facts in checkpoint.info["files"].items() if n != name}}
    with pytest.raises(CheckpointError, match="its slices do not hold all elements of "):
        Checkpoint(path, 2, info).read_trainable()
