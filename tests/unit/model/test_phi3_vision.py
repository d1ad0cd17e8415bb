"""What Phi-3-vision's processor is given, on parts of our own; test_remote_code.py has the published code."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from tests.unit.families.zoo.parts import byte_tokenizer
from vlm_dist.model.phi3_vision import Phi3VisionProcessor, tame


class Pictures:
    """As many tokens as the picture is told to cost."""

    def __call__(self, images: list[int], return_tensors: str) -> dict[str, Any]:
        return {
            "pixel_values": torch.zeros(len(images), 2, 3, 336, 336),
            "image_sizes": torch.full((len(images), 2), 336),
            "num_img_tokens": images,
        }


@pytest.fixture
def processor() -> Phi3VisionProcessor:
    tokenizer = byte_tokenizer(("<|user|>", "<|assistant|>", "<|end|>"), bos_token="<s>", eos_token="</s>")
    return Phi3VisionProcessor(SimpleNamespace(image_processor=Pictures(), tokenizer=tokenizer))


def turns(*questions: list[str]) -> list[dict[str, Any]]:
    conversation: list[dict[str, Any]] = []
    for parts in questions:
        content = [{"type": "image"} if part == "image" else {"type": "text", "text": part} for part in parts]
        conversation += [{"role": "user", "content": content}, {"role": "assistant", "content": "so"}]
    return conversation


def test_images_are_numbered_through_the_conversation(processor: Phi3VisionProcessor) -> None:
    assert processor.apply_chat_template(turns(["image", "image", "a?"], ["image", "b?"])) == (
        "<|user|>\n<|image_1|>\n<|image_2|>\na?<|end|>\n<|assistant|>\nso<|end|>\n"
        "<|user|>\n<|image_3|>\nb?<|end|>\n<|assistant|>\nso<|end|>\n"
    )


@pytest.mark.parametrize("nested", [True, False])
def test_image_k_becomes_ids_below_zero_and_every_token_knows_its_characters(
    processor: Phi3VisionProcessor, nested: bool
) -> None:
    text = processor.apply_chat_template(turns(["image", "a?"], ["image", "b?"]))
    images: Any = [[3, 2]] if nested else [3, 2]
    made = processor(images, [text], text_kwargs={"return_offsets_mapping": True}, return_text_replacement_offsets=True)
    (ids,), (offsets,) = made["input_ids"], made["offset_mapping"]
    assert [one for one in ids if one < 0] == [-1] * 3 + [-2] * 2
    assert made["pixel_values"].shape == (2, 2, 3, 336, 336)
    assert "num_img_tokens" not in made
    expanded = text
    for one in reversed(made["text_replacement_offsets"][0]):
        start, end = one["span"]
        assert text[start:end] == one["text"]
        expanded = expanded[:start] + one["replacement"] + expanded[end:]
    for number, (start, end) in zip(ids, offsets, strict=True):
        if number >= 0 and end > start:
            assert processor.tokenizer.convert_tokens_to_ids(expanded[start:end].replace("\n", "Ċ")) == number
        elif end > start:
            assert expanded[start:end] == "\ufffc"


def test_text_alone_goes_to_the_tokenizer(processor: Phi3VisionProcessor) -> None:
    made = processor(text="so?", return_tensors="pt")
    assert made["input_ids"].tolist() == [processor.tokenizer("so?")["input_ids"]]
    assert set(made) == {"input_ids", "attention_mask"}


@pytest.mark.parametrize("text", ["<|image_2|>", "no marker", "<|image_1|><|image_1|>"])
def test_markers_that_do_not_fit_are_refused(processor: Phi3VisionProcessor, text: str) -> None:
    with pytest.raises(ValueError, match="1 images, but the text has the markers"):
        processor([3], text)
    with pytest.raises(ValueError, match="one text at a time"):
        processor(None, [text, text])


def test_the_model_gets_a_copy_of_the_ids() -> None:
    class Careless(nn.Module):
        generation_config = SimpleNamespace(use_cache=True)

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return input_ids.clamp_min_(0)

    model = Careless()
    tame(model)
    for call in (lambda ids: model(ids), lambda ids: model(input_ids=ids)):
        ids = torch.tensor([[5, -1]])
        assert call(ids).tolist() == [[5, 0]]
        assert ids.tolist() == [[5, -1]]
    assert not model.generation_config.use_cache
