"""`python -m tests.bench.packing`: a training step over packs, without a mask, with one, and over padded rows."""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.bench.lengths import draw
from tests.bench.report import ROOT, Report, write_page
from vlm_dist.config.peft import PeftConfig
from vlm_dist.data.encoding.collate import Example, Padding, collate
from vlm_dist.data.encoding.packing import pack
from vlm_dist.families import family_for
from vlm_dist.loss import token_loss_sum
from vlm_dist.model import attach_adapter, run_frozen_towers_without_graph
from vlm_dist.model.attention.borders import install
from vlm_dist.model.attention.choice import use_varlen
from vlm_dist.model.flops import FlopModel
from vlm_dist.model.patch_embedding import use_matrix_products
from vlm_dist.model.positions import RopeIndex

PAGE = ROOT / "docs" / "benchmarks" / "packing.md"
MIXES = ("images", "mix")
#: Tokens of a pack -> how often its step is measured.
SIZES = {2048: 5, 4096: 3, 8192: 3}
QUICK_SIZES = {2048: 3, 4096: 1}
WAYS = ("varlen", "mask", "padding")
#: Least that a pack of 8,192 tokens gains over the mask.
AIM = 1.5
_MMAP_THRESHOLD = -3  # of glibc's mallopt
_PATCHES_OF_A_SIDE = 32  # of a tile: 448 pixels
_PATCH_VALUES, _START, _IMAGE, _END, _TEXT = 3 * 2 * 14 * 14, 1, 2, 3, 8

FAMILY = family_for("qwen2_vl")
LORA = PeftConfig(r=8, lora_alpha=16, lora_dropout=0.0)
TOWERS = {"vision": "freeze", "projector": "freeze", "language": "lora"}

Batch = tuple[dict[str, Any], Tensor]


def qwen(
    *, hidden: int, layers: int, heads: int, key_heads: int, inner: int, words: int, vision: dict[str, int]
) -> Any:
    """The configuration of a Qwen2-VL."""
    from transformers import Qwen2VLConfig

    parts = hidden // heads // 8
    return Qwen2VLConfig(
        text_config={
            "hidden_size": hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": key_heads,
            "intermediate_size": inner,
            "vocab_size": words,
            "bos_token_id": None,
            "eos_token_id": None,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [parts, 3 * parts // 2, parts * 4 - parts - 3 * parts // 2],
            },
        },
        vision_config={"hidden_size": hidden, "patch_size": 14, "mlp_ratio": 4, **vision},
        image_token_id=_IMAGE,
        vision_start_token_id=_START,
        vision_end_token_id=_END,
    )


#: Every part of the real one, and little of each.
SMALL = {"hidden": 256, "layers": 2, "heads": 8, "key_heads": 2, "inner": 768, "words": 1024}
SMALL_VISION = {"depth": 1, "embed_dim": 64, "num_heads": 4}
#: Qwen2-VL-7B: what the same steps cost there is counted, not measured.
LARGE = {"hidden": 3584, "layers": 28, "heads": 28, "key_heads": 4, "inner": 18944, "words": 152064}
LARGE_VISION = {"depth": 32, "embed_dim": 1280, "num_heads": 16}


def make_model(sizes: dict[str, int], vision: dict[str, int], *, varlen: bool) -> Any:
    """With its adapter, as a run makes it."""
    from transformers import Qwen2VLForConditionalGeneration

    torch.manual_seed(0)
    model: Any = Qwen2VLForConditionalGeneration._from_config(qwen(**sizes, vision=vision), attn_implementation="sdpa")
    use_matrix_products(model)
    install(model)
    if varlen:
        use_varlen(model)
    model = attach_adapter(model, LORA, TOWERS)
    run_frozen_towers_without_graph(model)
    return model.train()


@dataclass(frozen=True)
class Work:
    """The same samples, for each way.

    Attributes:
        mix: they are drawn from.
        size: most tokens of a pack.
        lengths: of the samples.
        batches: way -> inputs and labels.
    """

    mix: str
    size: int
    lengths: tuple[int, ...]
    batches: dict[str, Batch]

    @property
    def useful(self) -> int:
        """Tokens of the samples."""
        return sum(self.lengths)


def make_work(mix: str, size: int, rope: RopeIndex) -> Work:
    """Take samples as they are drawn while they fit; those longer than half a pack are left to larger ones."""
    left, chosen = size, []
    for tokens, tiles in zip(*(part.tolist() for part in draw(mix, 400, seed=1)), strict=True):
        if tokens <= min(left, size // 2):
            chosen.append((tokens, tiles))
            left -= tokens
    examples = [_example(tokens, tiles, number) for number, (tokens, tiles) in enumerate(chosen)]
    row = pack(examples, FAMILY, rope)
    rows = collate(examples, FAMILY, Padding(token_id=0, side="right", enabled=True, carries_loss=False))
    lengths = tuple(tokens for tokens, _ in chosen)
    return Work(mix, size, lengths, {"varlen": row, "mask": row, "padding": rows})


def _example(tokens: int, tiles: int, seed: int) -> Example:
    """A sample: its tiles as pictures, then its text, of which the last quarter carries loss."""
    generator = torch.Generator().manual_seed(seed)
    merged = (_PATCHES_OF_A_SIDE // 2) ** 2
    ids = torch.randint(_TEXT, 1024, (tokens,), generator=generator)
    place = 0
    for _ in range(min(tiles, (tokens - 1) // (merged + 2))):
        ids[place], ids[place + merged + 1] = _START, _END
        ids[place + 1 : place + merged + 1] = _IMAGE
        place += merged + 2
    visual = {}
    if count := place // (merged + 2):
        patches = count * _PATCHES_OF_A_SIDE**2
        visual["pixel_values"] = torch.rand(patches, _PATCH_VALUES, generator=generator)
        visual["image_grid_thw"] = torch.tensor([[1, _PATCHES_OF_A_SIDE, _PATCHES_OF_A_SIDE]] * count)
    labels = ids.clone()
    labels[: max(place, tokens * 3 // 4)] = -100
    mask = torch.ones_like(ids)
    kinds = (ids == _IMAGE).long()
    return Example({"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": kinds}, visual, labels)


def step(model: nn.Module, batch: Batch, device: torch.device) -> float:
    """Forward and backward: seconds of the GPU, or of the one thread on a CPU, where other processes do not count."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    inputs = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch[0].items()}
    labels = batch[1].to(device)
    model.zero_grad()
    started = clock()
    token_loss_sum(model(**inputs, use_cache=False).logits, labels).backward()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() - started


def peak_bytes(model: nn.Module, batch: Batch, device: torch.device) -> float:
    """The most that a step holds beyond what was held before it."""
    gc.collect()
    libc = ctypes.CDLL(None)
    libc.mallopt(_MMAP_THRESHOLD, 1 << 16)  # what is freed is given back at once
    libc.malloc_trim(0)
    peak = _peak_of(device)
    step(model, batch, device)
    found = peak()
    libc.mallopt(_MMAP_THRESHOLD, 1 << 25)
    return found


def _peak_of(device: torch.device) -> Callable[[], float]:
    """Begin to watch memory; the call that is returned tells the peak since, in bytes."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
        return lambda: float(torch.cuda.max_memory_allocated(device) - held)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = _resident("VmRSS")
    return lambda: float(_resident("VmHWM") - before)


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name + ":"))


def measure(work: Work, models: dict[str, Any], device: torch.device, count: int) -> dict[str, dict[str, float]]:
    """All ways in turns; medians.

    Returns:
        Way -> "seconds", "bytes", and "ratio": how many times as long as varlen, the median of the turns' own.
    """
    peaks = {way: peak_bytes(models[way], work.batches[way], device) for way in WAYS}
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(count):
        for way in WAYS:
            found[way].append(step(models[way], work.batches[way], device))
    return {
        way: {
            "seconds": statistics.median(some),
            "bytes": peaks[way],
            "ratio": statistics.median(one / ours for one, ours in zip(some, found["varlen"], strict=True)),
        }
        for way, some in found.items()
    }


def counted_ratios(work: Work, counters: dict[str, FlopModel]) -> dict[str, float]:
    """Operations that a device computes, as a multiple of varlen's, at the size of a 7B model."""
    costs = {way: counters[way].count(*work.batches[way]).hardware for way in WAYS}
    return {way: cost / costs["varlen"] for way, cost in costs.items()}


def main() -> None:
    """Measure, print, write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small packs alone, and no page")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    made = {varlen: make_model(SMALL, SMALL_VISION, varlen=varlen).to(device, dtype) for varlen in (True, False)}
    made[True].load_state_dict(copy.deepcopy(made[False].state_dict()))
    models = {way: made[way == "varlen"] for way in WAYS}
    with torch.device("meta"):
        large = {varlen: FlopModel.of(make_model(LARGE, LARGE_VISION, varlen=varlen)) for varlen in (True, False)}
    counters = {way: large[way == "varlen"] for way in WAYS}
    rope = RopeIndex(models["mask"].config)
    report = Report()
    rows = []
    for mix in MIXES:
        for size, count in (QUICK_SIZES if quick else SIZES).items():
            work = make_work(mix, size, rope)
            found = measure(work, models, device, count)
            counted = counted_ratios(work, counters)
            for way in WAYS[1:]:
                report.add(
                    f"useful tokens of {mix}, packs of {size}, beside {way}",
                    work.useful / found["varlen"]["seconds"],
                    "tokens/s",
                    peer=way,
                    peer_value=work.useful / found[way]["seconds"],
                    ratio=found[way]["ratio"],
                    ratio_aim=AIM if size == max(SIZES) and way == "mask" else None,
                )
                report.add(
                    f"peak memory of {mix}, packs of {size}, beside {way}",
                    found["varlen"]["bytes"] / 2**20,
                    "MiB",
                    peer=way,
                    peer_value=found[way]["bytes"] / 2**20,
                    ratio=found[way]["bytes"] / found["varlen"]["bytes"],
                )
            rows += [_row(work, way, found[way], counted[way]) for way in WAYS]
    report.summarise()
    if not quick:
        packages = ["torch", "transformers", "peft"]
        write_page(PAGE, "Packs without a mask", "make bench-packing", packages, _body(rows, device))


def _row(work: Work, way: str, found: dict[str, float], counted: float) -> str:
    shape = " x ".join(f"{count:,}" for count in work.batches[way][1].shape)
    speed = f"{work.useful / found['seconds']:,.0f} | {found['ratio']:.2f}"
    first = f"| {work.mix} | {work.size:,} | {len(work.lengths)} of {min(work.lengths)}–{max(work.lengths)}"
    return f"{first} | {way} | {shape} | {speed} | {found['bytes'] / 2**20:,.0f} MiB | {counted:.2f} |"


def _body(rows: list[str], device: torch.device) -> str:
    where = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else "the CPU, one thread (its own seconds), in float32"
    )
    return "\n".join(
        [
            "Forward and backward of one micro-batch with a small Qwen2-VL (two layers of 256, eight heads, two of",
            f"keys; the vision tower frozen, LoRA in the language model), on {where}. The same samples three times,",
            "in turns:",
            "",
            "* **varlen**: one row, attention of each sample over itself (`attn_implementation: varlen`, what `null`",
            "  means for packs, see [packing.md](../packing.md));",
            "* **mask**: the same row, SDPA with the block-diagonal mask that transformers makes of the positions;",
            "* **padding**: one row for each sample, SDPA with a mask of the padding.",
            "",
            "Lengths are drawn from the mixes of `tests/bench/lengths.py` as far as they fit; a tile is a picture of",
            "448 pixels. Medians; *times as long* is the median of the turns' own ratios. Memory is the peak of one",
            "step beyond what was held before it. The last column is no measurement: operations that a device computes",
            "for the same micro-batch with Qwen2-VL-7B, as a multiple of varlen's, by the formulas of",
            "[estimate.md](../estimate.md): in a small model attention is a larger part of a step than in a large one.",
            "",
            "| mix | pack | samples | way | rows | useful tokens/s | times as long | peak memory | 7B: operations |",
            "|---|---|---|---|---|---|---|---|---|",
            *rows,
        ]
    )


if __name__ == "__main__":
    main()
