"""Leaving training as it was found."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn


@contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
    """Within, the model is in `eval()` mode; afterwards its modes, its caches and all generators are as before.

    `eval()` also turns gradient checkpointing off: layers checkpoint only while they train.
    """
    modes = [(part, part.training) for part in module.modules()]
    # Qwen's models keep the offsets of the last prompt's positions for the next token.
    kept = [(part, part.rope_deltas) for part in module.modules() if hasattr(part, "rope_deltas")]
    python, numpy = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        module.eval()
        try:
            yield
        finally:
            for part, training in modes:
                part.training = training
            for part, deltas in kept:
                part.rope_deltas = deltas
            random.setstate(python)
            np.random.set_state(numpy)
