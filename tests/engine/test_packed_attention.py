"""Packs without a mask in an engine of two ranks, and in compiled blocks: they learn what their samples do alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.engine import tiny
from tests.engine.test_compiled_blocks import forgotten
from tests.ranks import Ranks, run_ranks
from tests.unit.families.packs import Pack, assert_same, learn, load, make_pack
from tests.unit.families.subjects import subject
from vlm_dist.engine import Engine, zero_init_context
from vlm_dist.model import compile_blocks, enable_gradient_checkpointing
from vlm_dist.optim import parameter_groups

pytestmark = pytest.mark.engine

__all__ = ["forgotten"]  # a fixture

WORLD_SIZE = 2
FAMILIES = ("qwen2_vl", "qwen2_5_vl", "mistral3")
#: Of each step, the rows of each rank.
STEPS = ((("wide", "text"), ("three", "text2", "tall")), (("text", "tall", "text2"), ("wide",)))

Step = list[Pack]


def targets(step: Step) -> int:
    return sum(int((pack.labels[:, 1:] != -100).sum()) for pack in step)


def alone(name: str, steps: list[Step]) -> dict[str, Any]:
    """Sample by sample, in one process, without DeepSpeed, with the model's own attention."""
    model = load(subject(name), varlen=False).train()
    optimizer = tiny.adamw(parameter_groups(model, 0.1))
    losses = []
    for number, step in enumerate(steps):
        for group in optimizer.param_groups:
            group["lr"] = tiny.LEARNING_RATE * tiny.schedule(number)
        _, loss, gradients = learn(model, [one for pack in step for one in pack.alone])
        losses.append(loss)
        for parameter_name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.grad = gradients[parameter_name] / targets(step)
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
    trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
    return {"losses": losses, "gradients": {key: optimizer.state[p]["exp_avg"] for key, p in trained.items()}}


def under_zero(ranks: Ranks, name: str, steps: list[Step], stage: int) -> dict[str, Any]:
    config = tiny.ds_config(stage, ranks.world_size)
    model = load_under_zero(name, config)
    groups = parameter_groups(model, 0.1)
    engine = Engine.initialise(model, tiny.adamw, groups, tiny.schedule, config, control_group=ranks.control)
    losses = []
    for step in steps:
        pack = step[ranks.rank]
        loss = engine.loss(pack.inputs, pack.labels)
        engine.backward(loss, targets(step))
        losses.append(float(loss.detach()))
        assert engine.step().applied
    found: dict[str, Any] = {"losses": losses}
    state = engine.collect_trainable()
    if state is not None:  # as numpy, which outlives the rank on its way to the test
        found["gradients"] = {key: p.exp_avg.numpy() for key, p in state.parameters.items()}
    engine.close()
    return found


def load_under_zero(name: str, config: dict[str, Any]) -> Any:
    with zero_init_context(config):
        model = load(subject(name), varlen=True)
    enable_gradient_checkpointing(model)
    return model.train()


def train_all(ranks: Ranks, steps: dict[str, list[Step]], asked: list[tuple[str, int]]) -> dict[Any, Any]:
    return {(name, stage): under_zero(ranks, name, steps[name], stage) for name, stage in asked}


ASKED = [(name, stage) for name in FAMILIES for stage in (2, 3)]


@pytest.fixture(scope="module")
def trained() -> tuple[dict[str, list[Step]], list[dict[Any, Any]]]:
    torch.set_num_threads(1)
    steps = {name: [[make_pack(subject(name), *rows) for rows in step] for step in STEPS] for name in FAMILIES}
    return steps, run_ranks(train_all, WORLD_SIZE, steps, ASKED, timeout_seconds=300)


@pytest.mark.parametrize(("name", "stage"), ASKED)
def test_packs_on_two_ranks_are_their_samples_in_one_process(trained: Any, name: str, stage: int) -> None:
    steps, found = trained
    wanted = alone(name, steps[name])
    ranks = [one[name, stage] for one in found]
    losses = [sum(both) for both in zip(*(rank["losses"] for rank in ranks), strict=True)]
    assert losses == pytest.approx(wanted["losses"], rel=1e-5)
    largest = max(float(gradient.abs().max()) for gradient in wanted["gradients"].values())
    for key, gradient in wanted["gradients"].items():
        difference = (torch.from_numpy(ranks[0]["gradients"][key]) - gradient).abs().max()
        assert difference <= 1e-4 * largest, key


@pytest.mark.usefixtures("forgotten")
@pytest.mark.parametrize(("name", "recomputed"), [("qwen2_vl", False), ("llava", True)])
def test_compiled_blocks_learn_the_same_from_packs(name: str, recomputed: bool) -> None:
    """And a pack of another length, or of another number of samples, is no reason to compile again."""
    from torch._dynamo.testing import CompileCounterWithBackend

    one = subject(name)
    model = load(one, varlen=True).train()
    if recomputed:
        enable_gradient_checkpointing(model)
    counting: Any = CompileCounterWithBackend("aot_eager")
    language = next(found for found in compile_blocks(model, counting) if found.tower == "language")
    assert language.num_compiled == language.num_blocks
    plain = load(one, varlen=False).train()
    graphs = []
    for rows in (("wide", "text", "three"), ("text", "tall"), ("tall", "text2", "wide", "long", "text")):
        pack = make_pack(one, *rows)
        assert_same(learn(model, [(pack.inputs, pack.labels)]), learn(plain, pack.alone))
        graphs.append(int(counting.frame_count))
    assert graphs[1] == graphs[2]
