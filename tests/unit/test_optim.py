from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

from vlm_dist.config.train import TrainConfig
from vlm_dist.optim import make_lr_schedule, make_optimizer, parameter_groups

pytestmark = pytest.mark.filterwarnings("error")


def settings(**changes: Any) -> TrainConfig:
    return TrainConfig(**changes)


def model() -> nn.Module:
    net = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    net[2].requires_grad_(False)
    return net


def test_norms_and_biases_do_not_decay_and_frozen_parameters_do_not_train() -> None:
    net = model()
    decaying, fixed = parameter_groups(net, weight_decay=0.1)
    assert decaying["weight_decay"] == 0.1 and [id(p) for p in decaying["params"]] == [id(net[0].weight)]
    assert fixed["weight_decay"] == 0.0
    assert [id(p) for p in fixed["params"]] == [id(net[0].bias), id(net[1].weight), id(net[1].bias)]


def test_without_weight_decay_there_is_one_group() -> None:
    (group,) = parameter_groups(model(), weight_decay=0.0)
    assert len(group["params"]) == 4


def test_own_learning_rates_come_after_the_common_one_and_keep_norms_and_biases_from_decaying() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    groups = parameter_groups(net, 0.1, lambda name: 1e-6 if name.startswith("0.") else None)
    assert [(group.get("lr"), group["weight_decay"], len(group["params"])) for group in groups] == [
        (None, 0.1, 1),
        (None, 0.0, 3),
        (1e-6, 0.1, 1),
        (1e-6, 0.0, 1),
    ]
    optimizer = make_optimizer(settings(learning_rate=2e-4, weight_decay=0.1), groups)
    assert [group["lr"] for group in optimizer.param_groups] == [2e-4, 2e-4, 1e-6, 1e-6]


def test_the_optimizer_has_the_settings() -> None:
    groups = parameter_groups(model(), weight_decay=0.1)
    config = settings(learning_rate=2e-4, adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-6, weight_decay=0.1)
    optimizer = make_optimizer(config, groups)
    assert isinstance(optimizer, torch.optim.AdamW)
    for group, decay in zip(optimizer.param_groups, (0.1, 0.0), strict=True):
        assert (group["lr"], group["betas"], group["eps"]) == (2e-4, (0.8, 0.95), 1e-6)
        assert group["weight_decay"] == decay


def factors(num_steps: int = 20, **changes: Any) -> list[float]:
    schedule = make_lr_schedule(settings(**changes), num_steps)
    return [schedule(step) for step in range(num_steps)]


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant_with_warmup"])
@pytest.mark.parametrize("warmup", [{"warmup_steps": 4}, {"warmup_ratio": 0.2}, {"warmup_ratio": 0.16}])
def test_warm_up_rises_to_the_full_rate_and_wastes_no_step(kind: str, warmup: dict[str, Any]) -> None:
    values = factors(lr_scheduler_type=kind, **warmup)
    assert values[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert min(values) > 0


def test_shapes_of_the_decay() -> None:
    assert factors(4, lr_scheduler_type="linear", warmup_ratio=0) == pytest.approx([1, 0.75, 0.5, 0.25])
    assert factors(4, lr_scheduler_type="cosine", warmup_ratio=0) == pytest.approx(
        [1, 0.853553, 0.5, 0.146447], abs=1e-6
    )
    assert factors(4, lr_scheduler_type="constant", warmup_ratio=0.5) == [1, 1, 1, 1]
    assert factors(4, lr_scheduler_type="constant_with_warmup", warmup_ratio=0) == [1, 1, 1, 1]


def test_warmup_steps_win_over_the_ratio() -> None:
    values = factors(lr_scheduler_type="linear", warmup_steps=2, warmup_ratio=0.5)
    assert values.index(1.0) == 2 and all(a > b for a, b in pairwise(values[2:]))


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant", "constant_with_warmup"])
def test_any_length_of_run_and_warm_up_is_defined(kind: str) -> None:
    for num_steps in (1, 2, 3):
        schedule = make_lr_schedule(settings(lr_scheduler_type=kind, warmup_steps=5), num_steps)
        assert all(0 <= schedule(step) <= 1 for step in range(num_steps + 2))
