"""How much private memory each rank needs while a base is loaded under ZeRO-3.

python -m tests.engine.loading_memory 800 2 4     # megabytes of weights, then numbers of ranks
"""

from __future__ import annotations

import json
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from tests.engine import tiny
from tests.ranks import Ranks, run_ranks
from vlm_dist.engine import zero_init_context
from vlm_dist.engine.host_memory import freed_memory_goes_back

LAYERS = 8


def save_base(directory: Path, megabytes: int, shard: str = "50MB") -> int:
    """Write a bfloat16 Qwen2-VL of about that size in several shards; gives back its bytes."""
    unit = max(1, round((megabytes * 1e6 / 2 / LAYERS / 14.7) ** 0.5 / 48))  # a layer has some 14.7 hidden^2 weights
    small = json.loads((tiny.save_tiny_vlm(directory) / "config.json").read_text())
    small["text_config"] |= {
        "hidden_size": 48 * unit,
        "intermediate_size": 192 * unit,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [unit, unit, 2 * unit]},
    }
    small["text_config"].pop("layer_types", None)
    small["vision_config"]["hidden_size"] = 48 * unit
    config = Qwen2VLConfig(**small)
    for path in directory.glob("*.safetensors"):
        path.unlink()
    model = Qwen2VLForConditionalGeneration(config).to(torch.bfloat16)
    model.save_pretrained(directory, max_shard_size=shard)
    return sum(p.numel() * p.element_size() for p in model.parameters())


def private_bytes() -> int:
    """Anonymous memory of this process: not the pages of the files that it maps, which all processes share."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("this kernel does not tell RssAnon")


class Peak:
    """The largest private memory while it is entered, in bytes above what it was on entering."""

    def __enter__(self) -> Peak:
        self._start = self._largest = private_bytes()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._ended.wait(0.005):
            self._largest = max(self._largest, private_bytes())

    def __exit__(self, *_: Any) -> None:
        self._ended.set()
        self._thread.join()

    @property
    def bytes(self) -> int:
        return self._largest - self._start


def load(ranks: Ranks, directory: Path, stage: int) -> dict[str, float]:
    """Peak while loading, and what is held afterwards."""
    with zero_init_context(tiny.ds_config(stage, ranks.world_size, bf16=True)):
        Qwen2VLForConditionalGeneration  # noqa: B018 - DeepSpeed is imported and set up before the measurement
    start, before = time.perf_counter(), private_bytes()
    with Peak() as peak, zero_init_context(tiny.ds_config(stage, ranks.world_size, bf16=True)):
        model = Qwen2VLForConditionalGeneration.from_pretrained(directory, dtype=torch.bfloat16)
    held = private_bytes() - before
    largest = max(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in model.parameters())
    return {"peak": peak.bytes, "held": held, "largest": largest, "seconds": time.perf_counter() - start}


def measure(directory: Path, world_size: int, stage: int = 3) -> list[dict[str, float]]:
    return run_ranks(load, world_size, directory, stage, timeout_seconds=400)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        with freed_memory_goes_back():  # else the ranks, which are forked, would fill up what this has left in the heap
            base = save_base(Path(temporary), int(sys.argv[1]))
        for number in map(int, sys.argv[2:]):
            for rank, got in enumerate(measure(Path(temporary), number)):
                line = {
                    "base_MB": round(base / 1e6),
                    "ranks": number,
                    "rank": rank,
                    "seconds": round(got["seconds"], 1),
                }
                line |= {f"{key}_MB": round(got[key] / 1e6) for key in ("peak", "held", "largest")}
                print(json.dumps(line), flush=True)
