"""InternVLChatModel checkpoints (InternVL 2 and its like) as directories in transformers' own format.

Their own code does not load any more: transformers 5 does not know its tied weights, and once that is mended the
rotary frequencies are what happened to be in memory, and the loss is not a number.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from vlm_dist.errors import ModelError
from vlm_dist.model.conversion.internvl_config import language_class, native_config
from vlm_dist.model.conversion.internvl_processor import generation_settings, native_processor, native_tokenizer
from vlm_dist.model.conversion.internvl_weights import Part, native_parts
from vlm_dist.model.conversion.tensor_files import StoredTensor, TensorWriter, stored_tensors

logger = logging.getLogger(__name__)

#: `model_type` of what is read and of what is written.
SOURCE_TYPE, TARGET_TYPE = "internvl_chat", "internvl"
MODEL_CLASS, PROCESSOR_CLASS = "InternVLForConditionalGeneration", "InternVLProcessor"
#: Raised whenever the result changes, so that what an older version has made is not used.
VERSION = "internvl_chat-1"
SMALL_FILES = (
    "config.json",
    "tokenizer_config.json",
    "added_tokens.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)


def write_processor(source: Path, target: Path) -> None:
    """Write processor and configuration, without weights.

    Raises:
        ModelError: see `native_processor` and `native_config`.
    """
    config = _read_config(source)
    processor = native_processor(source, config)
    processor.save_pretrained(target)
    native_config(config, processor.image_token_id).save_pretrained(target)


def write_checkpoint(source: Path, weights: list[Path], target: Path, progress: Callable[[], None]) -> None:
    """Write the whole checkpoint; reads and writes one tensor at a time.

    Args:
        source: directory with config.json and the tokenizer.
        weights: safetensors files.
        target: an empty directory.
        progress: called after each tensor.

    Raises:
        ModelError: a weight is missing, unknown or of the wrong shape; nothing has been written then.
    """
    from transformers import GenerationConfig

    config = _read_config(source)
    tokenizer = native_tokenizer(source)
    native = native_config(config, tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"))
    files = [stored_tensors(file) for file in weights]
    plan = _plan(files, language_class(config), native)
    write_processor(source, target)
    GenerationConfig(**generation_settings(config, tokenizer)).save_pretrained(target)
    index: dict[str, str] = {}
    for number, of_file in enumerate(plan, start=1):
        name = f"model-{number:05}-of-{len(plan):05}.safetensors" if len(plan) > 1 else "model.safetensors"
        announced = [(part.name, stored.dtype, part.shape) for stored, parts in of_file for part in parts]
        with TensorWriter(target / name, announced) as writer:
            for stored, parts in of_file:
                values = stored.read()
                for part in parts:
                    writer.write(part.name, part.cut(values))
                progress()
        index |= {part: name for part, *_ in announced}
    if len(plan) > 1:
        total = sum(stored.num_bytes for of_file in files for stored in of_file)
        content = {"metadata": {"total_size": total}, "weight_map": index}
        (target / "model.safetensors.index.json").write_text(json.dumps(content, indent=2), encoding="utf-8")


_Plan = list[list[tuple[StoredTensor, list[Part]]]]


def _plan(files: list[list[StoredTensor]], language: str, config: Any) -> _Plan:
    """What each stored tensor becomes, compared with what the native model has."""
    from transformers import InternVLForConditionalGeneration

    is_tied = config.tie_word_embeddings
    plan = [
        [
            (tensor, native_parts(tensor.name, tensor.shape, language, config.text_config))
            for tensor in of_file
            if not (is_tied and tensor.name == "language_model.lm_head.weight")
            and not tensor.name.endswith("rotary_emb.inv_freq")  # computed, not learned; old checkpoints store it
        ]
        for of_file in files
    ]
    with torch.device("meta"):
        model = InternVLForConditionalGeneration(config)
    expected = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    if is_tied:
        expected.pop("lm_head.weight", None)
    found = {part.name: part.shape for of_file in plan for _, parts in of_file for part in parts}
    for what, names in (
        ("lacks", sorted(expected.keys() - found.keys())),
        ("has, but the model has not,", sorted(found.keys() - expected.keys())),
        ("has in another shape", sorted(n for n in expected.keys() & found.keys() if expected[n] != found[n])),
    ):
        if names:
            shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
            raise ModelError(
                f"the checkpoint {what} {len(names)} weights: {shown}. config.json and weights do not agree"
            )
    return plan


def _read_config(source: Path) -> Mapping[str, Any]:
    try:
        content: Mapping[str, Any] = json.loads((source / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{source / 'config.json'} cannot be read: {error}") from error
    return content
