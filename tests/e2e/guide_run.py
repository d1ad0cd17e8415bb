"""A working directory in which the guide's examples are true: its model, data sets and run files, all tiny."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import numpy as np
import torch
import yaml

from tests.e2e.guide_text import Block, blocks
from tests.e2e.preloaded import Preloaded
from tests.tiny_run import SHAPE, Finished, TinyRun, write_configs
from vlm_dist.demo.digits import encode_clip, encode_png
from vlm_dist.demo.tiny_model import save_tiny_qwen2_vl

MODEL = "Qwen/Qwen2-VL-2B-Instruct"

_CARD = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: train.jsonl\n---\n"


def make_guide_run(directory: Path) -> TinyRun:
    """The directory. A local directory counts before a hub id, so the tiny model has the name of the real one."""
    save_tiny_qwen2_vl(directory / MODEL, SHAPE, dtype=torch.bfloat16)
    write_configs(directory, torch.bfloat16)
    settings = directory / "configs" / "train_config.yaml"  # worker processes take longer to start than all steps here
    settings.write_text(settings.read_text().replace("dataloader_num_workers: 2", "dataloader_num_workers: 0"))
    rng = np.random.default_rng(0)
    for folder in (directory / "data", directory / "your-vqa-dataset" / "images"):
        folder.mkdir(parents=True)
        for number in range(4):
            picture = rng.integers(0, 255, (int(rng.integers(30, 90)), 60, 3), dtype=np.uint8)
            (folder / f"{number}.png").write_bytes(encode_png(picture))
    for number in range(2):
        frames = [rng.integers(0, 255, (56, 56, 3), dtype=np.uint8) for _ in range(20)]
        (directory / "data" / f"{number}.mp4").write_bytes(encode_clip(frames))
    write_rows(directory / "data" / "vqa.jsonl", image="{}.png", question="Which digit?", answer="{}")
    write_rows(directory / "data" / "clips.jsonl", video_path="{}.mp4", question="Which digits?", answer="{}")
    rows = {"image_path": "{}.png", "query": "Which digit is this?", "response": "{}", "metadata": "x"}
    write_rows(directory / "your-vqa-dataset" / "train.jsonl", **rows)
    (directory / "your-vqa-dataset" / "README.md").write_text(_CARD)
    for block in blocks("en"):
        if block.language == "yaml" and block.file.startswith("configs/"):
            (directory / block.file).write_text(block.text)
    return TinyRun(directory)


def write_rows(path: Path, **columns: str) -> None:
    """20 records; `{}` is one of the media."""
    count = 2 if any("mp4" in text for text in columns.values()) else 4
    rows = [{name: text.format(number % count) for name, text in columns.items()} for number in range(20)]
    path.write_text("\n".join(map(json.dumps, rows)))


def edit_files(run: TinyRun, fragments: list[Block]) -> None:
    """Do what a reader does who copies fragments into the files that they name."""
    for block in fragments:
        file = run.directory / "configs" / block.file
        content = yaml.safe_load(file.read_text())
        for key, value in yaml.safe_load(block.text).items():
            is_merged = isinstance(content.get(key), dict) and isinstance(value, dict)
            content[key] = content[key] | value if is_merged else value
        file.write_text(yaml.safe_dump(content, sort_keys=False))


def run_commands(block: Block, run: TinyRun, process: Preloaded) -> list[Finished]:
    """Run a bash block line by line, and see each command succeed.

    `deepspeed … -m MODULE` is run as MODULE with one process; the launcher has tests of its own.
    """
    ended = []
    for line in block.text.splitlines():
        words = shlex.split(line, comments=True)
        if words[0] == "vlm-dist":
            finished = process.run("vlm_dist.cli", words[1:], run.directory, timeout_seconds=120)
        else:
            assert words[0] in ("python", "deepspeed"), line
            module = words.index("-m")
            assert words[module + 1] == "vlm_dist.train", line
            finished = process.run("vlm_dist.train", words[module + 2 :], run.directory, timeout_seconds=120)
        assert finished.exit_code == 0, f"{line}\n{finished.output}"
        assert "Traceback" not in finished.output, f"{line}\n{finished.output}"
        ended.append(finished)
    return ended
