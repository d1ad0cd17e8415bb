"""Names what token counts depend on besides the data, so that counts of one set-up are never taken for another's."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from vlm_dist.config.vlm_collator import VlmCollatorConfig
from vlm_dist.families import Family

#: Raised whenever our own way from columns to tokens changes what is counted.
COUNT_VERSION = 1

#: Their tokenisation, resizing and expansion decide the counts.
_PACKAGES = ("transformers", "tokenizers", "pillow")

#: Sections and keys of vlm_collator_config.yaml that decide the counts.
_SECTIONS = (
    "dataset_columns",
    "data_processing",
    "message_format",
    "image_processing",
    "video_processing",
    "text_processing",
)

#: Keys in them that decide nothing of a sample.
_BESIDE = {"pad_to_multiple_of"}

_PARTS = ("image_processor", "video_processor", "feature_extractor")


def fingerprint(
    processor: Any, family: Family, config: VlmCollatorConfig, renames: Mapping[str, str] | None = None
) -> str:
    """Digest all that the number of tokens of a given sample depends on.

    Args:
        processor: of the model: its class, its own and its parts' settings, tokenizer and chat template are read.
        family: its row in the table.
        config: from columns to tokens.
        renames: `columns` of the source: the same shard may be read under other names.

    Returns:
        32 hex digits, the same in every process.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    facts = {
        "version": COUNT_VERSION,
        "packages": {name: version(name) for name in _PACKAGES},
        "processor": _settings(processor),
        "parts": {name: _settings(part) for name in _PARTS if (part := getattr(processor, name, None)) is not None},
        "tokenizer": [type(tokenizer).__name__, _vocabulary(tokenizer)],
        "templates": [getattr(one, "chat_template", None) for one in (processor, tokenizer)],
        "family": asdict(family),
        "collator": {name: getattr(config, name).model_dump(mode="json", exclude=_BESIDE) for name in _SECTIONS},
        "mask_input_tokens": config.label_masking.mask_input_tokens,  # decides where a text may be cut
        "renames": dict(renames or {}),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=_plain).encode()).hexdigest()[:32]


def _settings(part: Any) -> list[Any]:
    """Class and settings of a processor or of one of its parts."""
    to_dict = getattr(part, "to_dict", None)
    values = to_dict() if callable(to_dict) else {}
    nested = ("tokenizer", *_PARTS)  # described apart
    return [type(part).__name__, {str(key): value for key, value in values.items() if key not in nested}]


def _vocabulary(tokenizer: Any) -> str:
    """Digest vocabulary, merges, normalisation and added tokens.

    A fast tokenizer also remembers how its last call was to truncate and pad: that is left out.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        parts = {**json.loads(backend.to_str()), "truncation": None, "padding": None}
        text = json.dumps(parts, ensure_ascii=False, separators=(",", ":"))
    else:
        added = {number: str(token) for number, token in getattr(tokenizer, "added_tokens_decoder", {}).items()}
        text = json.dumps([sorted(tokenizer.get_vocab().items()), sorted(added.items())])
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _plain(value: Any) -> Any:
    """What JSON cannot say, without the addresses that `repr` would give."""
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    if isinstance(value, Mapping):
        return dict(value)
    return f"{type(value).__module__}.{type(value).__qualname__}" if "object at 0x" in repr(value) else repr(value)
