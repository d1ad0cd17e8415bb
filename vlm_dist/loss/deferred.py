"""Logits that are not computed yet: what a model does to them behind its head is written down for later."""

# Shapes: B batch, T tokens, D width of the model, V vocabulary

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

#: A change of each logit by itself, such as a soft cap's division, tanh and product.
Change = Callable[[Tensor], Tensor]

_OF_EACH_LOGIT = frozenset(
    {torch.tanh, torch.mul, torch.div, torch.true_divide, torch.Tensor.tanh, torch.Tensor.mul, torch.Tensor.div}
)


class DeferredLogits:
    """Stands for `head(hidden)`.

    Multiplication and division by numbers, tanh and a change of dtype are written down: so models cap and scale their
    logits. Whoever asks for anything else is given the real logits of all positions, and works on with them.

    Args:
        compute: the head's real call, [B, T, D] -> [B, T, V].
        hidden: [B, T, D].
        changes: what was asked for so far, in this order.
    """

    def __init__(self, compute: Callable[[Tensor], Tensor], hidden: Tensor, changes: tuple[Change, ...] = ()) -> None:
        self._compute = compute
        self.hidden = hidden
        self.changes = changes
        self._real: Tensor | None = None

    def materialise(self) -> Tensor:
        """The real logits, [B, T, V]."""
        if self._real is None:
            logits = self._compute(self.hidden)
            for change in self.changes:
                logits = change(logits)
            self._real = logits
        return self._real

    def _then(self, change: Change) -> DeferredLogits:
        return DeferredLogits(self._compute, self.hidden, (*self.changes, change))

    def __mul__(self, other: Any) -> Any:
        return self._then(lambda x: x * other) if isinstance(other, int | float) else self.materialise() * other

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Any:
        return self._then(lambda x: x / other) if isinstance(other, int | float) else self.materialise() / other

    def tanh(self) -> DeferredLogits:
        """See `torch.tanh`."""
        return self._then(torch.tanh)

    def float(self) -> DeferredLogits:
        """See `Tensor.float`."""
        return self._then(Tensor.float)

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """See `Tensor.to`; a dtype alone is written down."""
        if len(args) == 1 and isinstance(args[0], torch.dtype) and not kwargs:
            return self._then(lambda x: x.to(args[0]))
        return self.materialise().to(*args, **kwargs)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        rest = (*args[1:], *(kwargs or {}).values())
        if func in _OF_EACH_LOGIT and isinstance(args[0], cls) and all(isinstance(x, int | float) for x in rest):
            return args[0]._then(lambda x: func(x, *args[1:], **(kwargs or {})))
        args, kwargs = tree_map(lambda x: x.materialise() if isinstance(x, cls) else x, (args, kwargs or {}))
        return func(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or not hasattr(Tensor, name):
            raise AttributeError(f"logits that are not computed yet have no {name!r}")
        return getattr(self.materialise(), name)

    def __getitem__(self, index: Any) -> Any:
        return self.materialise()[index]

    def __add__(self, other: Any) -> Any:
        return self.materialise() + other

    __radd__ = __add__

    def __sub__(self, other: Any) -> Any:
        return self.materialise() - other

    def __neg__(self) -> Any:
        return self * -1
