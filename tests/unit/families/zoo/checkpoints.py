"""The list of tiny checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.unit.families.zoo import google, idefics, llava, others, qwen
from vlm_dist.config.vlm_model import ModelClassEntry


@dataclass(frozen=True)
class TinyCheckpoint:
    """A model and its processor, and the three lines that make it known.

    Attributes:
        name: of the checkpoint.
        model_class: first line.
        processor_class: second line; the third is `import_path: transformers`.
        build: makes both.
    """

    name: str
    model_class: str
    processor_class: str
    build: Callable[[], tuple[Any, Any]]

    @property
    def entry(self) -> ModelClassEntry:
        """What a user writes in `model_classes`."""
        return ModelClassEntry(
            model_class=self.model_class, processor_class=self.processor_class, import_path="transformers"
        )

    def save(self, directory: Path) -> Path:
        """Write model and processor."""
        model, processor = self.build()
        model.save_pretrained(directory)
        processor.save_pretrained(directory)
        return directory


_ROWS = (
    ("qwen2_vl", "Qwen2VLForConditionalGeneration", "Qwen2VLProcessor", qwen.qwen2_vl),
    ("qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLProcessor", qwen.qwen2_5_vl),
    ("qwen3_vl", "Qwen3VLForConditionalGeneration", "Qwen3VLProcessor", qwen.qwen3_vl),
    ("llava", "LlavaForConditionalGeneration", "LlavaProcessor", llava.llava),
    ("llava_next", "LlavaNextForConditionalGeneration", "LlavaNextProcessor", llava.llava_next),
    (
        "llava_next_video",
        "LlavaNextVideoForConditionalGeneration",
        "LlavaNextVideoProcessor",
        llava.llava_next_video,
    ),
    (
        "llava_onevision",
        "LlavaOnevisionForConditionalGeneration",
        "LlavaOnevisionProcessor",
        llava.llava_onevision,
    ),
    ("internvl", "InternVLForConditionalGeneration", "InternVLProcessor", llava.internvl),
    ("paligemma", "PaliGemmaForConditionalGeneration", "PaliGemmaProcessor", google.paligemma),
    ("gemma3", "Gemma3ForConditionalGeneration", "Gemma3Processor", google.gemma3),
    ("idefics2", "Idefics2ForConditionalGeneration", "Idefics2Processor", idefics.idefics2),
    ("idefics3", "Idefics3ForConditionalGeneration", "Idefics3Processor", idefics.idefics3),
    ("smolvlm", "SmolVLMForConditionalGeneration", "SmolVLMProcessor", idefics.smolvlm),
    ("pixtral", "LlavaForConditionalGeneration", "PixtralProcessor", others.pixtral),
    ("mistral3", "Mistral3ForConditionalGeneration", "PixtralProcessor", others.mistral3),
    ("glm4v", "Glm4vForConditionalGeneration", "Glm4vProcessor", others.glm4v),
    ("mllama", "MllamaForConditionalGeneration", "MllamaProcessor", others.mllama),
)

#: By name.
CHECKPOINTS: dict[str, TinyCheckpoint] = {name: TinyCheckpoint(name, *rest) for name, *rest in _ROWS}
