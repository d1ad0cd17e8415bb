"""What steps come to: padding, waiting, and the share of the ranks' time that samples themselves take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForImageTextToText, Qwen2_5_VLConfig

from tests.bench.ranks.batches import StepCosts
from tests.unit.estimate.true_sizes import MODELS
from vlm_dist.config.peft import PeftConfig
from vlm_dist.model import attach_adapter, run_frozen_towers_without_graph
from vlm_dist.model.flops import FlopModel, TextTokens
from vlm_dist.model.visual_tokens import VisualTokens

MODEL = "Qwen2.5-VL-7B"
_PATCHES_OF_TILE = (448 // 14) ** 2


@dataclass(frozen=True)
class TimeModel:
    """Operations of a micro-batch: token * S + pair * sum of squares + tile * P.

    Attributes:
        token: for each token of the language model.
        pair: for each square of a row's (or packed sample's) length.
        tile: for each 448 x 448 pixels of pictures.
    """

    token: float
    pair: float
    tile: float

    @classmethod
    def of_true_size(cls) -> TimeModel:
        """LoRA on the language model of `MODEL` beside a frozen tower, from our FLOP count; a fifth has labels."""
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(Qwen2_5_VLConfig(**MODELS[MODEL][0]), dtype=torch.bfloat16)
            policy = {"language": "lora"}
            adapted = attach_adapter(model, PeftConfig(r=16), policy)
        run_frozen_towers_without_graph(adapted)
        flops = FlopModel.of(adapted)

        def count(tokens: int, squares: float, patches: int, labelled: int) -> float:
            lengths = (int(squares**0.5),) if squares else ()
            visual = VisualTokens(
                {"pixels": patches, "patches": patches, "features": patches, "features/4": patches / 4},
                {"full": float(patches) ** 2, "window": patches * 64.0},
            )
            return flops.count_tokens(TextTokens(tokens, tokens, lengths, squares), visual, labelled).model

        return cls(
            token=count(5, 0.0, 0, 1) / 5, pair=count(0, 1e8, 0, 0) / 1e8, tile=count(0, 0.0, _PATCHES_OF_TILE, 0)
        )

    def costs(self, step: StepCosts) -> NDArray[np.float64]:
        """Operations of each micro-batch, [M, W]."""
        return self.token * step.computed + self.pair * step.squares + self.tile * step.tiles

    def alone(self, step: StepCosts) -> float:
        """Operations that the samples of a step need, each by itself."""
        return float(self.token * step.useful.sum() + self.pair * step.useful_squares + self.tile * step.tiles.sum())


@dataclass(frozen=True)
class Figures:
    """Of some steps.

    Attributes:
        num_steps: that were measured.
        padding: pad tokens / computed tokens.
        max_over_mean: computed tokens of a step's slowest rank / mean over the ranks.
        tiles_max_over_mean: the same for the vision tower's pictures.
        useful: tokens of samples / (W x computed tokens of the slowest rank), waiting once a step.
        useful_each: the same where ranks wait for each other after every micro-batch, as under ZeRO-2 and 3.
        useful_time: operations that the samples need, each alone / (W x operations of the slowest rank), waiting after
            every micro-batch; the vision tower counts.
        plan_seconds: to cut a step.
    """

    num_steps: int
    padding: float
    max_over_mean: float
    tiles_max_over_mean: float
    useful: float
    useful_each: float
    useful_time: float
    plan_seconds: float

    @classmethod
    def of(cls, steps: Sequence[StepCosts], model: TimeModel, plan_seconds: float) -> Figures:
        """Add steps up.

        Args:
            steps: at least one.
            model: of time.
            plan_seconds: to cut a step.
        """
        width = steps[0].computed.shape[1]
        useful = sum(step.useful.sum() for step in steps)
        computed = sum(step.computed.sum() for step in steps)
        slowest = sum(step.computed.sum(axis=0).max() for step in steps)
        slowest_each = sum(step.computed.max(axis=1).sum() for step in steps)
        times = [model.costs(step) for step in steps]
        tiles = sum(step.tiles.sum() for step in steps)
        return cls(
            num_steps=len(steps),
            padding=float(1 - useful / computed),
            max_over_mean=float(slowest * width / computed),
            tiles_max_over_mean=float(sum(step.tiles.sum(axis=0).max() for step in steps) * width / max(tiles, 1)),
            useful=float(useful / (width * slowest)),
            useful_each=float(useful / (width * slowest_each)),
            useful_time=float(
                sum(model.alone(step) for step in steps) / (width * sum(time.max(axis=1).sum() for time in times))
            ),
            plan_seconds=plan_seconds,
        )
