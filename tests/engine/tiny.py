"""A random Qwen2-VL with LoRA on all three towers, micro-batches for it, and a plain PyTorch loop to compare with."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from vlm_dist.engine import Engine, merge_deepspeed_config, zero_init_context
from vlm_dist.loss import LabelledHead, token_loss_sum

Batch = tuple[dict[str, Tensor], Tensor]

IMAGE_TOKEN, VISION_START, VISION_END = 90, 91, 92
LEARNING_RATE = 1e-2
#: Large against rounding noise in gradients that are almost zero, which Adam would else blow up to whole steps.
EPSILON = 1e-4


def save_tiny_vlm(directory: Path) -> Path:
    """Write a float32 checkpoint; odd sizes, so that partitions do not divide evenly."""
    torch.manual_seed(0)
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": 97,
            "hidden_size": 48,
            "intermediate_size": 90,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2]},
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        },
        vision_config={
            "depth": 1,
            "embed_dim": 32,
            "hidden_size": 48,
            "num_heads": 2,
            "mlp_ratio": 2,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        image_token_id=IMAGE_TOKEN,
        video_token_id=93,
        vision_start_token_id=VISION_START,
        tie_word_embeddings=False,
    )
    Qwen2VLForConditionalGeneration(config).save_pretrained(directory)
    return directory


def load_peft(directory: Path, dtype: torch.dtype = torch.float32, r: int = 5, seed: int = 1) -> PeftModel:
    """Load the checkpoint and attach the adapter, with B not zero, so that A has a gradient from the first step."""
    model = Qwen2VLForConditionalGeneration.from_pretrained(directory, dtype=dtype)
    torch.manual_seed(seed)
    config = LoraConfig(r=r, lora_alpha=8, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    return get_peft_model(model, config, autocast_adapter_dtype=False)


def compile_cpu_adam() -> None:
    """The first time on a machine this takes minutes: in a process of its own, so that forked ranks find it done."""
    code = "from vlm_dist.engine import prepare_native_ops as p; p({'zero_optimization': {'offload_optimizer': %s}})"
    subprocess.run([sys.executable, "-c", code % {"device": "cpu"}], check=True, capture_output=True, timeout=900)


def micro_batch(seed: int, rows: int = 1, tokens: int = 12, image: bool = True) -> Batch:
    """Inputs and labels of one micro-batch; with an image of 8 x 8 pixels (one token) per row, or none at all."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(3, 89, (rows, tokens), generator=generator)
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    labels = input_ids.clone()
    labels[:, 0] = -100
    if image:
        input_ids[:, 1:4] = torch.tensor([VISION_START, IMAGE_TOKEN, VISION_END])
        labels[:, 1:4] = -100
        inputs["pixel_values"] = torch.randn(4 * rows, 3 * 2 * 4 * 4, generator=generator)
        inputs["image_grid_thw"] = torch.tensor([[1, 2, 2]] * rows)
        inputs["mm_token_type_ids"] = (input_ids == IMAGE_TOKEN).long()
    return inputs, labels


def num_targets(batches: list[Batch]) -> int:
    """Target tokens of some micro-batches."""
    return sum(int((labels != -100).sum()) for _, labels in batches)


def groups_of(model: torch.nn.Module) -> list[dict[str, Any]]:
    """Two parameter groups, of which the second is the one that DeepSpeed's own accessors get wrong."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return [
        {"params": [p for name, p in named if "lora_A" in name], "weight_decay": 0.1},
        {"params": [p for name, p in named if "lora_A" not in name], "weight_decay": 0.0},
    ]


def adamw(groups: list[dict[str, Any]]) -> torch.optim.AdamW:
    return torch.optim.AdamW(groups, lr=LEARNING_RATE, eps=EPSILON)


def schedule(step: int) -> float:
    return 1.0 / (step + 1)


def ds_config(stage: int, world_size: int, **changes: Any) -> dict[str, Any]:
    """A merged configuration; at stage 3 even the smallest parameters are partitioned."""
    zero: dict[str, Any] = {"stage": stage}
    if stage == 3:
        zero["stage3_param_persistence_threshold"] = 0
    zero.update(changes.pop("zero", {}))
    settings = {"bf16": False, "fp16": False, "max_grad_norm": 1.0, "num_trainable": 3000, **changes}
    merged, _ = merge_deepspeed_config(
        {"zero_optimization": zero}, per_device_train_batch_size=2, world_size=world_size, **settings
    )
    return merged


def make_engine(directory: Path, config: dict[str, Any], r: int = 5, seed: int = 1, **named: Any) -> Engine:
    """An engine over the tiny model."""
    bf16 = config["bf16"]["enabled"]
    with zero_init_context(config):
        model = load_peft(directory, torch.bfloat16 if bf16 else torch.float32, r, seed)
    model.train()
    return Engine.initialise(model, adamw, groups_of(model), schedule, config, **named)


def run_step(engine: Engine, mine: list[Batch], total: int) -> tuple[float, Any]:
    """One update; gives back this rank's loss sum and the outcome."""
    loss_sum = 0.0
    for inputs, labels in mine:
        loss = engine.loss(inputs, labels)
        engine.backward(loss, total)
        loss_sum += float(loss.detach())
    return loss_sum, engine.step()


def plain_loop(
    directory: Path,
    steps: list[list[Batch]],
    max_grad_norm: float,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """The same training without DeepSpeed, in one process; masters and gradient sums are float32."""
    model = load_peft(directory, dtype)
    model.train()
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    masters = {name: p.detach().float().clone() for name, p in weights.items()}
    optimizer = adamw(
        [
            {"params": [m for name, m in masters.items() if "lora_A" in name], "weight_decay": 0.1},
            {"params": [m for name, m in masters.items() if "lora_A" not in name], "weight_decay": 0.0},
        ]
    )
    head = LabelledHead(model)
    losses, norms = [], []
    for index, batches in enumerate(steps):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * schedule(index)
        total = num_targets(batches)
        losses.append(0.0)
        for master in masters.values():  # no gradient is a gradient of zero, as in the engine: moments decay
            master.grad = torch.zeros_like(master)
        for inputs, labels in batches:
            inputs = {key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs.items()}
            if dtype == torch.float32:
                loss = token_loss_sum(model(**inputs).logits, labels) / total
            else:  # rounded at the same places as in the engine, which a tiny model's norms need
                with head.giving_loss(labels, -100):
                    loss = model(**inputs)["loss"] / total
            loss.backward()
            losses[-1] += float(loss.detach())
            for name, weight in weights.items():
                if weight.grad is not None:
                    masters[name].grad.add_(weight.grad.float())
                    weight.grad = None
        norms.append(float(torch.nn.utils.clip_grad_norm_(masters.values(), max_grad_norm or float("inf"))))
        optimizer.step()
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(masters[name])
    return {"losses": losses, "norms": norms, "weights": masters}
