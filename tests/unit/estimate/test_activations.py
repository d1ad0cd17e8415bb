"""Derived bytes of activations against those that are really kept, and the peak of a step against a real one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.unit.estimate.peak import PeakBytes
from tests.unit.families.subjects import inputs_of, job, subject
from vlm_dist.config.peft import PeftConfig
from vlm_dist.data.types import MicroBatch
from vlm_dist.demo.tiny_model import TinyShape, build_config, build_model, build_processor
from vlm_dist.estimate.activations import block_bytes
from vlm_dist.estimate.batch import BatchShape
from vlm_dist.estimate.memory import Activations
from vlm_dist.loss.labelled import LabelledHead
from vlm_dist.model import attach_adapter, enable_gradient_checkpointing, run_frozen_towers_without_graph
from vlm_dist.model.flops import FlopModel, text_tokens

LANGUAGE = {"vision": "freeze", "projector": "freeze", "language": "lora"}
EVERYWHERE = {"vision": "lora", "projector": "lora", "language": "lora"}
#: Of models of two layers, of which the first keeps less; the share falls with every layer more.
TINY = 0.12
#: Of models of four layers.
MIDDLE = 0.06


def trained(model: Any, policy: dict[str, str], dropout: float, *, recomputed: bool = False) -> Any:
    settings = PeftConfig(r=4, lora_alpha=4, lora_dropout=dropout)
    adapted = attach_adapter(model.to(torch.bfloat16), settings, policy)
    if recomputed:
        enable_gradient_checkpointing(adapted)
    run_frozen_towers_without_graph(adapted)
    return adapted.train()


def kept_bytes(model: Any, batch: MicroBatch) -> int:
    """Bytes of what autograd saves in a forward, weights aside, each storage once."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    seen: dict[int, tuple[int, torch.Tensor]] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes(), tensor
        return tensor

    head = LabelledHead(model)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), head.giving_loss(batch.labels, -100):
        model(**in_bfloat16(inputs_of(batch)), use_cache=False)
    return sum(size for size, _ in seen.values())


def in_bfloat16(inputs: dict[str, Any]) -> dict[str, Any]:
    return {k: v.to(torch.bfloat16) if torch.is_floating_point(v) else v for k, v in inputs.items()}


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize(
    "name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava", "internvl", "paligemma", "gemma3", "idefics3", "pixtral"]
)
def test_what_blocks_keep(name: str, dropout: float) -> None:
    one = subject(name)
    batch = one.materialiser()(job("wide", "tall", "three"))
    for policy in (LANGUAGE, EVERYWHERE):
        model = trained(one.load_model(), policy, dropout)
        text = text_tokens(batch.inputs, batch.labels)
        streams = {"language": text.computed, **FlopModel.of(model)._layout.tokens(batch.inputs).streams}
        derived = sum(
            block.scores * text.computed_squares + sum(streams.get(stream, 0) * n for stream, n in block.kept.items())
            for block in block_bytes(model, 2, dropout, dropped_bytes=2)  # a CPU's dropout keeps numbers, not bits
        )
        assert derived == pytest.approx(kept_bytes(model, batch), rel=TINY)


def middle_sized() -> Any:
    shape = TinyShape(hidden_size=256, intermediate_size=1024, num_layers=4, vision_dim=128, vision_depth=4)
    return build_model(build_config(shape, build_processor(shape).tokenizer))


@pytest.mark.parametrize("dropout", [0.0, 0.05])
@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("policy", [LANGUAGE, EVERYWHERE], ids=["language", "everywhere"])
def test_the_peak_of_a_step(policy: dict[str, str], recomputed: bool, dropout: float) -> None:
    """All tensors alive at the worst moment of a forward and backward, as an allocator sees them."""
    model = trained(middle_sized(), policy, dropout, recomputed=recomputed)
    ids = torch.randint(5, 200, (2, 512))
    ids[:, 4], ids[:, 5:261] = model.config.vision_start_token_id, model.config.image_token_id
    labels = ids.clone()
    labels[:, :261] = -100
    mask = torch.ones_like(ids)
    mask[-1, -1] = 0
    inputs = {
        "input_ids": ids,
        "attention_mask": mask,
        "pixel_values": torch.randn(2 * 1024, 1176).to(torch.bfloat16),
        "image_grid_thw": torch.tensor([(1, 32, 32)] * 2),
        "mm_token_type_ids": (ids == model.config.image_token_id).long(),
    }
    counter = FlopModel.of(model)
    head = next(product for product in counter.products if product.tower == "head")
    derived = Activations(block_bytes(model, 2, dropout, dropped_bytes=2), head, None, 2)
    shape = BatchShape(2, 2, text_tokens(inputs, labels), counter._layout.tokens(inputs), 500, False, True)
    parts = derived.at(shape)[1]
    expected = sum(size for part, size in parts.items() if part != "framework")
    peak = PeakBytes(*model.parameters(), *model.buffers(), *inputs.values(), labels)
    loss = LabelledHead(model)
    with peak, loss.giving_loss(labels, -100):
        model(**inputs, use_cache=False)["loss"].backward()
    assert expected == pytest.approx(peak.peak, rel=MIDDLE)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "recomputed"])
def test_the_peak_of_a_step_on_a_gpu(recomputed: bool) -> None:
    """Against torch's allocator; kernels of a GPU keep other things than a CPU's, so that the margin is wider."""
    model = trained(middle_sized(), EVERYWHERE, 0.05, recomputed=recomputed).cuda()
    ids = torch.randint(5, 200, (4, 2048))
    labels, mask = ids.clone(), torch.ones_like(ids)
    mask[-1, -1] = 0
    counter = FlopModel.of(model)
    head = next(product for product in counter.products if product.tower == "head")
    derived = Activations(block_bytes(model, 2, 0.05), head, None, 2)
    inputs = {"input_ids": ids, "attention_mask": mask}
    shape = BatchShape(4, 4, text_tokens(inputs, labels), counter._layout.tokens(inputs), 4 * 2047, False, True)
    expected = sum(size for part, size in derived.at(shape)[1].items() if part != "framework")
    loss = LabelledHead(model)
    for _ in range(2):  # the first makes the workspaces
        model.zero_grad(set_to_none=True)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with loss.giving_loss(labels, -100):
            model(**{key: value.cuda() for key, value in inputs.items()}, use_cache=False)["loss"].backward()
    assert expected == pytest.approx(torch.cuda.max_memory_allocated() - before, rel=0.25)
