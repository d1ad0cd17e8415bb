"""A small run whose data have all that a preview has to show: photographs, clips, scripts, and what cannot be used."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml

from tests.e2e.media import write_media
from tests.tiny_run import SHAPE, write_configs
from vlm_dist.demo.tiny_model import save_tiny_qwen2_vl

#: Names and texts that would run in a page that does not escape them.
EVIL_NAME = "<img src=x onerror=alert(1)>.jpg"
EVIL_QUESTION = "</script><script>alert('question')</script><b>Is it bold?</b>"
KOREAN_ANSWER = "중국의 탑이 언덕 위에 서 있습니다. 🏯"


def _talk(question: str, answer: str, **media: object) -> dict[str, Any]:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": turns, **media}


TALKS = [
    _talk("<image>What is this?", "A pagoda on a hill in China.", images=["china.jpg"]),
    _talk("<image>And this?<image>", "A dahlia, in full bloom, beside a pagoda.", images=["flower.jpg", "china.jpg"]),
    _talk("<image>이 사진에 무엇이 있나요?", KOREAN_ANSWER, images=["china.jpg"]),
    _talk("<image>" + EVIL_QUESTION, "It is text.", images=[EVIL_NAME]),
    _talk("<image>What is torn?", "The file.", images=["torn.jpg"]),
    _talk("<image>Is it wide?", "Very wide.", images=["wide.jpg"]),
    _talk("<image>Is it long?", "Yes, and " + "so on and " * 200, images=["flower.jpg"]),
]
CLIPS = [
    _talk("<video>What moves?", "The camera, to the right.", videos=["pan.mp4"]),
    _talk("<video>무엇이 움직이나요?", "카메라가 오른쪽으로 움직입니다.", videos=["pan.avi"]),
]
WORDS = [_talk("Say something.", "Something, " * count) for count in range(1, 8)]


def write_preview_run(directory: Path) -> Path:
    """Write model, data and configs; gives back the run file. Commands are run in the directory."""
    save_tiny_qwen2_vl(directory / "model", SHAPE, dtype=torch.float32)
    write_configs(directory, torch.float32)
    media = directory / "media"
    write_media(media)
    shutil.copy(media / "flower.jpg", media / EVIL_NAME)
    (media / "torn.jpg").write_bytes((media / "china.jpg").read_bytes()[:9000])
    for name, talks in (("talks", TALKS), ("clips", CLIPS), ("words", WORDS)):
        lines = "\n".join(json.dumps(one, ensure_ascii=False) for one in talks)
        (directory / f"{name}.jsonl").write_text(lines)
    sources = [{"name": name, "type": "jsonl", "path": f"{name}.jsonl"} for name in ("talks", "clips", "words")]
    for source in sources[:2]:
        source["media_root"] = "media"
    run_file = {
        "model": "model",
        "deepspeed": "../ds_configs/zero2.json",
        "overrides": {
            "model": {"processor_params": {"min_pixels": 56 * 56, "max_pixels": 12845056}},
            "collator": {
                "dataset_columns": {
                    "messages_column": "messages",
                    "image_column": "images",
                    "video_column": "videos",
                },
                "data_processing": {"image_data": True, "video_data": True},
                "image_processing": {"max_size": 336},
                "label_masking": {"mask_input_tokens": True},
                "text_processing": {"max_length": 512},
            },
            "train": {
                "output_dir": "out",
                "report_to": "none",
                "per_device_train_batch_size": 4,
                "per_device_eval_batch_size": 2,
                "gradient_accumulation_steps": 4,
            },
            "data": {"index_dir": "index", "train": sources, "eval": sources[:2]},
        },
    }
    path = directory / "configs" / "preview.yaml"
    path.write_text(yaml.safe_dump(run_file))
    return path
