"""The loss without the logits: the head is applied to positions with a label alone, a chunk of them at a time.

Of 8 x 2048 positions and a vocabulary of 152k, all logits are 5 GB in bfloat16, and a float32 copy another 10 GB, while
mostly a small part of the positions carries a label at all.
"""

# Shapes: B batch, T tokens, D width of the model, V vocabulary, K positions with a label

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from vlm_dist.loss.cross_entropy import token_loss_sum
from vlm_dist.loss.deferred import Change, DeferredLogits
from vlm_dist.loss.groups import TokenGroups

#: Elements of the logits that exist at any time: 440 positions of a vocabulary of 152k, which keeps a GPU busy; with
#: their float32 copy and their gradient 8 bytes each, or 0.5 GiB.
MAX_CHUNK_ELEMENTS = 2**26


class LabelledHead:
    """Makes a model give its loss in the place of its logits, while told to.

    In the head's place the model finds something that only takes down what is asked of it. When its forward is over,
    the head is called once, as a module, so that ZeRO-3 gathers its weights once in the forward and once in the
    backward, on a rank without any label, too.

    Args:
        model: a transformers model, or a `PeftModel` around one. Before DeepSpeed wraps it: its hooks come after ours.
        max_chunk_elements: upper limit of the elements of a chunk of logits.

    Attributes:
        all_positions: why logits of all positions are computed after all; None where they are not, as far as is known
            before the first forward.
    """

    def __init__(self, model: Any, max_chunk_elements: int = MAX_CHUNK_ELEMENTS) -> None:
        base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._max_chunk_elements = max_chunk_elements
        self._labels: tuple[Tensor, int, TokenGroups | None] | None = None
        self._head: Any = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
        # a head that is the embeddings themselves is called as nobody's head elsewhere: every place of it is replaced
        self._places = [
            (parent, name)
            for parent in base.modules()
            for name, child in parent.named_children()
            if child is self._head and self._head is not None
        ]
        self.all_positions = self._why_not()
        base.register_forward_hook(self._give_loss)

    def _why_not(self) -> str | None:
        if self._head is None or not self._places:
            return "the model does not tell which module is its head"
        if type(self._head).forward is not nn.Linear.forward or "forward" in vars(self._head):
            return f"its head is no plain linear layer, but {type(self._head).__name__}"
        return None

    @contextmanager
    def giving_loss(self, labels: Tensor, ignore_index: int, groups: TokenGroups | None = None) -> Iterator[None]:
        """Within, the model's forward returns `{"loss": sum}`, as `token_loss_sum` defines it.

        Args:
            labels: [B, T], on the CPU: the number of labels is needed there, and asking a GPU for it would stall.
            ignore_index: marks positions without a label.
            groups: of the positions with a label; their parts of the sum are added to its sums.
        """
        self._labels = labels, ignore_index, groups
        swapped = self._places if self.all_positions is None else []
        for parent, name in swapped:
            parent._modules[name] = _Stand(self._head)
        try:
            yield
        finally:
            for parent, name in swapped:
                parent._modules[name] = self._head
            self._labels = None

    def _give_loss(self, module: nn.Module, args: Any, output: Any) -> Any:
        if self._labels is None:
            return output
        labels, ignore_index, groups = self._labels
        logits = output["logits"] if isinstance(output, dict) else output.logits
        if not isinstance(logits, DeferredLogits):
            return {"loss": token_loss_sum(logits, labels.to(logits.device), ignore_index, groups=groups)}
        if logits.hidden.shape[:2] != labels.shape:
            raise ValueError(f"hidden states {tuple(logits.hidden.shape)} and labels {tuple(labels.shape)} differ")
        index, targets = labelled_positions(labels, ignore_index)
        rows = logits.hidden.flatten(0, 1).index_select(0, index.to(logits.hidden.device, non_blocking=True))
        targets = targets.to(rows.device, non_blocking=True)
        groups = None if groups is None else groups.on_device()
        return {"loss": self._call_head(rows, targets, logits.changes, groups)}

    def _call_head(
        self, rows: Tensor, targets: Tensor, changes: Sequence[Change], groups: TokenGroups | None
    ) -> Tensor:
        head = self._head

        def forward(rows: Tensor) -> Tensor:  # the weight is whole only in here, under ZeRO-3
            chunk = max(1, self._max_chunk_elements // head.weight.shape[0])
            loss: Tensor = _HeadLossSum.apply(rows, head.weight, head.bias, targets, tuple(changes), chunk, groups)
            return loss

        head.forward = forward
        try:
            loss: Tensor = head(rows)
        finally:
            del head.forward
        return loss


def labelled_positions(labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Where a prediction is scored, and against what.

    Args:
        labels: [B, T].
        ignore_index: marks positions without a label.

    Returns:
        Indices into [B x T] and the tokens that come next there, [K] each.
    """
    targets = torch.full_like(labels, ignore_index)
    targets[:, :-1] = labels[:, 1:]
    flat = targets.flatten()
    index = (flat != ignore_index).nonzero().squeeze(1)
    return index, flat[index]


class _Stand(nn.Module):
    """In the head's place. What is read of the head itself (its weight, its dtype) is the head's own."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.__dict__["_head"] = head  # no child: it must not appear among the model's parameters twice

    def forward(self, hidden: Tensor) -> Any:
        return DeferredLogits(self._head, hidden) if hidden.dim() == 3 else self._head(hidden)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_head"], name)


def is_computed_again(weight_is_trained: bool, dtype: torch.dtype) -> bool:
    """Whether the backward computes chunks of logits once more.

    The gradient of what a frozen head reads is a multiple of what is known in the forward: nothing is computed again.
    Not so in float16, where it would lose its smallest parts before it is scaled, nor where the weight is trained: its
    gradient is as large as the weight.
    """
    return weight_is_trained or dtype == torch.float16


class _HeadLossSum(torch.autograd.Function):
    """Linear layer, changes of each logit, and cross-entropy, over chunks of logits (see `is_computed_again`)."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,  # [K, D]
        weight: Tensor,  # [V, D]
        bias: Tensor | None,
        targets: Tensor,  # [K]
        changes: tuple[Change, ...],
        chunk: int,
        groups: TokenGroups | None,
    ) -> Tensor:
        wants_rows, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        ctx.is_ready = wants_rows and not is_computed_again(wants_weight or wants_bias, rows.dtype)
        grad_rows = torch.empty_like(rows) if ctx.is_ready else None
        total = torch.zeros((), dtype=torch.float32, device=rows.device)
        normalisers = torch.empty(targets.shape, dtype=torch.float32, device=rows.device)
        for start in range(0, len(targets), chunk):
            part = slice(start, start + chunk)
            raw = F.linear(rows[part], weight, bias)
            logits = raw
            for change in changes:
                logits = change(logits)
            logits = logits.float()
            normaliser = logits.logsumexp(-1)
            losses = normaliser - logits.gather(-1, targets[part].unsqueeze(-1)).squeeze(-1)
            total += losses.sum()
            if groups is not None:
                groups.add(losses, start)
            if grad_rows is not None:
                del logits
                grad_rows[part] = _logit_gradient(raw, changes, targets[part], normaliser) @ weight
            normalisers[part] = normaliser
        if grad_rows is not None:
            ctx.save_for_backward(grad_rows)
        else:
            ctx.save_for_backward(rows, weight, bias, targets, normalisers)
        ctx.changes, ctx.chunk = changes, chunk
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.is_ready:
            (grad_rows,) = ctx.saved_tensors
            # in float32: a rounded factor would scale the whole gradient
            grad_rows = grad_rows.float().mul_(grad_output).to(grad_rows.dtype)
            return grad_rows, None, None, None, None, None, None
        rows, weight, bias, targets, normalisers = ctx.saved_tensors
        wants_rows, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        grad_rows = torch.zeros_like(rows) if wants_rows else None
        # over several chunks in float32, so that cutting rounds no more than one product would
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if wants_bias else None
        for start in range(0, len(targets), ctx.chunk):
            part = slice(start, start + ctx.chunk)
            gradient = _logit_gradient(
                F.linear(rows[part], weight, bias), ctx.changes, targets[part], normalisers[part], grad_output
            )
            if grad_rows is not None:
                grad_rows[part] = gradient @ weight
            if grad_weight is not None:
                grad_weight += gradient.T @ rows[part]
            if grad_bias is not None:
                grad_bias += gradient.sum(0, dtype=torch.float32)
        return (
            grad_rows,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            None,
            None,
            None,
            None,
        )


def _logit_gradient(
    logits: Tensor, changes: Sequence[Change], targets: Tensor, normalisers: Tensor, grad_output: Tensor | None = None
) -> Tensor:
    """Gradient of a chunk's loss with respect to what the linear layer gave, in its dtype; times `grad_output`."""
    if not changes:
        return _softmax_gradient(logits, targets, normalisers, grad_output)
    with torch.enable_grad():
        first = logits.detach().requires_grad_()
        last = first
        for change in changes:
            last = change(last)
    gradient = _softmax_gradient(last.detach(), targets, normalisers, grad_output)
    return torch.autograd.grad(last, first, gradient)[0]


def _softmax_gradient(logits: Tensor, targets: Tensor, normalisers: Tensor, grad_output: Tensor | None) -> Tensor:
    part = logits.float()
    # float() of float32 is the tensor itself, which may still be needed
    part = part.sub_(normalisers.unsqueeze(-1)) if part is not logits else part - normalisers.unsqueeze(-1)
    part.exp_()
    index = targets.unsqueeze(-1)
    part.scatter_add_(-1, index, torch.full_like(index, -1, dtype=part.dtype))
    return (part if grad_output is None else part.mul_(grad_output)).to(logits.dtype)
