"""Phi-3-vision: the quirks of the code in its repository, all in one place.

* `forward` clamps `input_ids` in place, and with them the places of the images: the model gets a copy.
* Its cache speaks an interface that transformers has given up: no cache, in training and in `generate`.
* Its processor takes one text and a flat list of images, and says nothing about where a token comes from.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

_IMAGE = re.compile(r"<\|image_(\d+)\|>")
#: Stands for one image token in the expanded text, to which offsets refer.
_FILL = "\N{OBJECT REPLACEMENT CHARACTER}"

#: Of the tokenizer, but for contents in parts; images are numbered through the conversation.
CHAT_TEMPLATE = (
    "{% set count = namespace(images=0) %}{% for message in messages %}{{ '<|' + message['role'] + '|>\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{% set count.images = count.images + 1 %}{{ '<|image_' ~ count.images ~ '|>\n' }}"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}{{ '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


def is_phi3_vision(loaded_by: type[Any]) -> bool:
    """Whether a class is the model or the processor of Phi-3-vision (or Phi-3.5-vision)."""
    return loaded_by.__name__ in ("Phi3VForCausalLM", "Phi3VProcessor")


def tame(model: Any) -> None:
    """Let the model work on a copy of `input_ids`, generate without a cache, and say which features it takes."""

    def give_copy(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        copied = tuple(arg.clone() if isinstance(arg, torch.Tensor) and i == 0 else arg for i, arg in enumerate(args))
        if isinstance(kwargs.get("input_ids"), torch.Tensor):
            kwargs = kwargs | {"input_ids": kwargs["input_ids"].clone()}
        return copied, kwargs

    model.register_forward_pre_hook(give_copy, with_kwargs=True)
    model.generation_config.use_cache = False
    for module in model.modules():
        if hasattr(module, "img_processor") and hasattr(module, "layer_idx"):
            model.config.vision_feature_layer = module.layer_idx  # by the name that other families have for it


class Phi3VisionProcessor:
    """The processor of Phi-3-vision with the calls of transformers' own processors.

    Image k of a sample becomes ids of value -k. The text between two images is tokenised alone, each piece with a
    beginning-of-sequence token, as the model was trained.

    Args:
        original: as its own code makes it.
    """

    def __init__(self, original: Any) -> None:
        self.image_processor = original.image_processor
        self.tokenizer = original.tokenizer
        self.chat_template = CHAT_TEMPLATE

    def apply_chat_template(self, conversation: Any, chat_template: str | None = None, **kwargs: Any) -> Any:
        """Render a conversation; see the tokenizer's method."""
        return self.tokenizer.apply_chat_template(
            conversation, chat_template=chat_template or self.chat_template, **{"tokenize": False, **kwargs}
        )

    def __call__(
        self,
        images: Sequence[Any] | None = None,
        text: str | Sequence[str] | None = None,
        *,
        text_kwargs: Mapping[str, Any] | None = None,
        images_kwargs: Mapping[str, Any] | None = None,
        return_text_replacement_offsets: bool = False,
        return_tensors: str | None = None,
    ) -> dict[str, Any]:
        """Make the input of one sample.

        Args:
            images: of the sample, flat or nested once.
            text: one text with a marker `<|image_k|>` for each image, numbered from 1 in their order.
            text_kwargs: `add_special_tokens` and `return_offsets_mapping` are known.
            images_kwargs: nothing in it has a meaning here.
            return_text_replacement_offsets: also tell what the markers became.
            return_tensors: "pt", or None for lists in the place of tokens.

        Returns:
            input_ids and attention_mask [1, T]; pixel_values [N, num_crops + 1, 3, 336, 336] and image_sizes [N, 2]
            where there are images; offset_mapping and text_replacement_offsets where asked for.

        Raises:
            ValueError: several texts at once, or markers that do not fit the images.
        """
        if not isinstance(text, str):
            if text is None or len(text) != 1:
                raise ValueError("one text at a time")
            text = text[0]
        flat = [one for part in images or () for one in (part if isinstance(part, list | tuple) else [part])]
        arguments = dict(text_kwargs or {})
        visual = dict(self.image_processor(flat, return_tensors="pt")) if flat else {}
        counts = [int(count) for count in visual.pop("num_img_tokens", ())]
        markers = list(_IMAGE.finditer(text))
        if [int(marker.group(1)) for marker in markers] != list(range(1, len(flat) + 1)):
            raise ValueError(f"{len(flat)} images, but the text has the markers {[m.group() for m in markers]}")
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        replacements = []
        start = shift = 0
        for k, marker in enumerate([*markers, None], start=1):
            end = marker.start() if marker is not None else len(text)
            is_first = start == 0
            piece = self.tokenizer(
                text[start:end],
                add_special_tokens=bool(arguments.get("add_special_tokens", True)) or not is_first,
                return_offsets_mapping=True,
            )
            ids += piece["input_ids"]
            offsets += [(a + start + shift, b + start + shift) if b > a else (0, 0) for a, b in piece["offset_mapping"]]
            if marker is None:
                break
            count = counts[k - 1]
            ids += [-k] * count
            offsets += [(end + shift + i, end + shift + i + 1) for i in range(count)]
            replacements.append({"text": marker.group(), "replacement": _FILL * count, "span": marker.span()})
            shift += count - len(marker.group())
            start = marker.end()
        made: dict[str, Any] = {"input_ids": [ids], "attention_mask": [[1] * len(ids)]}
        if return_tensors == "pt":
            made = {key: torch.tensor(value) for key, value in made.items()}
        if arguments.get("return_offsets_mapping"):
            made["offset_mapping"] = [offsets]
        if return_text_replacement_offsets:
            made["text_replacement_offsets"] = [replacements]
        return made | {key: torch.as_tensor(value) for key, value in visual.items()}

    def get_text_with_replacements(self, *args: Any, **kwargs: Any) -> Any:
        """Only here to say that `return_text_replacement_offsets` is known."""
        raise NotImplementedError

    def _get_num_multimodal_tokens(self, image_sizes: Sequence[Sequence[int]] | None = None, **kwargs: Any) -> Any:
        """How many ids an image of a size (height, width) becomes, without its pixels."""
        from transformers.processing_utils import MultiModalData

        tokens = [
            self.image_processor.calc_num_image_tokens_from_image_size(width, height)
            for height, width in image_sizes or ()
        ]
        return MultiModalData(num_image_tokens=tokens, num_image_patches=[1] * len(tokens))

    def save_pretrained(self, directory: Any, **kwargs: Any) -> None:
        """Save tokenizer and image processor."""
        self.tokenizer.save_pretrained(directory)
        self.image_processor.save_pretrained(directory)

    def decode(self, *args: Any, **kwargs: Any) -> Any:
        """See the tokenizer's method."""
        return self.tokenizer.decode(*args, **kwargs)

    def batch_decode(self, *args: Any, **kwargs: Any) -> Any:
        """See the tokenizer's method."""
        return self.tokenizer.batch_decode(*args, **kwargs)
