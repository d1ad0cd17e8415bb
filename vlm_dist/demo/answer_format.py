"""Gives the demo's base model what every base model has: it knows how an answer looks, but not what the pictures show.

A few seconds of full training on pictures and clips of pure noise with random digits as answers. Afterwards the base
answers every question with digits that are right by chance (about 0.1 for one digit, 0.01 for two). So what the demo's
table shows is that LoRA learned to read pictures, not that it learned to write digits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import Qwen2VLForConditionalGeneration, Qwen2VLProcessor

from vlm_dist.data.types import IGNORE_INDEX
from vlm_dist.demo.digits import CLIP_QUESTION, DIGITS_PER_CLIP, IMAGE_QUESTION, MAX_INTENSITY, Picture, enlarge

#: The same as `message_format.system_prompt` of configs/demo.yaml.
SYSTEM_PROMPT = "Answer with digits."

LEARNING_RATE = 1e-3
MAX_GRAD_NORM = 1.0
NUM_IMAGES = 12  # per batch
NUM_CLIPS = 4
NUM_BATCHES = 4  # of noise; the answers are drawn anew each step


def teach_answer_format(
    model: Qwen2VLForConditionalGeneration, processor: Qwen2VLProcessor, *, num_steps: int = 80, seed: int = 0
) -> float:
    """Train all weights of a float32 model on noise, in place.

    Returns:
        The mean loss of the last steps in nats per answer token; random digits leave about log(10) per digit.
    """
    rng = np.random.default_rng(seed)
    digit_ids = torch.tensor([processor.tokenizer.convert_tokens_to_ids(str(digit)) for digit in range(10)])
    generator = torch.Generator().manual_seed(seed)
    batches = [_noise_batch(processor, rng) for _ in range(NUM_BATCHES)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    nn.Module.train(model)
    losses = []
    for step in range(num_steps):
        inputs, is_answer = batches[step % NUM_BATCHES]
        input_ids = inputs["input_ids"].clone()  # [B, T]
        is_digit = is_answer & torch.isin(input_ids, digit_ids)
        input_ids[is_digit] = digit_ids[torch.randint(10, (int(is_digit.sum()),), generator=generator)]
        labels = input_ids.masked_fill(~is_answer, IGNORE_INDEX)
        logits = model(**{**inputs, "input_ids": input_ids}, use_cache=False).logits  # [B, T, V]
        loss = cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORE_INDEX)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        losses.append(loss.item())
    nn.Module.train(model, False)
    return float(np.mean(losses[-10:]))


def _noise_batch(processor: Qwen2VLProcessor, rng: np.random.Generator) -> tuple[dict[str, Tensor], Tensor]:
    """Noise with placeholder answers.

    Returns:
        The model's inputs and a mask [B, T] of the answers' tokens, with their terminator.
    """
    images = [_noise(rng) for _ in range(NUM_IMAGES)]
    clips = [np.stack([_noise(rng) for _ in range(2 * DIGITS_PER_CLIP)]) for _ in range(NUM_CLIPS)]
    asked = [("image", IMAGE_QUESTION, 1)] * NUM_IMAGES + [("video", CLIP_QUESTION, DIGITS_PER_CLIP)] * NUM_CLIPS
    prompts = [_render(processor, kind, question, None) for kind, question, _ in asked]
    texts = [_render(processor, kind, question, " ".join("0" * num)) for kind, question, num in asked]
    inputs = processor(
        text=texts,
        images=images,
        videos=clips,
        padding=True,
        padding_side="right",
        do_sample_frames=False,
        return_tensors="pt",
    )
    is_answer = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    for row, (text, prompt) in enumerate(zip(texts, prompts, strict=True)):
        num_answer = len(processor.tokenizer(text.removeprefix(prompt).rstrip("\n")).input_ids)
        end = int(inputs["attention_mask"][row].sum()) - 1  # without the line break after the terminator
        is_answer[row, end - num_answer : end] = True
    return dict(inputs), is_answer


def _noise(rng: np.random.Generator) -> Picture:
    return enlarge(rng.integers(0, MAX_INTENSITY + 1, size=(8, 8)).astype(np.float64))


def _render(processor: Qwen2VLProcessor, kind: str, question: str, answer: str | None) -> str:
    user = [{"type": "text", "text": SYSTEM_PROMPT}, {"type": kind}, {"type": "text", "text": question}]
    messages: list[dict[str, Any]] = [{"role": "user", "content": user}]
    if answer is not None:
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    rendered = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer is None)
    assert isinstance(rendered, str)
    return rendered
