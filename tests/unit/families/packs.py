"""Packs of every kind of sample, for each family that packs, and what their samples are alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tests.unit.families.subjects import Subject, job
from tests.unit.families.zoo import CHECKPOINTS
from vlm_dist.config.peft import PeftConfig
from vlm_dist.data.encoding.collate import Example
from vlm_dist.data.encoding.packing import pack
from vlm_dist.data.types import IGNORE_INDEX
from vlm_dist.families import FAMILIES
from vlm_dist.loss import token_loss_sum
from vlm_dist.model import attach_adapter
from vlm_dist.model.attention.choice import use_varlen
from vlm_dist.model.towers import TOWERS

#: Tiny models whose families pack.
NAMES = [
    name
    for name in CHECKPOINTS
    if any(family.packing is not None and name in (family.name, *family.model_types) for family in FAMILIES)
]
SETTINGS = PeftConfig(r=2, lora_alpha=4, lora_dropout=0.0)
#: Of a logit, and of a gradient as a share of the largest one.
ROUNDING = 1e-5


@dataclass
class Pack:
    """One row: pictures, texts and a clip of uneven lengths, a segment of one token, and a dummy.

    Attributes:
        inputs: of the row.
        labels: [1, T].
        alone: inputs and labels of each segment by itself, in this order.
    """

    inputs: dict[str, Any]
    labels: Tensor
    alone: list[tuple[dict[str, Any], Tensor]]

    @property
    def lengths(self) -> list[int]:
        """Of the segments."""
        return [labels.shape[1] for _, labels in self.alone]


def make_pack(subject: Subject, *rows: str) -> Pack:
    """Make a pack of rows by name; all that the family takes, if none is named."""
    kinds = ("image", "video") if subject.family.takes_image_and_video else ("image",)
    names = rows or ("wide", "text", "three", "text2", *(["clip"] if "video" in kinds else ["tall"]))
    make = subject.materialiser(kinds=kinds, packing=True)
    _, outcomes = make._compose(replace(job(*names)), make._materialise)
    examples = [outcome.example for outcome in outcomes]
    one = examples[0]
    last = Example({key: value[-1:] for key, value in one.tokens.items()}, {}, torch.tensor([IGNORE_INDEX]))
    dummies = [one for one in make._dummies.missing([]) if not subject.family.equal_frames or "video" not in one.kinds]
    examples = [*examples[:2], last, *examples[2:], *dummies]
    inputs, labels = pack(examples, subject.family, make._rope_positions)
    alone = []
    for example in examples:
        part, of_part = pack([example], subject.family, make._rope_positions)
        del part["cu_seq_lens"], part["max_seq_len"]
        alone.append((part, of_part))
    return Pack(inputs, labels, alone)


def load(subject: Subject, *, varlen: bool) -> Any:
    """The model with LoRA in every tower that adds something to what it computes."""
    model = subject.load_model()
    if varlen:
        use_varlen(model)
    model = attach_adapter(model, SETTINGS, dict.fromkeys(TOWERS, "lora"))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(0.0, 0.1, generator=torch.Generator().manual_seed(len(name)))
    return model


def logits(model: Any, inputs: dict[str, Any]) -> Tensor:
    """[1, T, V]."""
    given = {key: value.clone() if isinstance(value, Tensor) else value for key, value in inputs.items()}
    found: Tensor = model(**given, use_cache=False).logits
    return found


def learn(model: Any, batches: list[tuple[dict[str, Any], Tensor]]) -> tuple[Tensor, float, dict[str, Tensor]]:
    """Logits of all, one after the other [T, V], their loss, and the gradient of each LoRA weight."""
    model.zero_grad()
    found, total = [], 0.0
    for inputs, labels in batches:
        out = logits(model, inputs)
        loss = token_loss_sum(out, labels)
        loss.backward()
        found.append(out[0].detach())
        total += loss.item()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return torch.cat(found), total, gradients


def assert_same(
    found: tuple[Tensor, float, dict[str, Tensor]], wanted: tuple[Tensor, float, dict[str, Tensor]]
) -> None:
    """Logits, loss and gradients, in this order."""
    assert (found[0] - wanted[0]).abs().max() <= ROUNDING * max(1.0, float(wanted[0].abs().max()))
    assert abs(found[1] - wanted[1]) <= ROUNDING * abs(wanted[1])
    assert found[2].keys() == wanted[2].keys()
    largest = max(float(gradient.abs().max()) for gradient in wanted[2].values())
    assert largest > 0
    for name, gradient in wanted[2].items():
        assert (found[2][name] - gradient).abs().max() <= ROUNDING * largest, name


class Shapes(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes by which operations results of [T, T] are made."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length
        self.squares: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, tuple | list) else (out,):
            if isinstance(one, Tensor) and one.shape[-2:] == (self.length, self.length):
                self.squares.append(str(func))
        return out


@contextmanager
def squares_of(length: int) -> Iterator[Shapes]:
    """Within, results of [T, T] are noted."""
    with Shapes(length) as found:
        yield found
