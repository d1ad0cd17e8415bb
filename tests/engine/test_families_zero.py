"""Every family of docs/models.md under ZeRO-3: no rank holds it, none waits for another, all learn what one would."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.engine import tiny
from tests.ranks import Ranks, run_ranks
from tests.unit.families.page import FAMILIES_SHOWN
from tests.unit.families.subjects import Subject, job, subject
from tests.unit.families.zoo.originals import ORIGINALS
from vlm_dist.config import PeftConfig
from vlm_dist.data.types import MicroBatch
from vlm_dist.engine import Engine, zero_init_context
from vlm_dist.loss import token_loss_sum
from vlm_dist.model import attach_adapter, enable_gradient_checkpointing
from vlm_dist.optim import parameter_groups

pytestmark = pytest.mark.engine

WORLD_SIZE = 2
#: Families whose towers ZeRO-2 meets as well, which has to find a gradient of each on every rank.
BELOW_ZERO_3 = ("qwen3_vl", "internvl", "paligemma", "idefics3")
LORA = PeftConfig(r=3, lora_alpha=6, lora_dropout=0.0)
TOWERS = dict.fromkeys(("vision", "projector", "language"), "lora")
#: Of each step, the rows of each rank: one has pictures, the other has none or nothing that can be read.
PICTURES = ((("wide", "tall"), ("text", "text2")), (("damaged", "damaged"), ("three", "wide")))
CLIPS = ((("text", "text2"), ("clip", "text")), (("clip",), ("damaged",)))
BOTH = ((("clip and picture", "wide"), ("text", "text2")), (("text",), ("clip", "tall")), (("damaged",), ("wide",)))

Step = list[MicroBatch]


def steps_of(one: Subject) -> list[Step]:
    """The micro-batches of each step, one a rank."""
    family = one.family
    if family.takes_image_and_video:
        asked = [(("image", "video"), BOTH)]
    else:
        asked = [(("image",), PICTURES)] + ([(("video",), CLIPS)] if family.takes_video else [])
    found = []
    for kinds, steps in asked:
        make = one.materialiser(kinds=kinds)
        found += [[make(job(*rows)) for rows in step] for step in steps]
    assert all(targets(step) for step in found)
    return found


def load(one: Subject) -> Any:
    """The model with its adapter, as a run makes it."""
    model = attach_adapter(one.load_model(), LORA, TOWERS)
    enable_gradient_checkpointing(model)
    return model.train()


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    return parameter_groups(model, 0.1)


def targets(step: Step) -> int:
    return sum(batch.num_target_tokens for batch in step)


def alone(one: Subject, steps: list[Step]) -> dict[str, Any]:
    """The same training in one process, without DeepSpeed."""
    model = load(one)
    optimizer = tiny.adamw(groups_of(model))
    losses = []
    for number, step in enumerate(steps):
        for group in optimizer.param_groups:
            group["lr"] = tiny.LEARNING_RATE * tiny.schedule(number)
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.grad = torch.zeros_like(parameter)  # no gradient is a gradient of zero
        losses.append(0.0)
        for batch in step:
            inputs = {name: value.clone() for name, value in batch.inputs.items()}
            loss = token_loss_sum(model(**inputs, use_cache=False).logits, batch.labels)
            (loss / targets(step)).backward()
            losses[-1] += float(loss.detach())
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return {
        "losses": losses,
        "weights": {name: p.detach() for name, p in trained.items()},
        "gradients": {name: optimizer.state[p]["exp_avg"] for name, p in trained.items()},
    }


def under_zero(ranks: Ranks, one: Subject, steps: list[Step], stage: int) -> dict[str, Any]:
    """What a rank saw; the weights on rank 0."""
    config = tiny.ds_config(stage, ranks.world_size)
    with zero_init_context(config):
        model = load(one)
    groups = groups_of(model)
    engine = Engine.initialise(model, tiny.adamw, groups, tiny.schedule, config, control_group=ranks.control)
    frozen = [p for p in engine.module.parameters() if not p.requires_grad]
    losses = []
    for step in steps:
        batch = step[ranks.rank]
        loss = engine.loss(batch.inputs, batch.labels)
        engine.backward(loss, targets(step))
        losses.append(float(loss.detach()))
        assert engine.step().applied
    found: dict[str, Any] = {
        "losses": losses,
        "held": sum(p.ds_tensor.numel() + p.numel() if stage == 3 else p.numel() for p in frozen),
        "frozen": sum(p.ds_numel if stage == 3 else p.numel() for p in frozen),
    }
    state = engine.collect_trainable()
    if state is not None:  # as numpy, which outlives the rank on its way to the test
        found["weights"] = {name: p.master.numpy() for name, p in state.parameters.items()}
        found["gradients"] = {name: p.exp_avg.numpy() for name, p in state.parameters.items()}
    engine.close()
    return found


def train_all(ranks: Ranks, steps: dict[str, list[Step]], asked: list[tuple[str, int]]) -> dict[Any, Any]:
    found = {}
    for name, stage in asked:
        try:
            found[name, stage] = under_zero(ranks, subject(name), steps[name], stage)
        except BaseException as error:
            error.add_note(f"{name} under ZeRO-{stage}")
            raise
    return found


def is_absent(name: str) -> bool:
    """Its authors' code is not ours to ship, and is not at hand."""
    return name in ORIGINALS and ORIGINALS[name].missing is not None


PRESENT = [name for name in FAMILIES_SHOWN if not is_absent(name)]
ASKED = [*((name, 3) for name in PRESENT), *((name, 2) for name in BELOW_ZERO_3)]
ABSENT = [
    pytest.param(name, 3, marks=pytest.mark.skip(reason=f"set {ORIGINALS[name].missing}"))
    for name in FAMILIES_SHOWN
    if is_absent(name)
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[dict[str, list[Step]], list[dict[Any, Any]]]]:
    """Micro-batches by family, and what each rank made of them; one pair of ranks trains all."""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLM_DIST_CACHE", str(tmp_path_factory.mktemp("converted")))
        steps = {name: steps_of(subject(name)) for name in PRESENT}
        for name in PRESENT:
            subject(name).prepare()
        yield steps, run_ranks(train_all, WORLD_SIZE, steps, ASKED, timeout_seconds=600)


@pytest.mark.parametrize(("name", "stage"), [*ASKED, *ABSENT])
def test_two_ranks_learn_what_one_process_does(trained: Any, name: str, stage: int) -> None:
    steps, found = trained
    ranks = [one[name, stage] for one in found]
    wanted = alone(subject(name), steps[name])
    losses = [sum(both) for both in zip(*(rank["losses"] for rank in ranks), strict=True)]
    assert losses == pytest.approx(wanted["losses"], rel=1e-5)
    assert set(ranks[0]["weights"]) == set(wanted["weights"])
    for key, weight in wanted["weights"].items():
        _assert_close(ranks[0]["gradients"][key], wanted["gradients"][key], f"gradient of {key}")
        torch.testing.assert_close(
            torch.from_numpy(ranks[0]["weights"][key]), weight, rtol=1e-4, atol=2e-5, msg=f"{name} {key}"
        )
    if stage == 3:
        for rank in ranks:
            assert 0.5 <= rank["held"] / rank["frozen"] < 0.52


def _assert_close(ours: Any, theirs: Tensor, what: str) -> None:
    torch.testing.assert_close(
        torch.from_numpy(ours), theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max()) + 1e-9, msg=what
    )
