"""What the small files of a checkpoint say about it; of a directory, the hub and the hub's cache alike."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vlm_dist.errors import ModelError
from vlm_dist.model.conversion import converter_of
from vlm_dist.model.loading_errors import translated

_PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "added_tokens.json", "special_tokens_map.json")
#: Files whose `auto_map` may name the class, by the role of the class.
_AUTO_MAP_FILES = {
    "model_class": ("config.json",),
    "processor_class": ("processor_config.json", "preprocessor_config.json", "config.json"),
}
#: Keys of `auto_map` by the role of the class, the most fitting first.
_AUTO_CLASSES = {
    "model_class": ("AutoModelForImageTextToText", "AutoModelForVision2Seq", "AutoModelForCausalLM", "AutoModel"),
    "processor_class": ("AutoProcessor",),
}


def read_json(model_id: str, file_name: str, revision: str | None = None) -> dict[str, Any]:
    """Content of a JSON file of a checkpoint; empty where there is no such file.

    Raises:
        ModelError: config.json is missing, the file is out of reach or is not JSON.
    """
    from transformers.utils.hub import cached_file

    with translated(model_id, revision, "read"):
        path = cached_file(
            model_id,
            file_name,
            revision=revision or "main",
            _raise_exceptions_for_missing_entries=file_name == "config.json",
        )
    if path is None:
        return {}
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(
            f"{model_id}: could not read {path}, which is not valid JSON: {error}. Copy it again."
        ) from error
    return content if isinstance(content, dict) else {}


def check_json_files(model_id: str, revision: str | None) -> None:
    """Name a file of a processor that is no JSON: libraries say where in the text, but not in which file.

    Raises:
        ModelError: one is damaged.
    """
    for file_name in (*_PROCESSOR_FILES, *_TOKENIZER_FILES):
        read_json(model_id, file_name, revision)


def fetch_weights(model_id: str, revision: str | None) -> None:
    """Bring the weights of a hub repository into the hub's cache, as `from_pretrained` would.

    Raises:
        ModelError: they are out of reach.
    """
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
    from transformers.utils.hub import cached_file, get_checkpoint_shard_files

    wished: dict[str, Any] = {"revision": revision or "main", "_raise_exceptions_for_missing_entries": False}
    with translated(model_id, revision, "fetch the weights of"):
        if cached_file(model_id, SAFE_WEIGHTS_NAME, **wished) is not None:
            return
        index = cached_file(model_id, SAFE_WEIGHTS_INDEX_NAME, **wished)
        if index is not None:
            get_checkpoint_shard_files(model_id, index, revision=revision or "main")


def auto_map_reference(model_id: str, role: str, name: str | None, revision: str | None) -> str | None:
    """The reference ("file.Class") under which the model's repository ships a class.

    Args:
        model_id: hub id or local directory.
        role: "model_class" or "processor_class".
        name: of the class; None: the one for this role.
        revision: of the hub repository.
    """
    for file_name in _AUTO_MAP_FILES[role]:
        auto_map = read_json(model_id, file_name, revision).get("auto_map", {})
        keys = list(auto_map) if name is not None else [key for key in _AUTO_CLASSES[role] if key in auto_map]
        for reference in _references(auto_map, keys):
            if name is None or reference.rsplit(".", 1)[-1] == name:
                return reference
    return None


def native_class_name(model_id: str, role: str, revision: str | None) -> str | None:
    """Name of the class of transformers that a checkpoint belongs to, or of the one that it names itself."""
    config = read_json(model_id, "config.json", revision)
    model_type = str(config.get("model_type"))
    if role == "model_class":
        from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as MODELS

        found = MODELS.get(model_type)
        return _first(found) or _first(config.get("architectures"))
    for file_name in _PROCESSOR_FILES:
        name = read_json(model_id, file_name, revision).get("processor_class")
        if isinstance(name, str):
            return name
    from transformers.models.auto.processing_auto import (  # type: ignore[attr-defined]
        PROCESSOR_MAPPING_NAMES as PROCESSORS,
    )

    converter = converter_of(model_type)
    return _first(PROCESSORS.get(model_type)) or (converter.processor_class if converter is not None else None)


def _references(auto_map: Mapping[str, Any], keys: list[str]) -> Iterator[str]:
    for key in keys:
        value = auto_map[key]
        yield from (reference for reference in (value if isinstance(value, list) else [value]) if reference)


def _first(names: Any) -> str | None:
    if isinstance(names, list | tuple):
        return str(names[0]) if names else None
    return None if names is None else str(names)
