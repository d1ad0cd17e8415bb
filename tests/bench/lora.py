"""`python -m tests.bench.lora`: a LoRA layer whose update is added by the product that makes it, beside PEFT's own."""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from tests.bench.report import ROOT, Report, write_page
from vlm_dist.model.fused_lora import fuse_lora

PAGE = ROOT / "docs" / "benchmarks" / "lora.md"
NUM_PAIRS = 20
NUM_ROWS = 1024  # tokens


@dataclass(frozen=True)
class Layer:
    """A linear layer of a real model."""

    name: str
    num_inputs: int
    num_outputs: int


LAYERS = (
    Layer("Qwen2-VL-2B q_proj", 1536, 1536),
    Layer("Qwen2-VL-2B up_proj", 1536, 8960),
    Layer("Qwen2-VL-2B down_proj", 8960, 1536),
)


def measure(layer: Layer, dtype: torch.dtype, dropout: float, device: torch.device, num_pairs: int) -> dict[str, Any]:
    """Forward and backward of one layer, ours and PEFT's in turns.

    Returns:
        Seconds, medians: `ours`, `peft`, `base` (the frozen layer alone); `ratio`: the median of the pairs' ratios.
    """
    base = nn.Sequential(nn.Linear(layer.num_inputs, layer.num_outputs, bias=False)).to(device, dtype)
    frozen = copy.deepcopy(base).requires_grad_(False)
    config = LoraConfig(r=16, lora_alpha=32, lora_dropout=dropout, target_modules=["0"])
    peft: nn.Module = get_peft_model(base, config, autocast_adapter_dtype=False).to(dtype)
    ours = copy.deepcopy(peft)
    assert fuse_lora(ours) == 1
    x = torch.randn(1, NUM_ROWS, layer.num_inputs, device=device, dtype=dtype).requires_grad_()
    gradient = torch.randn(1, NUM_ROWS, layer.num_outputs, device=device, dtype=dtype)

    def seconds(model: nn.Module) -> float:
        _wait(device)
        started = time.perf_counter()
        model(x).backward(gradient)
        _wait(device)
        return time.perf_counter() - started

    for model in (ours, peft, frozen) * 2:
        seconds(model)
    pairs = [(seconds(ours), seconds(peft)) for _ in range(num_pairs)]
    return {
        "ours": statistics.median(one for one, _ in pairs),
        "peft": statistics.median(other for _, other in pairs),
        "base": statistics.median(seconds(frozen) for _ in range(num_pairs)),
        "ratio": statistics.median(other / one for one, other in pairs),
    }


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    """Measure, print, write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer pairs, and no page")
    quick = parser.parse_args().quick
    torch.manual_seed(0)
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    report = Report()
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for layer in LAYERS:
            for dropout in (0.0, 0.05):
                found = measure(layer, dtype, dropout, device, 5 if quick else NUM_PAIRS)
                short = str(dtype).removeprefix("torch.")
                report.add(
                    f"{layer.name}, {short}, dropout {dropout:g}",
                    found["ours"] * 1e3,
                    "ms",
                    peer="PEFT",
                    peer_value=found["peft"] * 1e3,
                    ratio=found["ratio"],
                )
                times = " | ".join(f"{found[key] * 1e3:.1f} ms" for key in ("base", "peft", "ours"))
                rows.append(f"| {layer.name} | {short} | {dropout:g} | {times} | {found['ratio']:.2f} |")
    report.summarise()
    if not quick:
        write_page(PAGE, "LoRA layers", "make bench-lora", ["torch", "peft"], _body(rows, device))


def _body(rows: list[str], device: torch.device) -> str:
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU, one thread"
    return "\n".join(
        [
            f"Forward and backward of one layer with rank 16 over {NUM_ROWS} tokens, on {where}: {NUM_PAIRS} pairs in",
            "turns, medians; the ratio is the median of the pairs' own. The frozen layer alone is what neither can",
            "go below.",
            "",
            "| layer | dtype | dropout | frozen layer | PEFT | ours | ratio |",
            "|---|---|---|---|---|---|---|",
            *rows,
            "",
            "Ours adds the update with the product that makes it (`vlm_dist/model/fused_lora.py`); PEFT scales and",
            "adds it in passes over tensors as large as the layer's output.",
        ]
    )


if __name__ == "__main__":
    main()
