"""Patch embeddings compute the same as the convolutions that they were."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tests.unit.families.zoo import CHECKPOINTS
from vlm_dist.model.patch_embedding import PatchConv2d, PatchConv3d, use_matrix_products


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("conv", "shape"),
    [
        (nn.Conv2d(3, 8, 14, 14), (2, 3, 42, 28)),
        (nn.Conv2d(3, 8, 14, 14, bias=False), (2, 3, 45, 30)),  # not a multiple: what is left is dropped
        (nn.Conv2d(3, 8, (4, 7), (4, 7)), (1, 3, 4, 7)),
        (nn.Conv3d(3, 8, (2, 14, 14), (2, 14, 14), bias=False), (5, 3, 2, 14, 14)),
        (nn.Conv3d(3, 8, (2, 4, 6), (2, 4, 6)), (2, 3, 4, 9, 12)),
    ],
)
def test_outputs_and_gradients_are_those_of_the_convolution(conv, shape, dtype):
    torch.manual_seed(0)
    slow = copy.deepcopy(conv).to(dtype)
    fast = copy.deepcopy(slow)
    assert use_matrix_products(fast) == 1
    assert list(fast.state_dict()) == list(slow.state_dict())
    outputs = []
    for module in (slow, fast):
        pixels = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
        out = module(pixels)
        out.float().square().sum().backward()
        outputs.append([out, pixels.grad, *(parameter.grad for parameter in module.parameters())])
    bound = 1e-5 if dtype is torch.float32 else 2e-2
    for one, other in zip(*outputs, strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype
        assert (one - other).abs().max() <= bound * one.abs().max()


@pytest.mark.parametrize(
    "conv",
    [nn.Conv2d(3, 8, 3, 1), nn.Conv2d(3, 8, 4, 4, padding=1), nn.Conv2d(4, 8, 4, 4, groups=2), nn.Conv2d(3, 8, 1, 1)],
)
def test_other_convolutions_are_left_alone(conv):
    assert use_matrix_products(conv) == 0 and type(conv) is nn.Conv2d


@pytest.mark.parametrize("name", sorted(CHECKPOINTS))
def test_every_family_has_its_patch_embedding_found(name):
    model, _ = CHECKPOINTS[name].build()
    keys = list(model.state_dict())
    assert use_matrix_products(model) == (2 if name == "glm4v" else 1)  # GLM's merges patches by another
    assert list(model.state_dict()) == keys
    found = [module for module in model.modules() if isinstance(module, PatchConv2d | PatchConv3d)]
    assert isinstance(found[0], PatchConv3d) == (name.startswith(("qwen", "glm")))  # whose pixels come as patches
