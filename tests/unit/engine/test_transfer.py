"""Copies ahead: what is asked for, in which queue, and what is taken; with a queue that writes down what it is told."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from vlm_dist.engine.transfer import Transfer

CPU = torch.device("cpu")


class Queue:
    def __init__(self) -> None:
        self.told: list[str] = []
        self.is_within = False

    @contextmanager
    def within(self) -> Iterator[None]:
        self.told.append("begin")
        self.is_within = True
        yield
        self.is_within = False
        self.told.append("end")

    def join(self, tensors: Iterable[Tensor]) -> None:
        self.told.append(f"join {len(list(tensors))}")


def inputs(value: float = 1.5) -> dict[str, object]:
    return {"input_ids": torch.tensor([[1, 2]]), "pixel_values": torch.tensor([value]), "max_seq_len": 2}


def test_a_copy_ahead_is_taken_once() -> None:
    queue = Queue()
    transfer = Transfer(CPU, torch.bfloat16, queue)
    first, second = inputs(1.5), inputs(2.5)
    transfer.begin(first)
    transfer.begin(first)  # asked again, copied once
    assert queue.told == ["begin", "end"]
    moved = transfer.take(first)
    assert queue.told == ["begin", "end", "join 2"]
    assert moved["pixel_values"].dtype == torch.bfloat16 and float(moved["pixel_values"]) == 1.5
    assert moved["input_ids"].dtype == torch.int64 and moved["max_seq_len"] == 2
    assert float(transfer.take(second)["pixel_values"]) == 2.5  # not ahead: copied now
    transfer.take(first)
    assert queue.told[2:] == ["join 2"]


def test_others_are_taken_in_between() -> None:
    queue = Queue()
    transfer = Transfer(CPU, torch.float32, queue)
    following, held_out = inputs(), inputs(7.0)
    transfer.begin(following)
    assert float(transfer.take(held_out)["pixel_values"]) == 7.0  # an evaluation
    transfer.take(following)
    assert queue.told == ["begin", "end", "join 2"]


def test_one_at_most_is_ahead_and_can_be_forgotten() -> None:
    queue = Queue()
    transfer = Transfer(CPU, torch.float32, queue)
    first, second = inputs(), inputs()
    transfer.begin(first)
    transfer.begin(second)
    transfer.take(first)
    assert "join 2" not in queue.told
    transfer.forget()
    transfer.take(second)
    assert "join 2" not in queue.told


def test_nothing_is_done_ahead_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    transfer = Transfer.to(CPU, torch.float32)
    given = inputs()
    transfer.begin(given)
    assert transfer._ahead is None
    moved = transfer.take(given)
    assert moved["pixel_values"] is given["pixel_values"]  # nor copied at all


def test_another_dtype_is_made_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """`.to(device, dtype)` of another dtype converts on the host, into memory that is not page-locked."""
    asked = []
    own = Tensor.to

    def to(self: Tensor, *args: object, **kwargs: object) -> Tensor:
        asked.append(kwargs)
        return own(self, *args, **kwargs)  # type: ignore[call-overload, no-any-return]

    monkeypatch.setattr(Tensor, "to", to)
    Transfer(CPU, torch.bfloat16).take({"pixel_values": torch.ones(2)})
    assert asked == [{"device": CPU, "non_blocking": True}, {"dtype": torch.bfloat16}]
