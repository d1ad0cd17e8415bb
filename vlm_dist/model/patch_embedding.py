"""Patch embeddings as matrix products: a convolution whose stride is its kernel cuts its input up and multiplies.

cuDNN and oneDNN have no good kernel for them, above all for Conv3d in bfloat16, where one layer can take longer than
the rest of the vision tower. Names and shapes of the weights stay, so that checkpoints do.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

# Shapes: N inputs, C channels, S one side of the input (of 2 or 3), k one side of the kernel, D features


class PatchConv2d(nn.Conv2d):
    """A Conv2d over patches of a picture."""

    def forward(self, input: Tensor) -> Tensor:
        """Embed patches: [N, C, H, W] -> [N, D, H // k, W // k]; what is left at the ends is dropped, as it was."""
        return _embed(input, self.weight, self.bias)


class PatchConv3d(nn.Conv3d):
    """A Conv3d over patches of a clip."""

    def forward(self, input: Tensor) -> Tensor:
        """Embed patches: [N, C, T, H, W] -> [N, D, T // k, H // k, W // k]."""
        return _embed(input, self.weight, self.bias)


def _embed(pixels: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Embed patches [N, C, S, ...] by a weight [D, C, k, ...]."""
    sides, kernel = pixels.shape[2:], weight.shape[2:]
    counts = [side // size for side, size in zip(sides, kernel, strict=True)]
    if sides == kernel:  # patches that come one by one, as Qwen's do
        features = F.linear(pixels.flatten(1), weight.flatten(1), bias)
        return features.reshape(*features.shape, *counts)
    for axis, (count, size) in enumerate(zip(counts, kernel, strict=True)):
        pixels = pixels.narrow(2 + axis, 0, count * size)
    split = [length for pair in zip(counts, kernel, strict=True) for length in pair]
    blocks = pixels.reshape(*pixels.shape[:2], *split)
    grid = [2 + 2 * axis for axis in range(len(kernel))]
    patches = blocks.permute(0, *grid, 1, *(place + 1 for place in grid)).flatten(1 + len(kernel))
    return F.linear(patches, weight.flatten(1), bias).movedim(-1, 1)


def use_matrix_products(model: nn.Module) -> int:
    """Let patch embeddings compute matrix products; weights and their names stay as they are.

    Args:
        model: is changed; also one that ZeRO-3 has partitioned.

    Returns:
        How many there are.
    """
    forms = {nn.Conv2d: PatchConv2d, nn.Conv3d: PatchConv3d}
    count = 0
    for module in model.modules():
        form = forms.get(type(module))  # type: ignore[arg-type]
        if form is not None and _is_patch_embedding(module):
            module.__class__ = form
            count += 1
    return count


def _is_patch_embedding(module: nn.Module) -> bool:
    assert isinstance(module, nn.Conv2d | nn.Conv3d)
    return (
        module.kernel_size == module.stride
        and module.padding in ("valid", (0,) * len(module.kernel_size))
        and set(module.dilation) == {1}
        and module.groups == 1
        and max(module.kernel_size) > 1
    )
