"""The native processor of an InternVLChatModel: tokenizer, tiles and chat template.

The published repositories have no processor class: their code cuts pictures and writes prompts itself, by the
`template` that config.json names.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlm_dist.errors import ModelError
from vlm_dist.model.conversion.internvl_config import tile_rules
from vlm_dist.model.conversion.sentencepiece_bpe import bpe_tokenizer

_IMAGE = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
#: Only marks a place in the text, the processor replaces it; so the model needs no row for it.
_VIDEO = {"video_token": "<video>"}

_SYSTEM_V2 = (
    "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。"
)
_SYSTEM_V2_5 = (
    "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"
)


def _template(before_role: str, after_role: str, end: str, system: str) -> str:
    """A chat template; a conversation without a system prompt gets the one that the model was trained with."""
    return (
        "{% if messages[0]['role'] != 'system' %}"
        + f"{before_role}system{after_role}{system}{end}"
        + "{% endif %}{% for message in messages %}"
        + before_role
        + "{{ message['role'] }}"
        + after_role
        + "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
        "{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}{{ '<IMG_CONTEXT>\\n' }}"
        "{% elif part['type'] == 'video' %}{{ '<video>\\n' }}"
        "{% else %}{{ part['text'] }}{% endif %}"
        "{% endfor %}{% endif %}"
        + end
        + "{% endfor %}{% if add_generation_prompt %}"
        + f"{before_role}assistant{after_role}"
        + "{% endif %}"
    )


#: `template` of config.json -> chat template, and the token that ends a turn.
_TEMPLATES = {
    "internlm2-chat": (_template("<|im_start|>", "{{ '\\n' }}", "<|im_end|>", _SYSTEM_V2), "<|im_end|>"),
    "Hermes-2": (_template("<|im_start|>", "{{ '\\n' }}", "<|im_end|>", _SYSTEM_V2), "<|im_end|>"),
    "phi3-chat": (_template("<|", "|>{{ '\\n' }}", "<|end|>", _SYSTEM_V2), "<|end|>"),
    "internvl2_5": (_template("<|im_start|>", "{{ '\\n' }}", "<|im_end|>{{ '\\n' }}", _SYSTEM_V2_5), "<|im_end|>"),
}


def native_processor(directory: Path, config: Mapping[str, Any]) -> Any:
    """Make the `InternVLProcessor` of an original checkpoint.

    Args:
        directory: with the tokenizer's files.
        config: content of its config.json.

    Raises:
        ModelError: a file is missing or of another checkpoint, or the template is unknown.
    """
    from transformers import GotOcr2ImageProcessor, InternVLProcessor, InternVLVideoProcessor

    rules = tile_rules(config)
    side = {"height": rules.side_pixels, "width": rules.side_pixels}
    look: dict[str, Any] = {"size": side, "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    template, _ = _template_of(config)
    return InternVLProcessor(
        image_processor=GotOcr2ImageProcessor(
            **look, crop_to_patches=True, min_patches=rules.min_tiles, max_patches=rules.max_tiles
        ),
        tokenizer=native_tokenizer(directory),
        video_processor=InternVLVideoProcessor(**look),
        image_seq_length=rules.num_tokens,
        chat_template=template,
    )


def generation_settings(config: Mapping[str, Any], tokenizer: Any) -> dict[str, Any]:
    """What generate needs to know: the model ends a turn with the template's own token."""
    language = config.get("llm_config", {})
    ends = [tokenizer.convert_tokens_to_ids(_template_of(config)[1]), tokenizer.eos_token_id]
    settings = {
        "bos_token_id": language.get("bos_token_id"),
        "eos_token_id": list(dict.fromkeys(end for end in ends if end is not None)),
        "pad_token_id": tokenizer.pad_token_id,
    }
    return {key: value for key, value in settings.items() if value is not None}


def native_tokenizer(directory: Path) -> Any:
    """The fast tokenizer of an original checkpoint, with every added token at the id that the model knows it by.

    Raises:
        ModelError: files are missing, or an id differs.
    """
    from transformers import PreTrainedTokenizerFast

    settings = _read_json(directory / "tokenizer_config.json")
    added = {int(i): _text(token) for i, token in settings.get("added_tokens_decoder", {}).items()}
    added |= {i: token for token, i in _read_json(directory / "added_tokens.json").items()}
    named = {
        key: _text(settings[key])
        for key in ("bos_token", "eos_token", "pad_token", "unk_token")
        if settings.get(key) is not None
    }
    common: dict[str, Any] = {
        **named,
        "extra_special_tokens": {**_IMAGE, **_VIDEO},
        "model_max_length": settings.get("model_max_length") or 8192,
        "clean_up_tokenization_spaces": False,
    }
    if (directory / "tokenizer.json").is_file():
        tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(str(directory), **common)
    elif (directory / "tokenizer.model").is_file():
        made = bpe_tokenizer(directory / "tokenizer.model", added, legacy=bool(settings.get("legacy", False)))
        _add_bos(made, settings, added)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, **common)
    elif (directory / "vocab.json").is_file() and (directory / "merges.txt").is_file():
        from transformers import Qwen2Tokenizer

        tokenizer = Qwen2Tokenizer.from_pretrained(str(directory), **common)
    else:
        raise ModelError(f"{directory} has no tokenizer.json, no tokenizer.model and no vocab.json with merges.txt")
    tokenizer.chat_template = None  # the processor's counts
    wrong = {token: i for i, token in added.items() if tokenizer.convert_tokens_to_ids(token) != i}
    wrong |= {token: -1 for token in _IMAGE.values() if token not in added.values()}
    if wrong:
        raise ModelError(
            f"{directory}: the added tokens {sorted(wrong)[:5]} do not have the ids of tokenizer_config.json and "
            "added_tokens.json in the tokenizer. The files are not of one checkpoint; copy them again."
        )
    return tokenizer


def _add_bos(tokenizer: Any, settings: Mapping[str, Any], added: Mapping[int, str]) -> None:
    from tokenizers import processors

    if not settings.get("add_bos_token", True):  # as in the code of InternLM2 and Llama
        return
    bos = _text(settings["bos_token"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )


def _template_of(config: Mapping[str, Any]) -> tuple[str, str]:
    name = config.get("template")
    if name not in _TEMPLATES:
        raise ModelError(f"its chat template {name!r} is not known (known are {', '.join(_TEMPLATES)})")
    return _TEMPLATES[name]


def _text(token: Any) -> str:
    return str(token["content"] if isinstance(token, Mapping) else token)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON: {error}. Copy the file again.") from error
    return dict(content)
