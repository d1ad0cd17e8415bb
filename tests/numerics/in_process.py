"""Whole runs on forked ranks, as the composition root builds them, with the gradient of every step brought to light.

The gradient is what the optimizer is about to use: averaged over the ranks, in float32, before clipping where
`max_grad_norm` is 0. It is taken by torch's own hook before the optimizer's step, so that it is the same place in
every ZeRO stage, and put together by parameter name as checkpoints are.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.ranks import Ranks
from tests.tiny_run import TinyRun
from vlm_dist.build import RunParts, run_parts
from vlm_dist.config import load_run
from vlm_dist.engine import Engine, TrainableState, prepare_deepspeed


@dataclass
class Seen:
    """What a run did, step by step.

    Attributes:
        losses: of this rank's steps: the sum over its target tokens.
        targets: of all ranks.
        gradients: by parameter name; rank 0 alone has them.
        applied: whether there was an update.
        messages: for the log.
        state: at the end, on rank 0.
        error: what ended the run, if anything did.
    """

    losses: list[float] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    gradients: list[dict[str, Any]] = field(default_factory=list)
    applied: list[bool] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)
    state: dict[str, Any] | None = None
    error: str | None = None


def weights_for(shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
    """Weights by name that leave no gradient zero, as LoRA's own start does; a function of the name alone."""
    weights = {}
    for name, shape in shapes.items():
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
        generator = torch.Generator().manual_seed(seed)
        weights[name] = torch.randn(shape, generator=generator) * 0.5 / shape[-1] ** 0.5
    return weights


def start_anywhere(engine: Engine) -> None:
    """Give the engine the weights of `weights_for`. Collective: every rank calls this."""
    state = engine.collect_trainable()
    if state is not None:
        weights = weights_for({name: part.master.shape for name, part in state.parameters.items()})
        parameters = {
            name: type(part)(weights[name], part.exp_avg, part.exp_avg_sq) for name, part in state.parameters.items()
        }
        state = TrainableState(0, parameters, state.hyperparameters)
    engine.restore_trainable(state)


def watch(parts: RunParts, seen: Seen, *, gradients: bool) -> None:
    """Note what happens in every step."""
    engine, ranks = parts.trainer.engine, parts.trainer.ranks
    partitions = engine._resharder.partitions
    flats = partitions.flats
    now: dict[int, Tensor] = {}

    def note_gradients(optimizer: Any, args: Any, kwargs: Any) -> None:
        for index, flat in enumerate(flats):
            if flat.grad is not None and index not in now:
                now[index] = flat.grad.detach().float().clone()

    if gradients:
        engine._optimizer.register_step_pre_hook(note_gradients)
    step, loss = engine.step, engine.loss
    sums = [0.0]

    def watched_step() -> Any:
        outcome = step()
        seen.applied.append(outcome.applied)
        seen.losses.append(sums[0])
        sums[0] = 0.0
        if gradients and outcome.applied:
            assert set(now) == set(range(len(flats)))
            pieces = [
                (one.name, one.param_start, now[one.flat].view(-1)[one.flat_start :][: one.num_elements].numpy())
                for one in partitions.pieces(ranks.rank)
            ]
            by_rank = ranks.gather_objects(pieces)
            if ranks.is_main:
                seen.gradients.append(put_together(by_rank, partitions.shapes))
        now.clear()
        return outcome

    def watched_loss(*args: Any) -> Tensor:
        value = loss(*args)
        sums[0] += float(value.detach())
        return value

    engine.step, engine.loss = watched_step, watched_loss  # type: ignore[method-assign]
    judge_totals = parts.trainer.meter.window.add

    def watched_add(**kwargs: Any) -> None:
        seen.targets.append(kwargs["totals"]["num_target_tokens"])
        judge_totals(**kwargs)

    parts.trainer.meter.window.add = watched_add  # type: ignore[method-assign]


def put_together(by_rank: list[Any], shapes: Mapping[str, torch.Size]) -> dict[str, Any]:
    """Whole gradients by name; every element must have come from somewhere."""
    whole = {name: np.full(shape.numel(), np.nan, dtype=np.float32) for name, shape in shapes.items()}
    for name, start, values in (piece for pieces in by_rank for piece in pieces):
        whole[name][start : start + len(values)] = values
    return {name: values.reshape(tuple(shapes[name])) for name, values in whole.items()}


def run_here(
    ranks: Ranks,
    run: TinyRun,
    overrides: Sequence[str],
    *,
    gradients: bool = False,
    anywhere: bool = False,
    prepare: Callable[[RunParts], None] = lambda parts: None,
) -> Seen:
    """Build a run, do it, and take it apart. Collective: every rank calls this."""
    os.chdir(run.directory)
    prepare_deepspeed()
    seen = Seen()
    config = load_run(run.config, overrides)
    with run_parts(config, ranks) as parts:
        message = parts.log.message
        parts.log.message = lambda text: (seen.messages.append(text), message(text))[1]  # type: ignore[method-assign]
        parts.trainer.nonfinite._report = parts.log.message
        if anywhere:
            start_anywhere(parts.trainer.engine)
        watch(parts, seen, gradients=gradients)
        prepare(parts)
        try:
            parts.trainer.run()
        except Exception as error:  # noqa: BLE001 - given back
            seen.error = f"{type(error).__name__}: {error}"
        state = parts.trainer.engine.collect_trainable()
        if state is not None:
            seen.state = {
                name: {part: getattr(one, part).numpy() for part in ("master", "exp_avg", "exp_avg_sq")}
                for name, one in state.parameters.items()
            } | {"step": state.step}
        ranks.barrier()
    return seen
