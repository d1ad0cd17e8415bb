"""The tiny model is the real thing in small: classes, checkpoint format, tokenizer, both visual inputs."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, Qwen2VLForConditionalGeneration, Qwen2VLProcessor

from vlm_dist.demo.tiny_model import SPECIAL_TOKENS, TinyShape, build_tokenizer, save_tiny_qwen2_vl

SMALL = TinyShape(hidden_size=32, intermediate_size=32, num_layers=2, vision_dim=32, vision_depth=1)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return save_tiny_qwen2_vl(tmp_path_factory.mktemp("tiny"), SMALL, seed=3)


def test_auto_classes_load_it(directory):
    processor = AutoProcessor.from_pretrained(directory)
    model = AutoModelForImageTextToText.from_pretrained(directory, dtype="auto")
    assert type(processor) is Qwen2VLProcessor
    assert type(model) is Qwen2VLForConditionalGeneration
    assert model.dtype == torch.bfloat16
    assert model.generation_config.eos_token_id == processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert json.loads((directory / "config.json").read_text())["architectures"] == ["Qwen2VLForConditionalGeneration"]


def test_same_seed_same_weights(directory, tmp_path):
    again = save_tiny_qwen2_vl(tmp_path / "again", SMALL, seed=3)
    other = save_tiny_qwen2_vl(tmp_path / "other", SMALL, seed=4)
    weights = (directory / "model.safetensors").read_bytes()
    assert (again / "model.safetensors").read_bytes() == weights
    assert (other / "model.safetensors").read_bytes() != weights


@pytest.mark.parametrize("text", ["Which digit is this?", "naïve 한국어 \U0001f600\n\n  indented", "3 7", ""])
def test_any_text_round_trips(text):
    tokenizer = build_tokenizer()
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_special_tokens_are_single_tokens(directory):
    tokenizer = AutoProcessor.from_pretrained(directory).tokenizer
    for token in SPECIAL_TOKENS:
        assert tokenizer(token).input_ids == [tokenizer.convert_tokens_to_ids(token)]


def test_image_and_video_change_the_logits(directory):
    processor = AutoProcessor.from_pretrained(directory)
    model = AutoModelForImageTextToText.from_pretrained(directory, dtype=torch.float32)
    content = [{"type": "image"}, {"type": "video"}, {"type": "text", "text": "Which digit is this?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    rng = np.random.default_rng(0)

    def logits(image, clip):
        inputs = processor(text=[text], images=[image], videos=[clip], do_sample_frames=False, return_tensors="pt")
        assert inputs["image_grid_thw"].tolist() == [[1, 4, 4]]
        assert inputs["video_grid_thw"].tolist() == [[2, 4, 4]]
        with torch.no_grad():
            return model(**inputs).logits[0, -1]

    images = rng.integers(0, 256, (2, 56, 56, 3), dtype=np.uint8)
    clips = rng.integers(0, 256, (2, 4, 56, 56, 3), dtype=np.uint8)
    plain = logits(images[0], clips[0])
    assert torch.isfinite(plain).all()
    assert not torch.allclose(plain, logits(images[1], clips[0]), atol=1e-3)
    assert not torch.allclose(plain, logits(images[0], clips[1]), atol=1e-3)
