"""Every command of docs/data.md does what the page says."""

from __future__ import annotations

import io
import json
import re
import shlex
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from sklearn.datasets import load_sample_images

from tests.e2e.preloaded import Preloaded
from tests.tiny_run import ROOT, SHAPE, write_configs
from vlm_dist.demo.digits import encode_clip
from vlm_dist.demo.tiny_model import save_tiny_qwen2_vl

pytestmark = pytest.mark.e2e

PAGE = (ROOT / "docs" / "data.md").read_text()
CHINA = np.asarray(load_sample_images().images[0])


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(texts)]


TALKS = [
    {"id": "1", "image": "a.jpg", "conversations": turns("<image>\nWhat is this?", "A pagoda.")},
    {"id": "2", "image": ["a.jpg", "b.png"], "conversations": turns("<image><image>Which?", "The first.", "?", "No.")},
    {"id": "3", "conversations": turns("Why?", "So.")},
    {"id": "4", "video": "clip.mp4", "conversations": turns("<video>What moves?", "The camera.")},
] * 2


def write_inputs(directory: Path) -> None:
    """The files that the page names."""
    stream = io.BytesIO()
    Image.fromarray(CHINA[::4, ::4]).save(stream, "JPEG")
    for folder in ("media", "folder", "tables", "old", "configs"):
        (directory / folder).mkdir(exist_ok=True)
    (directory / "media" / "a.jpg").write_bytes(stream.getvalue())
    Image.fromarray(CHINA[::8, ::8]).save(directory / "media" / "b.png")
    frames = [CHINA[:224:4, left : left + 224 : 4] for left in range(0, 160, 20)]
    (directory / "media" / "clip.mp4").write_bytes(encode_clip(frames))
    (directory / "talks.json").write_text(json.dumps(TALKS[:6]))
    lines = [json.dumps({"image": "a.jpg", "query": "What?", "label": "This."})] * 3
    (directory / "vqa.jsonl").write_text("\n".join(lines))
    (directory / "hurt.jsonl").write_text("\n".join([*lines, "no json", lines[0].replace("a.jpg", "none.jpg")]))
    rows = {
        "image": [{"bytes": stream.getvalue(), "path": None}] * 5,
        "question": ["What?"] * 5,
        "answer": ["This."] * 5,
    }
    table = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    table.to_parquet(directory / "tables" / "vqa.parquet")
    datasets.DatasetDict({"train": table}).save_to_disk(directory / "saved")
    (directory / "folder" / "a.jpg").write_bytes(stream.getvalue())
    (directory / "folder" / "metadata.csv").write_text("file_name,question,answer\na.jpg,What?,This.\n")
    with tarfile.open(directory / "old" / "0.tar", "w") as archive:
        for key in ("a", "b", "c"):
            for name, data in ((f"{key}.jpg", stream.getvalue()), (f"{key}.json", b"{}"), (f"{key}.txt", b"note")):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))


def test_the_commands_of_the_page(tmp_path: Path, process: Preloaded, monkeypatch: pytest.MonkeyPatch) -> None:
    write_configs(tmp_path, torch.float32)
    write_inputs(tmp_path)
    save_tiny_qwen2_vl(tmp_path / "model", SHAPE, dtype=torch.float32)
    commands = [line for block in re.findall(r"```bash\n(.*?)```", PAGE, re.S) for line in block.splitlines()]
    assert len(commands) > 12
    outputs = {}
    for command in commands:
        program, *arguments = shlex.split(command)
        assert program == "vlm-dist"
        if "tokens" in arguments:
            arguments += ["--workers", "0"]  # in the process that has everything imported
        ended = process.run("vlm_dist.cli", arguments, tmp_path, {"HF_DATASETS_CACHE": str(tmp_path / "cache")})
        assert ended.exit_code == 0, f"{command}\n{ended.output}"
        outputs[command] = ended.output
        if "data/talks" in command and "build" in command:
            overrides = yaml.safe_load(ended.stdout[ended.stdout.index("\ndata: #") :])
            overrides |= {"train": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1}}
            run_file = {"model": "model", "deepspeed": "../ds_configs/zero2.json", "overrides": overrides}
            (tmp_path / "configs" / "talks.yaml").write_text(yaml.safe_dump(run_file))
    # what the page shows of the first is what comes, but for figures
    shown = re.search(r"```text\n(6 samples.*?)```", PAGE, re.S)
    assert shown is not None
    figures = re.compile(r"\d+\.\d+")
    assert figures.sub("0", shown[1]) == figures.sub("0", outputs[commands[0]])
    assert "left out: 2 records (1 malformed, 1 missing_media)" in outputs[commands[7]]
    assert (tmp_path / "extracted").is_dir()


def test_kinds_of_bad_records_are_those_of_the_code() -> None:
    from vlm_dist.data.shards.build.bad_records import BAD_CLASSES

    table = PAGE[PAGE.index("| kind | what it is |") : PAGE.index("## Columns")]
    assert set(re.findall(r"`(\w+)`", table)) == set(BAD_CLASSES)
