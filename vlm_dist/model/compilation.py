"""The blocks of a model through torch.compile: each block's own call, with shapes that may change.

A block is compiled as it is called, with its wrapping for gradient checkpointing: the compiler sees what is to be
computed again. (transformers 5.17 still wraps around the call; what is compiled is then called twice, as any block is.)
Names of modules and parameters stay what they are, so that checkpoints and adapters do, too.

For stages 0 to 2: ZeRO-3 gathers the weights of each module in hooks around it, which no graph can hold.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vlm_dist.errors import ConfigError, ModelError
from vlm_dist.model.checkpointing import base_model, block_names
from vlm_dist.model.towers import find_towers, tower_of

KEY = "train.torch_compile"

#: Variants of a block's code that may exist at a time: with and without a mask, one row or several, each kind of layer,
#: frozen or trained, and what the compiler asks of alignment. All blocks share them, and torch's own limit is 8.
MAX_VARIANTS = 64
#: By this argument a block is told where one picture ends and the next begins, and cuts its tensors there in Python.
_CUTS = "cu_seqlens"
_COMPILER = {"torch._dynamo.exc", "torch._inductor.exc"}  # where its errors are defined


@dataclass(frozen=True)
class Compiled:
    """How many blocks of a tower are compiled.

    Attributes:
        tower: "vision", "projector" or "language".
        num_blocks: there are.
        num_compiled: go through the compiler.
        why_not: the reason, where not all do.
    """

    tower: str
    num_blocks: int
    num_compiled: int
    why_not: str | None

    def __str__(self) -> str:
        reason = f" ({self.why_not})" if self.why_not is not None else ""
        return f"{self.tower}: {self.num_compiled} of {self.num_blocks} blocks{reason}"


def check_compilation(is_wanted: bool, zero_stage: int) -> None:
    """Refuse before anything is loaded what cannot work.

    Args:
        is_wanted: `train.torch_compile`.
        zero_stage: of the DeepSpeed configuration.

    Raises:
        ConfigError: ZeRO-3.
    """
    if is_wanted and zero_stage == 3:
        raise ConfigError(
            f"{KEY}: got true under ZeRO-3, which gathers the weights of each module in hooks around it: a block is no "
            "one graph then; use deepspeed: ds_configs/zero2.json, or torch_compile: false"
        )


def try_compiler(backend: str) -> None:
    """Compile, run and differentiate a line of code, so that a machine without a compiler says so before the start.

    Args:
        backend: of torch.compile.

    Raises:
        ConfigError: it does not work here.
    """
    compiled = torch.compile(lambda value: (value.sin() * 2).sum(), backend=backend, dynamic=True, fullgraph=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"  # a GPU's code has another compiler than a CPU's
    value = torch.ones(4, 6, device=device, requires_grad=True)
    try:
        compiled(value).backward()  # type: ignore[no-untyped-call]
    except Exception as error:
        raise ConfigError(
            f"{KEY}: torch.compile does not work on this machine with torch_compile_backend: {backend}: "
            f"{_first_line(error)}; on a CPU it needs a C++ compiler (g++, or the one that CXX names), on a GPU Triton "
            "and a C compiler (CC); or set torch_compile: false"
        ) from error


def compile_blocks(model: nn.Module, backend: str) -> list[Compiled]:
    """Have each repeated block compiled at its first call. Call it after the adapter and gradient checkpointing.

    Lengths and numbers of rows are unknowns of the code from the beginning, and all blocks of a kind share it. Vision
    blocks that cut their tensors picture by picture are left as they are: code would be needed for every number of
    pictures.

    Args:
        model: a `PreTrainedModel`, or a `PeftModel` around one.
        backend: of torch.compile.

    Returns:
        What became of each tower.

    Raises:
        ModelError: nothing of the language model can be compiled.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    dynamo: Any = importlib.import_module("torch._dynamo")
    dynamo.config.recompile_limit = max(MAX_VARIANTS, dynamo.config.recompile_limit)
    # else a length that happens to be that of an attention head, when code is made, is taken for the same number
    importlib.import_module("torch.fx.experimental._config").use_duck_shape = False  # type: ignore[attr-defined]
    base = base_model(model)
    towers = find_towers(base)
    by_tower: dict[str, list[nn.Module]] = {"language": [], "projector": [], "vision": []}
    for name in block_names(base):
        by_tower[tower_of(name, towers)].append(base.get_submodule(name))
    found = []
    for tower, blocks in by_tower.items():
        reasons = [_why_not(block, GradientCheckpointingLayer) for block in blocks]
        chosen = [block for block, reason in zip(blocks, reasons, strict=True) if reason is None]
        for block in chosen:
            block.compile(backend=backend, dynamic=True, fullgraph=True)
        if blocks:
            why_not = next((reason for reason in reasons if reason is not None), None)
            found.append(Compiled(tower, len(blocks), len(chosen), why_not))
    language = next((one for one in found if one.tower == "language"), None)
    if language is None or not language.num_compiled:
        reason = language.why_not if language is not None else "it has none"
        raise ModelError(f"{KEY}: no block of the language model can be compiled: {reason}; set torch_compile: false")
    return found


def _why_not(block: nn.Module, layer: type[nn.Module]) -> str | None:
    if not isinstance(block, layer):
        return "the model's own code runs them"
    if _CUTS in inspect.signature(type(block).forward).parameters:
        return "their attention is cut picture by picture"
    return None


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Within, blocks run as they were before they were compiled.

    A prompt that grows token by token, with a cache whose layers are numbered, would need code of its own for each.
    """
    is_compiled = any(module._compiled_call_impl is not None for module in model.modules())
    with torch.compiler.set_stance("force_eager") if is_compiled else nullcontext():
        yield


def is_compile_error(error: BaseException) -> bool:
    """Whether the compiler failed, and not what it compiled."""
    return not _COMPILER.isdisjoint(kind.__module__ for kind in type(error).__mro__)


def compile_message(doing: str, error: BaseException) -> str:
    """What a compiler's error means for the run, in one line.

    Args:
        doing: in the words of the message, such as "step 7, forward".
        error: of the compiler.
    """
    places = re.findall(r'File "([^"]+)", line (\d+)', str(error))
    what = type(error).__name__ + (f" in {places[-1][0]}:{places[-1][1]}" if places else "")
    return (
        f"{KEY}: {doing}: a block of the model cannot be compiled: {what}: {_first_line(error)}; "
        "set torch_compile: false and go on with resume: auto (a checkpoint is the same with and without), or find out "
        "with torch_compile_backend: aot_eager whether the compiler or the model's code is to blame"
    )


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".;:") if lines else type(error).__name__
