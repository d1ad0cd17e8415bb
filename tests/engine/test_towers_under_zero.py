"""Towers trained in full, own learning rates, variants of LoRA: ZeRO-2 and -3 train what a plain loop trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import Qwen2VLForConditionalGeneration

from tests.engine import tiny
from tests.ranks import Ranks, run_ranks
from vlm_dist.checkpoint import (
    CheckpointStore,
    RunFacts,
    StartingPoint,
    choose_checkpoint,
    restore_checkpoint,
    save_adapter,
    save_checkpoint,
    start_from,
)
from vlm_dist.config import PeftConfig
from vlm_dist.engine import Engine, zero_init_context
from vlm_dist.model import attach_adapter, make_room_for_tokens, tower_rates
from vlm_dist.optim import parameter_groups

pytestmark = pytest.mark.engine

LORA = {"vision": "lora", "projector": "lora", "language": "lora"}
#: name -> peft_config.yaml
VARIANTS: dict[str, dict[str, Any]] = {
    "projector full": {
        "towers": LORA | {"projector": "full"},
        "towers_learning_rate": {"vision": 1e-3, "projector": 3e-3, "language": None},
    },
    "all full": {"towers": dict.fromkeys(LORA, "full"), "towers_learning_rate": {"vision": 1e-3}},
    "dora": {"towers": LORA, "use_dora": True, "use_rslora": True},
    "bias": {"towers": LORA, "bias": "all"},
    "head": {"towers": LORA, "modules_to_save": ["lm_head", "embed_tokens"]},
    "new tokens": {"towers": LORA, "modules_to_save": ["lm_head", "embed_tokens"]},
}
NUM_NEW = 3
STEPS = [[tiny.micro_batch(10 * step + index) for index in range(4)] for step in range(2)]
WEIGHT_DECAY = 0.1


def settings(name: str) -> PeftConfig:
    return PeftConfig.model_validate({"r": 5, "lora_alpha": 8, "lora_dropout": 0.0, **VARIANTS[name]})


def build(directory: Path, name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, list[dict[str, Any]]]:
    """The model and its groups, as a run makes them."""
    peft = settings(name)
    base = Qwen2VLForConditionalGeneration.from_pretrained(directory, dtype=dtype)
    if name == "new tokens":
        size = base.config.get_text_config().vocab_size
        assert make_room_for_tokens(base, range(size, size + NUM_NEW)) == size + NUM_NEW
    model = attach_adapter(base, peft, peft.towers.model_dump())
    rates = tower_rates(model, peft.towers_learning_rate.model_dump())
    return model.train(), parameter_groups(model, WEIGHT_DECAY, rates)


def engine_of(directory: Path, name: str, stage: int, ranks: Ranks, bf16: bool = False) -> Engine:
    # large models have several sub-groups of parameters under ZeRO-3
    zero = {"sub_group_size": 5000} if stage == 3 and name == "all full" else {}
    config = tiny.ds_config(stage, ranks.world_size, bf16=bf16, zero=zero)
    with zero_init_context(config):
        model, groups = build(directory, name, torch.bfloat16 if bf16 else torch.float32)
    engine = Engine.initialise(model, tiny.adamw, groups, tiny.schedule, config)
    assert not zero or len(engine._zero.fp16_groups) > 2 * len(groups)
    return engine


def plain_loop(directory: Path, name: str) -> dict[str, Tensor]:
    """What the trainable weights are after the steps, without DeepSpeed."""
    torch.set_num_threads(1)
    model, groups = build(directory, name)
    optimizer = tiny.adamw(groups)
    rates = [group["lr"] for group in optimizer.param_groups]
    for index, batches in enumerate(STEPS):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * tiny.schedule(index)
        for inputs, labels in batches:
            (tiny.token_loss_sum(model(**inputs).logits, labels) / tiny.num_targets(batches)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


def masters(engine: Engine) -> dict[str, Any] | None:
    """As numpy, which outlives the rank on its way to the test; a tensor would travel as an open file of the rank."""
    state = engine.collect_trainable()
    return None if state is None else {name: one.master.numpy() for name, one in state.parameters.items()}


def train_all(ranks: Ranks, model: Path, output: Path) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    for name in VARIANTS:
        for stage in (2, 3):
            engine = engine_of(model, name, stage, ranks)
            for batches in STEPS:
                tiny.run_step(engine, batches[ranks.rank :: ranks.world_size], tiny.num_targets(batches))
            found[name, stage] = masters(engine)
            store = CheckpointStore(output / f"{name} {stage}")
            save_checkpoint(store, engine, ranks, 2, RunFacts(plan={}, global_batch_size=4))
            save_adapter(store, engine, ranks)
            engine.close()
    return found


def continue_all(ranks: Ranks, model: Path, output: Path) -> dict[Any, Any]:
    """Each stage's checkpoint in the other stage; and a new run from each final adapter."""
    found: dict[Any, Any] = {}
    for name in VARIANTS:
        for stage in (2, 3):
            engine = engine_of(model, name, 5 - stage, ranks)
            checkpoint = choose_checkpoint(CheckpointStore(output / f"{name} {stage}"), ranks, "auto")
            assert checkpoint is not None
            restore_checkpoint(checkpoint, engine, ranks)
            found["resumed", name, stage] = masters(engine)
            engine.close()
            engine = engine_of(model, name, 5 - stage, ranks, bf16=True)
            point = StartingPoint.open(output / f"{name} {stage}" / "adapter")
            point.check_settings(settings(name))
            start_from(point, engine, point.parameter_names(engine.module), ranks)
            found["started", name, stage] = masters(engine)
            outcome = tiny.run_step(engine, STEPS[0][ranks.rank :: 2], tiny.num_targets(STEPS[0]))[1]
            assert outcome.applied and outcome.learning_rate == tiny.LEARNING_RATE  # the common one, from the beginning
            engine.close()
    return found


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[Any, Any]]:
    root = tmp_path_factory.mktemp("towers")
    model = tiny.save_tiny_vlm(root / "model")
    return model, root / "runs", run_ranks(train_all, 2, model, root / "runs", timeout_seconds=200)[0]


@pytest.mark.parametrize("name", list(VARIANTS))
def test_zero_trains_what_a_plain_loop_trains(saved: Any, name: str) -> None:
    model, _, found = saved
    wanted = plain_loop(model, name)
    for stage in (2, 3):
        got = found[name, stage]
        assert set(got) == set(wanted)
        for key, weight in wanted.items():
            torch.testing.assert_close(
                torch.from_numpy(got[key]), weight, rtol=1e-4, atol=2e-5, msg=f"{name} zero{stage} {key}"
            )


@pytest.mark.parametrize("name", list(VARIANTS))
@pytest.mark.parametrize("stage", [2, 3])
def test_what_zero_saved_loads_without_our_code(saved: Any, name: str, stage: int) -> None:
    from safetensors.torch import load_file

    model, output, found = saved
    base = Qwen2VLForConditionalGeneration.from_pretrained(model, dtype=torch.float32)
    final = output / f"{name} {stage}" / "adapter"
    if name == "all full":
        assert not list(final.glob("adapter*"))
        base.load_state_dict(load_file(final / "trained_weights.safetensors"), strict=False)
        loaded: nn.Module = base
    else:
        if name == "new tokens":  # the base has to grow as it did in training
            base.resize_token_embeddings(base.config.get_text_config().vocab_size + NUM_NEW, mean_resizing=False)
        loaded = PeftModel.from_pretrained(base, final)
    trained, _ = build(model, name)
    with torch.no_grad():
        for key, parameter in trained.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.from_numpy(found[name, stage][key]))
        inputs, _ = STEPS[0][0]
        torch.testing.assert_close(loaded.eval()(**inputs).logits, trained.eval()(**inputs).logits)


def test_full_weights_resume_and_start_anew_at_the_other_stage(saved: Any) -> None:
    model, output, found = saved
    got = run_ranks(continue_all, 2, model, output, timeout_seconds=200)[0]
    for (_, name, stage), weights in got.items():
        for key, weight in weights.items():  # a float32 adapter is not rounded, though the model computes in bfloat16
            assert (weight == found[name, stage][key]).all(), (name, stage, key)
