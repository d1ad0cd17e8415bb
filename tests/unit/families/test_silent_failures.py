"""Ten ways in which transformers goes wrong without a word: each is shown as it happens, and not to happen here.

The third of them, code of a model's own whose rotary frequencies no checkpoint holds, needs such code and is
`test_buffers_that_no_checkpoint_holds_are_right` in tests/unit/model/test_remote_code.py.

Where the first half of a test fails, transformers has changed: what is done here about it may have become needless.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from torch import Tensor, nn

from tests.unit.data.samples import noise
from tests.unit.families.cells import ROUNDING
from tests.unit.families.page import FAMILIES_SHOWN
from tests.unit.families.subjects import ROWS, Subject, inputs_of, job, subject
from tests.unit.families.zoo import CHECKPOINTS, templates
from vlm_dist.build import make_processor
from vlm_dist.config import PeftConfig, load_run
from vlm_dist.data.encoding.encode import Encoder
from vlm_dist.data.encoding.labels import RenderedText
from vlm_dist.data.media.video import Clip
from vlm_dist.data.types import MicroBatchJob, PackBudget
from vlm_dist.errors import ConfigError
from vlm_dist.loss import token_loss_sum
from vlm_dist.model import attach_adapter, enable_gradient_checkpointing, find_towers, load_model
from vlm_dist.model.towers import tower_of

RUN_FILE = Path(__file__).resolve().parents[3] / "configs" / "run.yaml"
LORA = PeftConfig(r=2, lora_alpha=4, lora_dropout=0.0)
FRAMES = np.stack([noise(56, 56, seed) for seed in range(8)])


def picture() -> Image.Image:
    return Image.fromarray(noise(90, 40))


def difference(ours: Tensor, theirs: Tensor) -> float:
    """As a share of the largest logit."""
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_1_a_cache_lets_packed_samples_see_each_other(name: str) -> None:
    one = subject(name)
    rows = job("wide", "text")
    packed = one.materialiser(packing=True)(MicroBatchJob(0, 0, rows.refs, pack=PackBudget(max_tokens=4096)))
    second = one.materialiser(towers=())(job("text"))
    with torch.no_grad():
        alone = one.forward(second)[0]
        as_loaded, cached = (
            one.model(**inputs_of(packed), **cache).logits[0, -len(alone) :] for cache in ({}, {"use_cache": True})
        )
    assert difference(cached, alone) > 0.1
    assert difference(as_loaded, alone) < ROUNDING


@pytest.mark.parametrize("name", ["paligemma", "gemma3"])
def test_2_flash_attention_drops_masks_in_both_directions(name: str) -> None:
    one = subject(name)
    inputs = one.materialiser()(job("wide", "tall")).inputs
    embedded = one.model.get_input_embeddings()(inputs["input_ids"])
    masks = {}
    for implementation in ("sdpa", "flash_attention_2"):
        config = copy.deepcopy(one.model.config)
        config.get_text_config()._attn_implementation = implementation
        made = one.model.create_masks_for_generate(
            config,
            embedded,
            torch.ones_like(inputs["attention_mask"]),
            None,
            torch.arange(embedded.shape[1])[None].expand(2, -1),
            token_type_ids=inputs["token_type_ids"],
            is_first_iteration=True,
        )
        masks[implementation] = made["full_attention"] if isinstance(made, dict) else made
    assert masks["sdpa"].triu(1).any()  # a token sees one behind it
    assert masks["flash_attention_2"] is None  # causal
    entry = CHECKPOINTS[name].entry.model_dump()
    asked = (
        f"model_id={one.directory}",
        f"model.model_classes={ {str(one.directory): entry} }",
        "model.loading_params.attn_implementation=flash_attention_2",
        "data.train=[{type: tar, path: shards}]",
    )
    with pytest.raises(ConfigError, match=f"flash_attention_2 is wrong for models of the family {name}"):
        make_processor(load_run(RUN_FILE, asked))


def test_4_paligemma_puts_the_beginning_within_a_word() -> None:
    one = subject("paligemma")
    tokenizer = one.processor.tokenizer
    texts = ["<image>What is it?", "What is it?"]
    together = one.processor(text=texts, images=[[picture()], []], padding=True)
    assert tokenizer.decode(together["input_ids"][1]).startswith("What i<bos>s it?")
    batch = one.materialiser()(job("wide", "text"))
    text = tokenizer.decode(batch.inputs["input_ids"][1])
    assert text.startswith("<bos>") and text.count("<bos>") == 1 and ROWS["text"]["question"] in text, text


@pytest.mark.parametrize("name", ["qwen3_vl", "glm4v"])
def test_5_reentrant_checkpointing_gives_vision_no_gradient(name: str) -> None:
    one = subject(name)
    batch = one.materialiser()(job("wide", "text"))

    def learning(model: Any) -> list[bool]:
        token_loss_sum(model.train()(**inputs_of(batch), use_cache=False).logits, batch.labels).backward()
        adapters = [p for key, p in model.named_parameters() if "lora_B" in key and "visual" in key]
        return [weight.grad is not None and bool(weight.grad.any()) for weight in adapters]

    policy = {"vision": "lora", "language": "lora"}
    reentrant, ours = (attach_adapter(one.load_model(), LORA, policy) for _ in range(2))
    reentrant.get_base_model().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    reentrant.get_base_model().enable_input_require_grads()
    assert not any(learning(reentrant))
    enable_gradient_checkpointing(ours)
    found = learning(ours)
    assert found and all(found)


def test_6_names_of_the_language_model_are_those_of_the_vision_tower() -> None:
    asked = ["q_proj", "v_proj"]
    settings = LORA.model_copy(update={"target_modules": asked})
    reached = {}
    for name in CHECKPOINTS:
        one = subject(name)
        naive = get_peft_model(one.load_model(), LoraConfig(r=2, target_modules=asked))
        ours = attach_adapter(one.load_model(), settings, {"language": "lora"})
        reached[name] = _towers_with_lora(naive)
        assert _towers_with_lora(ours) == {"language"}, name
    assert len([name for name, towers in reached.items() if "vision" in towers]) == 13, reached


def _towers_with_lora(model: Any) -> set[str]:
    towers = find_towers(model.get_base_model())
    names = [key.removeprefix("base_model.model.") for key, _ in model.named_parameters() if "lora_B" in key]
    return {tower_of(name, towers) for name in names}


@pytest.mark.parametrize("name", ["qwen3_vl", "glm4v"])
def test_7_frames_that_were_sampled_are_sampled_again(name: str) -> None:
    one = subject(name)
    clip = Clip(FRAMES, indices=tuple(range(8)), fps=4.0, num_frames=8)
    marker = one.family.video_marker
    assert marker is not None
    naive = one.processor(text=[marker], videos=[FRAMES], video_metadata=[clip.metadata], return_tensors="pt")
    ours = Encoder(one.processor, one.family).encode(RenderedText(marker), clips=[clip])
    pairs = [int(grid[0, 0]) for grid in (naive["video_grid_thw"], ours.visual["video_grid_thw"])]
    assert pairs == [2, 4]  # of frames


def test_8_the_assistant_mask_of_idefics2_is_misplaced() -> None:
    one = subject("idefics2")
    says = "{{ line['text'] }}"
    marking = f"{{% generation %}}{says}{{% endgeneration %}}"
    template = templates.IDEFICS.replace(
        says, f"{{% if message['role'] == 'assistant' %}}{marking}{{% else %}}{says}{{% endif %}}"
    )
    question = [{"type": "image", "image": picture()}, {"type": "text", "text": ROWS["wide"]["question"]}]
    answer = [{"type": "text", "text": ROWS["wide"]["answer"]}]
    native = one.processor.apply_chat_template(
        [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
        chat_template=template,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        return_assistant_tokens_mask=True,
    )
    marked = native["input_ids"][native["assistant_masks"].bool()]
    assert one.processor.tokenizer.decode(marked) != ROWS["wide"]["answer"]
    assert one.answers(one.materialiser()(job("wide"))) == [f" {ROWS['wide']['answer']}<end_of_utterance>"]


def test_9_smolvlm_drops_the_pictures_of_a_batch_that_has_videos(caplog: pytest.LogCaptureFixture) -> None:
    one = subject("smolvlm")
    texts = ["<image>What is it?", "<video>What moves?"]
    clip = [FRAMES[:4]]
    together = one.processor(text=texts, images=[[picture()], []], videos=[[], clip], padding=True, return_tensors="pt")
    assert together["pixel_values"].shape[:2] == (1, 4)  # the frames alone
    batch = one.materialiser(kinds=("image", "video"))(job("wide", "clip and picture"))
    assert "videos have priority, images are left out" in caplog.text
    image_id = one.processor.tokenizer.convert_tokens_to_ids("<image>")
    shown = [int((row == image_id).sum()) for row in batch.inputs["input_ids"]]
    assert shown == [0, 4 * 4, 0][: len(shown)]  # tokens of four frames; no placeholder of what is left out


@pytest.mark.parametrize("name", [name for name in FAMILIES_SHOWN if name in CHECKPOINTS])
def test_10_a_mask_of_booleans_is_added_up_by_eager_attention(name: str) -> None:
    one = subject(name)
    arguments = {"torch_dtype": "float32", "attn_implementation": "eager"}
    eager = load_model(str(one.directory), CHECKPOINTS[name].entry, arguments).eval()
    batch = one.materialiser()(job("wide", "text"))
    masks = {key: value.dim() for key, value in batch.inputs.items() if key.endswith("mask") and "pixel" not in key}
    assert masks == {"attention_mask": 2}
    keep = batch.inputs["attention_mask"].bool()
    with torch.no_grad():
        right = one.forward(batch)[keep]
        assert difference(eager(**inputs_of(batch), use_cache=False).logits[keep], right) < ROUNDING
        if name == "llava":
            assert difference(_with_boolean_mask(eager, one, batch.inputs)[keep], right) > 0.1
            assert difference(_with_boolean_mask(one.model, one, batch.inputs)[keep], right) < ROUNDING


def _with_boolean_mask(model: nn.Module, one: Subject, inputs: dict[str, Tensor]) -> Tensor:
    """Logits with the causal mask written out, as sdpa takes it."""
    mask = inputs["attention_mask"].bool()
    causal = torch.ones(mask.shape[1], mask.shape[1], dtype=torch.bool).tril()[None, None] & mask[:, None, None]
    logits: Tensor = model(**{**inputs, "attention_mask": causal}, use_cache=False).logits
    return logits
