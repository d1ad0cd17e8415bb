"""What a GPU did in a traced step, by kind of kernel."""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: The first that fits a kernel's name, case aside.
KINDS: tuple[tuple[str, str], ...] = (
    ("communication", r"nccl"),
    ("attention", r"flash|fmha|attention|attn|sdpa"),
    ("matrix product", r"gemm|nvjet|cutlass|cublas|xmma|wgmma|dot_kernel|splitkreduce"),
    ("optimizer", r"multi_tensor|fusedadam|fused_adam"),
    ("copy", r"memcpy|memset|copy_kernel|direct_copy"),
    ("softmax and loss", r"softmax|nll|cross_entropy"),
    ("gather and scatter", r"index|gather|scatter|embedding|masked"),
    ("reduction", r"reduce|norm|mean|sum"),
    ("generated", r"^triton"),
    ("elementwise", r"elementwise|vectorized|cat_|catarray|fill"),
)
_CATEGORIES = ("kernel", "gpu_memcpy", "gpu_memset")


@dataclass(frozen=True)
class KernelTable:
    """Times of a trace.

    Attributes:
        seconds: that kernels of a kind took, by kind.
        busy_seconds: in which some kernel ran.
        span_seconds: from the first kernel to the end of the last.
        longest: names of the kernels that took most, with seconds and calls.
    """

    seconds: dict[str, float]
    busy_seconds: float
    span_seconds: float
    longest: list[tuple[str, float, int]]

    @property
    def lines(self) -> list[str]:
        """A Markdown table."""
        total = sum(self.seconds.values()) or 1.0
        found = ["| kernels | ms | share |", "|---|---|---|"]
        for kind, seconds in sorted(self.seconds.items(), key=lambda one: -one[1]):
            found.append(f"| {kind} | {seconds * 1e3:.1f} | {seconds / total:.1%} |")
        idle = self.span_seconds - self.busy_seconds
        found.append(f"| nothing ran | {idle * 1e3:.1f} | {idle / (self.span_seconds or 1.0):.1%} of the step |")
        return found


def kind_of(name: str) -> str:
    """Of a kernel's name."""
    return next((kind for kind, pattern in KINDS if re.search(pattern, name, re.IGNORECASE)), "other")


def read_trace(path: Path) -> KernelTable:
    """Sum up a Chrome trace of torch's profiler.

    Args:
        path: `.json.gz`.
    """
    with gzip.open(path, "rt", encoding="utf-8", errors="replace") as stream:
        events: list[dict[str, Any]] = json.load(stream)["traceEvents"]
    spans: list[tuple[float, float]] = []
    seconds: Counter[str] = Counter()
    by_name: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for event in events:
        if event.get("ph") == "X" and event.get("cat") in _CATEGORIES:
            duration = float(event["dur"]) / 1e6
            start = float(event["ts"]) / 1e6
            spans.append((start, start + duration))
            seconds[kind_of(event["name"])] += duration
            by_name[event["name"]] += duration
            calls[event["name"]] += 1
    busy, span = _covered(sorted(spans))
    longest = [(name, took, calls[name]) for name, took in by_name.most_common(12)]
    return KernelTable(dict(seconds), busy, span, longest)


def _covered(spans: list[tuple[float, float]]) -> tuple[float, float]:
    """Time in which at least one span is, and from the first start to the last end."""
    busy, end = 0.0, float("-inf")
    for start, stop in spans:
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return busy, (end - spans[0][0]) if spans else 0.0
