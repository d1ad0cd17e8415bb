"""Checkpoints of the true sizes with random weights, written as the hub has them: shards of safetensors and an index.

The numbers are those of each model's published config.json (`tests/unit/estimate/true_sizes.py`); what differs is the
vocabulary: a small local tokenizer, whose ids fill only the beginning of a table of the true height.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

from tests.bench.data.pictures import texts
from tests.unit.estimate.true_sizes import MODELS
from vlm_dist.demo.tiny_model import DEFAULT_CORPUS, TinyShape, build_processor, build_tokenizer

NAMES = {"2b": "Qwen2-VL-2B", "7b": "Qwen2.5-VL-7B"}
INITIALIZER_RANGE = 0.02  # of both models' config.json
SHARD_BYTES = 2 << 30
MAX_PIXELS = 1280 * 28 * 28  # of one picture; 1,280 tokens

#: What a rehearsal has instead: the same architecture, the same code, sizes that a CPU trains in a second.
_TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 4096,
    "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
}
_TINY_VISION = {"depth": 2, "num_heads": 2}
_TINY_WIDTHS = {
    "qwen2_vl": {"embed_dim": 32, "hidden_size": 64},
    "qwen2_5_vl": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "out_hidden_size": 64,
        "fullatt_block_indexes": [1],
    },
}
#: Names in the published files, and in the model.
_PREFIXES = (("model.language_model.", "model."), ("model.visual.", "visual."))


@dataclass(frozen=True)
class Checkpoint:
    """What was written.

    Attributes:
        name: of the model.
        directory: config.json, shards, processor.
        model_class: of transformers.
        processor_class: of transformers.
        num_weights: all that the published model has; a tied head counts once.
        num_bytes: of the shards.
    """

    name: str
    directory: Path
    model_class: str
    processor_class: str
    num_weights: int
    num_bytes: int


def config_of(name: str, *, is_tiny: bool = False) -> dict[str, Any]:
    """The facts of config.json, before the tokenizer is known.

    Args:
        name: of `NAMES.values()`.
        is_tiny: sizes of a rehearsal.
    """
    facts = copy.deepcopy(MODELS[name][0])
    if is_tiny:
        facts |= _TINY
        facts["vision_config"] |= _TINY_VISION | _TINY_WIDTHS[facts["model_type"]]
    return facts


def write_checkpoint(directory: Path, name: str, device: torch.device, *, is_tiny: bool = False) -> Checkpoint:
    """Write a model that `from_pretrained` reads: random weights in bfloat16, made on the device, processor, tokenizer.

    Args:
        directory: is made.
        name: of `NAMES.values()`.
        device: where random numbers are drawn.
        is_tiny: sizes of a rehearsal.

    Raises:
        AssertionError: the number of weights is not the published model's.
    """
    facts, (_, model_class, processor_class, published) = config_of(name, is_tiny=is_tiny), MODELS[name]
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer([*DEFAULT_CORPUS, *texts()], num_merges=1200)
    processor = build_processor(TinyShape(min_pixels=56 * 56, max_pixels=MAX_PIXELS), tokenizer)
    processor.tokenizer.model_max_length = facts["max_position_embeddings"]
    if processor_class != type(processor).__name__:
        made = getattr(transformers, processor_class)
        processor = made(
            image_processor=processor.image_processor,
            video_processor=processor.video_processor,
            tokenizer=processor.tokenizer,
            chat_template=processor.chat_template,
        )
    processor.save_pretrained(directory)
    ids = {key: processor.tokenizer.convert_tokens_to_ids(token) for key, token in _TOKENS.items()}
    facts |= ids | {"architectures": [model_class]}
    (directory / "config.json").write_text(json.dumps(facts, indent=1))
    ends = {"eos_token_id": facts["eos_token_id"], "pad_token_id": facts["bos_token_id"], "do_sample": False}
    (directory / "generation_config.json").write_text(json.dumps(ends))
    weights = dict(_weights(directory, model_class))
    num_weights = sum(math.prod(shape) for shape in weights.values())
    assert is_tiny or num_weights == published, f"{name}: {num_weights} weights, published {published}"
    num_bytes = _write_shards(directory, weights, device)
    return Checkpoint(name, directory, model_class, processor_class, num_weights, num_bytes)


_TOKENS = {
    "bos_token_id": "<|endoftext|>",
    "eos_token_id": "<|im_end|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
}


def _weights(directory: Path, model_class: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names in the files and shapes, in the model's order; a tied head is not there."""
    found = getattr(transformers, model_class)
    config = found.config_class.from_pretrained(directory)
    with torch.device("meta"):
        model = found._from_config(config)
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    for name, tensor in model.state_dict().items():
        if name not in tied:
            yield _published(name), tuple(tensor.shape)


def _published(name: str) -> str:
    for own, published in _PREFIXES:
        if name.startswith(own):
            return published + name.removeprefix(own)
    return name


def _draw(name: str, shape: tuple[int, ...], generator: torch.Generator, device: torch.device) -> Tensor:
    """Norms are 1, biases 0, matrices normal, as transformers initialises them."""
    if len(shape) == 1:
        return torch.full(shape, 0.0 if name.endswith("bias") else 1.0, dtype=torch.bfloat16)
    drawn = torch.empty(shape, dtype=torch.bfloat16, device=device)
    return drawn.normal_(0.0, INITIALIZER_RANGE, generator=generator).cpu()


def _write_shards(directory: Path, weights: dict[str, tuple[int, ...]], device: torch.device) -> int:
    """Draw and write, a shard being written while the next is drawn; gives back the bytes of all tensors."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, shape in weights.items():
        num_bytes = 2 * math.prod(shape)
        if size and size + num_bytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += num_bytes
    generator = torch.Generator(device).manual_seed(0)
    places: dict[str, str] = {}
    pending: list[Future[None]] = []
    with ThreadPoolExecutor(2) as writers:
        for number, names in enumerate(shards, start=1):
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            tensors = {name: _draw(name, weights[name], generator, device) for name in names}
            places |= dict.fromkeys(names, file)
            pending.append(writers.submit(save_file, tensors, str(directory / file), {"format": "pt"}))
            if len(pending) > 2:
                pending.pop(0).result()
        for future in pending:
            future.result()
    total = 2 * sum(math.prod(shape) for shape in weights.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return total
