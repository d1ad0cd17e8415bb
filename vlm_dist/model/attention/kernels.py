"""Which code computes attention over segments, chosen from what is installed and what is asked of it.

The kernels need a CUDA device and half precision. Anything else, and what they lack, is computed segment by segment.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vlm_dist.model.attention.segments import NO_WINDOW, attend_segments

_HALF = (torch.bfloat16, torch.float16)
#: Of one head, for the flash kernels.
_MAX_WIDTH, _WIDTH_STEP = 256, 8

#: q [T, H, D], k [T, K, D], v [T, K, D], borders, longest, causal, scale, window, dropout -> [T, H, D]
Kernel = Callable[[Tensor, Tensor, Tensor, Tensor, int, bool, float, int, float], Tensor]


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_lens: Tensor,
    max_seq_len: int | None,
    *,
    is_causal: bool,
    scale: float,
    window: int = NO_WINDOW,
    dropout: float = 0.0,
) -> Tensor:
    """Attention of each segment over itself, by the fastest code that computes just this.

    Args:
        query: [1, H, T, D].
        key: [1, K, T, D]; K divides H.
        value: [1, K, T, D].
        cu_seq_lens: int32 [N + 1] on the same device, from 0 to T.
        max_seq_len: the longest segment; None: nobody has told.
        is_causal: tokens see those before them alone.
        scale: of the scores.
        window: how many tokens, its own included, each sees at most; `NO_WINDOW`: all.
        dropout: share of the weights that are dropped.

    Returns:
        [1, T, H, D].
    """
    kernel = None if max_seq_len is None else _kernel_for(query, key, value, dropout)
    if kernel is None or max_seq_len is None:
        return attend_segments(
            query, key, value, cu_seq_lens, is_causal=is_causal, scale=scale, window=window, dropout=dropout
        )
    q, k, v = (tensor.transpose(1, 2)[0] for tensor in (query, key, value))
    return kernel(q, k, v, cu_seq_lens, max_seq_len, is_causal, scale, window, dropout).unsqueeze(0)


def kernel_name(device: torch.device, dtype: torch.dtype) -> str:
    """What computes on a device, in words."""
    if device.type != "cuda" or dtype not in _HALF:
        return f"SDPA sample by sample ({'CPU' if device.type == 'cpu' else str(dtype).removeprefix('torch.')})"
    if _flash_attn() is not None:
        return "flash_attn_varlen_func of flash-attn"
    return "torch.nn.attention.varlen" if _torch_varlen() is not None else "SDPA sample by sample"


def _kernel_for(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> Kernel | None:
    width = query.shape[-1]
    if not query.is_cuda or query.dtype not in _HALF or not query.dtype == key.dtype == value.dtype:
        return None
    if width != value.shape[-1] or width % _WIDTH_STEP or width > _MAX_WIDTH:
        return None
    if not torch.compiler.is_compiling() and (flash := _flash_attn()) is not None:
        return flash
    return _torch_varlen() if not dropout else None


@functools.cache
def _flash_attn() -> Kernel | None:
    """The package, where it is installed and loads."""
    if importlib.util.find_spec("flash_attn") is None:
        return None
    try:
        call: Any = importlib.import_module("flash_attn").flash_attn_varlen_func
    except (ImportError, OSError, AttributeError):  # made for another torch
        return None

    def kernel(
        q: Tensor, k: Tensor, v: Tensor, cu: Tensor, longest: int, causal: bool, scale: float, window: int, drop: float
    ) -> Tensor:
        sizes = _window_size(window, causal)
        out: Tensor = call(
            q, k, v, cu, cu, longest, longest, dropout_p=drop, softmax_scale=scale, causal=causal, window_size=sizes
        )
        return out

    return kernel


@functools.cache
def _torch_varlen() -> Kernel | None:
    """PyTorch's own, where it is built with flash attention."""
    try:
        call: Any = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    except (ImportError, AttributeError):
        return None
    takes_fewer_heads = "enable_gqa" in inspect.signature(call).parameters

    def kernel(
        q: Tensor, k: Tensor, v: Tensor, cu: Tensor, longest: int, causal: bool, scale: float, window: int, drop: float
    ) -> Tensor:
        more: dict[str, Any] = {"scale": scale, "window_size": _window_size(window, causal)}
        if q.shape[1] != k.shape[1] and takes_fewer_heads:
            more["enable_gqa"] = True
        elif q.shape[1] != k.shape[1]:
            k, v = (tensor.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for tensor in (k, v))
        out: Tensor = call(q, k, v, cu, cu, longest, longest, **more)  # one tensor twice: cuDNN asks for that
        return out

    return kernel


def _window_size(window: int, is_causal: bool) -> tuple[int, int]:
    """How far back and ahead a token sees, itself left out; -1 is no limit."""
    if not is_causal:
        return (-1, -1)
    return (-1 if window == NO_WINDOW else window - 1, 0)
