"""What a careful user of a peer writes himself: decode, one processor call per batch, labels of the answers alone."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from PIL import Image
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as transforms
from transformers import Qwen2VLProcessor

from tests.bench.data.task import BATCH_SIZE, DECODED_SIDE

torch.set_num_threads(1)

#: (picture, question, answer)
Sample = tuple[Any, str, str]


def decode_pillow(jpeg: bytes) -> Image.Image:
    """Decode as webdataset's, energon's, streaming's and datasets' own image decoders do."""
    with io.BytesIO(jpeg) as stream:
        image = Image.open(stream)
        image.load()
        return image.convert("RGB")


def resize_pillow(image: Image.Image) -> Image.Image:
    """Resize as the documentation of the peers shows it."""
    return image.resize((DECODED_SIDE, DECODED_SIDE), Image.Resampling.BICUBIC)


def resize_tensor(image: torch.Tensor) -> torch.Tensor:
    """Resize uint8 [3, H, W]."""
    size = [DECODED_SIDE, DECODED_SIDE]
    return transforms.resize(image, size, interpolation=InterpolationMode.BICUBIC, antialias=True)


def as_sample(image: Any, text: Any) -> Sample:
    """Take the question and the answer out of a sample's JSON."""
    fields = text if isinstance(text, dict) else json.loads(text)
    return image, fields["question"], fields["answer"]


class Collate:
    """Makes a batch of samples: template, processor, padding and labels.

    Args:
        processor: its directory.
    """

    def __init__(self, processor: str) -> None:
        self._processor = Qwen2VLProcessor.from_pretrained(processor)
        tokenizer = self._processor.tokenizer
        opening = tokenizer("<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
        self._opening = torch.tensor(opening)
        self._end = tokenizer.convert_tokens_to_ids("<|im_end|>")

    def __call__(self, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
        texts = []
        for _, question, answer in samples:
            shown = [{"type": "image"}, {"type": "text", "text": question}]
            messages = [
                {"role": "user", "content": shown},
                {"role": "assistant", "content": [{"type": "text", "text": answer}]},
            ]
            texts.append(self._processor.apply_chat_template(messages, tokenize=False))
        images = [[image] for image, _, _ in samples]
        batch = dict(self._processor(text=texts, images=images, padding=True, return_tensors="pt"))
        batch["labels"] = self._labels(batch["input_ids"])
        return batch

    def _labels(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Keep what follows the last "assistant" up to and with the end of the turn: [B, T]."""
        length = len(self._opening)
        windows = input_ids.unfold(1, length, 1) == self._opening
        starts = windows.all(-1).int() * torch.arange(1, windows.shape[1] + 1)
        start = starts.max(1).values + length - 1
        places = torch.arange(input_ids.shape[1])
        after = places >= start[:, None]
        ended = (input_ids == self._end) & after
        before_end = ended.int().cumsum(1) - ended.int() == 0
        return input_ids.masked_fill(~(after & before_end), -100)


def in_batches(samples: Iterator[Sample], collate: Collate) -> Iterator[dict[str, torch.Tensor]]:
    """Batch without workers."""
    batch: list[Sample] = []
    for sample in samples:
        batch.append(sample)
        if len(batch) == BATCH_SIZE:
            yield collate(batch)
            batch = []
