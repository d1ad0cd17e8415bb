"""New special tokens are whole, have rows of their own, and are refused where they would never be learned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from tests.unit.model.conftest import ALL_LORA, lora
from tests.unit.model.zoo import kind
from vlm_dist.checkpoint import export_adapter
from vlm_dist.checkpoint.store import CheckpointStore
from vlm_dist.errors import ModelError
from vlm_dist.model import attach_adapter, check_tokens_are_learned, load_processor, make_room_for_tokens

NEW = ["<box>", "</box>"]


def processor_of(name: str) -> Any:
    one = kind(name)
    return load_processor(str(one.directory), one.entry, {"new_special_tokens": NEW})


@pytest.mark.parametrize("name", ["qwen2_vl", "gemma3", "llava"])
def test_tokens_are_whole_and_kept_in_answers(name: str) -> None:
    tokenizer = processor_of(name).tokenizer
    ids = tokenizer("a<box>1 2</box>", add_special_tokens=False)["input_ids"]
    assert [one for one in ids if one in processor_of(name).new_token_ids] == processor_of(name).new_token_ids
    assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == "a<box>12</box>"


def test_a_token_that_is_there_is_not_new() -> None:
    one = kind("qwen2_vl")
    processor = load_processor(str(one.directory), one.entry, {"new_special_tokens": ["<|im_end|>", "<box>"]})
    assert len(processor.new_token_ids) == 1


@pytest.mark.parametrize("name", ["qwen2_vl", "gemma3", "llava", "internvl"])  # gemma3: tied
def test_rows_are_made_learned_and_saved(name: str, tmp_path: Path) -> None:
    one, processor = kind(name), processor_of(name)
    model = one.load()
    before = model.get_input_embeddings().weight.detach().clone()
    rows = make_room_for_tokens(model, processor.new_token_ids)
    after = model.get_input_embeddings().weight
    assert after.shape[0] == rows == max(before.shape[0], max(processor.new_token_ids) + 1)
    assert torch.equal(after[: before.shape[0]][: min(processor.new_token_ids)], before[: min(processor.new_token_ids)])
    first, second = (after[token_id] for token_id in processor.new_token_ids)
    assert not torch.equal(first, second)
    again = one.load()
    make_room_for_tokens(again, processor.new_token_ids)
    assert torch.equal(again.get_input_embeddings().weight, after)  # the same on every rank

    model = attach_adapter(model, lora(modules_to_save=["embed_tokens", "lm_head"]), ALL_LORA)
    check_tokens_are_learned(model, NEW)
    ids = torch.tensor([[5, *processor.new_token_ids, 6]])
    model(input_ids=ids, use_cache=False).logits.square().mean().backward()
    embedding = model.get_base_model().get_input_embeddings().weight
    assert embedding.grad[processor.new_token_ids].abs().sum() > 0
    with torch.no_grad():
        embedding[processor.new_token_ids] += 1
        wanted = model.eval()(input_ids=ids, use_cache=False).logits
    masters = {key: weight.detach() for key, weight in model.named_parameters() if weight.requires_grad}
    CheckpointStore(tmp_path).save_adapter(export_adapter(model, masters, torch.float32))
    base = one.load()
    base.resize_token_embeddings(rows, mean_resizing=False)
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=ids, use_cache=False).logits, wanted, rtol=1e-4, atol=1e-5)


def test_tokens_that_would_never_be_learned_are_refused() -> None:
    one, processor = kind("qwen2_vl"), processor_of("qwen2_vl")
    model = one.load()
    make_room_for_tokens(model, processor.new_token_ids)
    frozen = attach_adapter(model, lora(), ALL_LORA)
    with pytest.raises(
        ModelError, match=r"<box>, </box> would never be learned.*modules_to_save: \[embed_tokens, lm_head"
    ):
        check_tokens_are_learned(frozen, NEW)
