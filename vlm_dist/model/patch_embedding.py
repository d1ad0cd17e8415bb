"""Patch embeddings as matrix products: a convolution whose stride is its kernel cuts its input up and multiplies.

cuDNN and oneDNN have no good kernel for them, above all for Conv3d in bfloat16, where one layer can take longer than
the rest of the vision tower. Names and shapes of the weights stay, so that checkpoints do.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

# Shapes: N inputs, C channels, S one side of the input (of 2 or 3), k one side of the kernel, D features


class _PatchProduct(nn.Module):
    """Takes the place of a convolution's own forward."""

    weight: nn.Parameter  # [D, C, k, ...]
    bias: nn.Parameter | None
    kernel_size: tuple[int, ...]

    def forward(self, pixels: Tensor) -> Tensor:
        """Embed patches: [N, C, S, ...] -> [N, D, S // k, ...]; what is left at the ends is dropped, as it was."""
        sides, kernel = pixels.shape[2:], self.kernel_size
        counts = [side // size for side, size in zip(sides, kernel, strict=True)]
        num_sides = len(kernel)
        if tuple(sides) == kernel:  # patches that come one by one, as Qwen's do
            patches = pixels.flatten(1)
        else:
            for axis, (count, size) in enumerate(zip(counts, kernel, strict=True)):
                pixels = pixels.narrow(2 + axis, 0, count * size)
            split = [length for pair in zip(counts, kernel, strict=True) for length in pair]
            blocks = pixels.reshape(*pixels.shape[:2], *split)
            grid = [2 + 2 * axis for axis in range(num_sides)]
            patches = blocks.permute(0, *grid, 1, *(place + 1 for place in grid)).flatten(1 + num_sides)
        features = F.linear(patches, self.weight.flatten(1), self.bias)
        if features.dim() == 2:
            return features.reshape(*features.shape, *counts)
        return features.movedim(-1, 1)


class PatchConv2d(_PatchProduct, nn.Conv2d):
    """A Conv2d over patches of a picture."""


class PatchConv3d(_PatchProduct, nn.Conv3d):
    """A Conv3d over patches of a clip."""


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
