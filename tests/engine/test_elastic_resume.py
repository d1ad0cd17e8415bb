"""A checkpoint loads bit for bit into any ZeRO stage and any number of ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from peft import PeftModel
from transformers import Qwen2VLForConditionalGeneration

from tests.engine import tiny
from tests.ranks import Ranks, run_ranks
from vlm_dist.checkpoint import (
    Checkpoint,
    CheckpointStore,
    RunFacts,
    choose_checkpoint,
    restore_checkpoint,
    save_adapter,
    save_checkpoint,
)
from vlm_dist.engine import Engine
from vlm_dist.errors import CheckpointError

pytestmark = pytest.mark.engine

#: name -> (stage, bf16); each is saved by 2 ranks after two steps.
SAVED = {
    "zero0": (0, False),
    "zero0-bf16": (0, True),
    "zero1": (1, False),
    "zero2": (2, False),
    "zero3": (3, False),
    "zero1-bf16": (1, True),
    "zero3-bf16": (3, True),
}
#: what is loaded into which stage and precision.
LOADED = {
    1: [
        ("zero0", 3, False),
        ("zero3", 0, False),
        ("zero2", 3, False),
        ("zero2", 2, False),
        ("zero3", 1, False),
        ("zero3-bf16", 3, True),
    ],
    2: [
        ("zero2", 2, False),
        ("zero3", 3, False),
        ("zero1-bf16", 1, True),
        ("zero3", 2, False),
        ("zero2", 3, False),
        ("zero1-bf16", 3, True),
        ("zero3-bf16", 1, True),
        ("zero0-bf16", 0, True),
        ("zero0-bf16", 2, True),
        ("zero1-bf16", 0, True),
        ("zero2", 0, False),
    ],
    3: [
        ("zero0", 1, False),
        ("zero0-bf16", 3, True),
        ("zero3-bf16", 0, True),
        ("zero2", 3, False),
        ("zero3", 2, False),
        ("zero3-bf16", 2, True),
    ],
}
STEPS = [[tiny.micro_batch(10 * step + index, image=step != 1) for index in range(6)] for step in range(3)]


def probe_losses(engine: Engine) -> list[float]:
    """Losses of the third step's micro-batches, each computed on every rank: they depend on the weights alone."""
    engine.module.eval()
    with torch.no_grad():
        losses = [float(tiny.token_loss_sum(engine.forward(inputs), labels)) for inputs, labels in STEPS[2]]
    engine.module.train()
    return losses


def bits(engine: Engine) -> dict[str, Any] | None:
    """All masters and moments, as bytes, on rank 0."""
    state = engine.collect_trainable()
    if state is None:
        return None
    return {
        f"{name} {part}": t.numpy().tobytes() for name, s in state.parameters.items() for part, t in vars(s).items()
    }


def weights_match(engine: Engine, checkpoint: Checkpoint) -> bool:
    """Whether the model computes with the checkpoint's masters, rounded."""
    parameters = dict(engine.module.named_parameters())
    matches = []
    for name, state in checkpoint.read_trainable().parameters.items():
        with deepspeed.zero.GatheredParameters([parameters[name]], enabled=engine.zero_stage == 3):
            matches.append(torch.equal(parameters[name].detach(), state.master.to(engine.compute_dtype)))
    return all(matches)


def third_step(engine: Engine, ranks: Ranks) -> tuple[float | None, float]:
    _, outcome = tiny.run_step(engine, STEPS[2][ranks.rank :: ranks.world_size], tiny.num_targets(STEPS[2]))
    return outcome.grad_norm, outcome.learning_rate


def save_all(ranks: Ranks, model: Path, output: Path) -> dict[str, Any]:
    results = {}
    for name, (stage, bf16) in SAVED.items():
        engine = tiny.make_engine(model, tiny.ds_config(stage, ranks.world_size, bf16=bf16))
        for batches in STEPS[:2]:
            tiny.run_step(engine, batches[ranks.rank :: ranks.world_size], tiny.num_targets(batches))
        store = CheckpointStore(output / name)
        path = save_checkpoint(store, engine, ranks, 2, RunFacts(plan={"position": 2}, global_batch_size=6))
        assert path == output / name / "checkpoint-2"
        assert save_adapter(store, engine, ranks) == output / name / "adapter"
        results[name] = {"bits": bits(engine), "losses": probe_losses(engine), "third": third_step(engine, ranks)}
        results[name]["after"] = probe_losses(engine)
        engine.close()
    return results


def load_all(ranks: Ranks, model: Path, output: Path) -> list[dict[str, Any]]:
    results = []
    for name, stage, bf16 in LOADED[ranks.world_size]:
        engine = tiny.make_engine(model, tiny.ds_config(stage, ranks.world_size, bf16=bf16))
        tiny.run_step(engine, STEPS[1][: ranks.world_size][ranks.rank :][:1], 7)  # whatever was there is overwritten
        messages: list[str] = []
        store = CheckpointStore(output / name, report=messages.append)
        # Only rank 0 sees the disk.
        checkpoint = choose_checkpoint(store if ranks.is_main else CheckpointStore(Path("/nowhere")), ranks, "auto")
        assert checkpoint is not None
        assert checkpoint.info["plan"] == {"position": 2}
        restore_checkpoint(checkpoint, engine, ranks)
        assert weights_match(engine, checkpoint)
        result = {"bits": bits(engine), "losses": probe_losses(engine), "third": third_step(engine, ranks)}
        results.append({**result, "after": probe_losses(engine)})
        engine.close()
    return results


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[dict[str, Any]]]:
    root = tmp_path_factory.mktemp("elastic")
    model = tiny.save_tiny_vlm(root / "model")
    return model, root / "runs", run_ranks(save_all, 2, model, root / "runs", timeout_seconds=240)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_resumes_bit_for_bit(saved: Any, world_size: int) -> None:
    model, output, by_rank = saved
    loaded = run_ranks(load_all, world_size, model, output, timeout_seconds=240)
    for index, (name, stage, bf16) in enumerate(LOADED[world_size]):
        case = (name, f"zero{stage} on {world_size}")
        wanted, got = by_rank[0][name], loaded[0][index]
        assert got["bits"] == wanted["bits"], case
        # The same stage computes the same losses; other stages order sums differently, within rounding.
        rounding = 2e-3 if bf16 else 1e-6
        same_stage = SAVED[name][0] == stage
        assert got["losses"] == (wanted["losses"] if same_stage else pytest.approx(wanted["losses"], rel=rounding)), (
            case
        )
        if same_stage and world_size == 2:  # nothing has changed: as if the run had not been interrupted
            assert (got["third"], got["after"]) == (wanted["third"], wanted["after"]), case
        assert got["after"] == pytest.approx(wanted["after"], rel=2e-2 if bf16 else 1e-5), case
        norm, rate = got["third"]
        assert norm == pytest.approx(wanted["third"][0], rel=2e-2 if bf16 else 1e-5), case
        assert rate == wanted["third"][1], case  # the schedule goes on where it was
        assert all(rank[index]["losses"] == got["losses"] for rank in loaded), case


@pytest.mark.parametrize("name", list(SAVED))
def test_the_adapter_loads_with_peft(saved: Any, name: str) -> None:
    model, output, _ = saved
    checkpoint = Checkpoint.open(output / name / "checkpoint-2")
    trainable = checkpoint.read_trainable()
    dtype = torch.bfloat16 if SAVED[name][1] else torch.float32
    for directory in (checkpoint.path, output / name / "adapter"):
        base = Qwen2VLForConditionalGeneration.from_pretrained(model, dtype=dtype)
        loaded = PeftModel.from_pretrained(base, directory, autocast_adapter_dtype=False)
        weights = dict(loaded.named_parameters())
        for key, state in trainable.parameters.items():
            assert torch.equal(weights[key], state.master.to(dtype)), key
    config = json.loads((checkpoint.path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(model)
    size = sum(path.stat().st_size for path in checkpoint.path.iterdir())
    assert size <= 16 * trainable.num_elements + 1_000_000


def misfit(ranks: Ranks, model: Path, output: Path) -> list[str]:
    engine = tiny.make_engine(model, tiny.ds_config(3, ranks.world_size), r=4)
    before = bits(engine)
    checkpoint = choose_checkpoint(CheckpointStore(output / "zero2"), ranks, str(output / "zero2" / "checkpoint-2"))
    assert checkpoint is not None
    messages = []
    try:
        restore_checkpoint(checkpoint, engine, ranks)
    except CheckpointError as error:
        messages.append(str(error))
    assert bits(engine) == before
    (output / "file").touch()
    try:  # rank 0 cannot write: a file is where the directory should be
        save_checkpoint(CheckpointStore(output / "file"), engine, ranks, 1, RunFacts(plan={}, global_batch_size=1))
    except CheckpointError as error:
        messages.append(str(error))
    try:
        choose_checkpoint(CheckpointStore(output / "zero2"), ranks, str(output / "zero2" / "checkpoint-7"))
    except CheckpointError as error:
        messages.append(str(error))
    engine.close()
    return messages


def test_failures_reach_every_rank(saved: Any) -> None:
    model, output, _ = saved
    for messages in run_ranks(misfit, 2, model, output, timeout_seconds=60):
        assert len(messages) == 3, messages
        assert "(5, 32) in the checkpoint, (4, 32) in the model" in messages[0]
        assert "could not be written" in messages[1]
        assert "no such checkpoint" in messages[2]
