"""The losses of groups of tokens: exact parts of the whole, whichever way the loss is computed."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from vlm_dist.loss import TokenGroups, token_loss_sum
from vlm_dist.loss.labelled import LabelledHead

VOCABULARY, WIDTH = 50, 8


def expected(logits: torch.Tensor, labels: torch.Tensor, groups: list[int]) -> list[float]:
    """Cross-entropy of each target, added up by group, in float64."""
    losses = [0.0, 0.0, 0.0]
    which = iter(groups)
    for row in range(labels.shape[0]):
        for position in range(1, labels.shape[1]):
            if labels[row, position] != -100:
                target = labels[row, position][None]
                losses[next(which)] += float(F.cross_entropy(logits[row, position - 1][None].double(), target))
    return losses


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lm_head = torch.nn.Linear(WIDTH, VOCABULARY, bias=False)

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.lm_head

    def forward(self, hidden: torch.Tensor, scale: float = 1.0) -> dict[str, torch.Tensor]:
        return {"logits": self.lm_head(hidden) * scale}


@pytest.mark.parametrize("max_chunk_elements", [VOCABULARY * 2, 2**20])
@pytest.mark.parametrize("is_labelled", [True, False])
def test_parts_are_exact_and_add_up(is_labelled: bool, max_chunk_elements: int) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(3, 9, WIDTH)
    labels = torch.randint(0, VOCABULARY, (3, 9))
    labels[torch.rand(3, 9) < 0.5] = -100
    labels[:, 0] = -100
    labels[1] = -100  # a row of dummies
    counts = (labels != -100).sum(1).tolist()
    sums = torch.zeros(3)
    groups = TokenGroups.of_samples([2, 1, 0], counts, sums)
    model = Model()
    logits = model(hidden)["logits"]
    exact = expected(logits.detach(), labels, [2] * counts[0] + [0] * counts[2])
    if is_labelled:
        head = LabelledHead(model, max_chunk_elements)
        with head.giving_loss(labels, -100, groups):
            loss = model(hidden)["loss"]
    else:
        loss = token_loss_sum(logits, labels, -100, max_chunk_elements, groups)
    loss.backward()
    assert sums.tolist() == pytest.approx(exact, rel=1e-6)
    assert float(sums.sum()) == pytest.approx(float(loss), rel=1e-6)
    assert model.lm_head.weight.grad is not None and float(sums[1]) == 0.0


def test_a_micro_batch_without_targets_adds_nothing() -> None:
    for samples in ([], [0, 1]):
        sums = torch.zeros(2)
        groups = TokenGroups.of_samples(samples, [0] * len(samples), sums)
        loss = token_loss_sum(torch.randn(1, 4, 7, requires_grad=True), torch.full((1, 4), -100), groups=groups)
        assert (float(loss), sums.tolist()) == (0.0, [0.0, 0.0])
