"""The scenarios of configs/README.md through the real command line, and what each must have done."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.guide_run import edit_files, make_guide_run, run_commands
from tests.e2e.guide_text import Block, blocks
from tests.e2e.preloaded import Preloaded
from tests.tiny_run import Finished, TinyRun

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    return make_guide_run(tmp_path_factory.mktemp("walk"))


def scenario(number: int, language: str) -> list[Block]:
    found = [
        block
        for block in blocks("en")
        if block.heading.startswith(f"Scenario {number}:") and block.language == language
    ]
    assert found
    return found


def walk(number: int, run: TinyRun, process: Preloaded) -> list[Finished]:
    return [ended for block in scenario(number, "bash") for ended in run_commands(block, run, process)]


def test_1_a_new_vqa_data_set(run: TinyRun, process: Preloaded) -> None:
    checked, tried, trained, _, answered, verified = walk(1, run, process)
    assert "0 problems" in checked.stdout
    assert "done: 2 steps" in tried.output and "done: 2 steps" in trained.output  # 20 samples, 16 a step
    assert (run.directory / "runs" / "vqa" / "adapter" / "adapter_model.safetensors").is_file()
    assert (run.directory / "report.html").is_file()
    assert answered.stdout.strip()
    assert "adapter" in verified.stdout
    resolved = (run.directory / "runs" / "vqa" / "resolved_config.yaml").read_text()
    assert "image_column: image_path" in resolved
    lost = {key: value for record in run.metrics("runs/vqa") for key, value in record.items() if "null_slots/" in key}
    assert lost and not any(value for key, value in lost.items() if key != "null_slots/tail"), lost


def test_2_videos(run: TinyRun, process: Preloaded) -> None:
    checked, trained = walk(2, run, process)
    assert "pixel_values_videos" in checked.stdout and "pixel_values  " not in checked.stdout
    # 16 of a clip's 20 frames, two to a patch: 8 in the grid, which is the greatest of its numbers here
    grid = next(line for line in checked.stdout.splitlines() if "video_grid_thw" in line)
    assert grid.split()[-1] == "8"
    assert "done: 2 steps" in trained.output
    assert run.losses("runs/video")


def test_3_out_of_memory(run: TinyRun, process: Preloaded, tmp_path: Path) -> None:
    """Both commands of the guide; the settings make the estimate smaller, and are those of the files' fragments."""
    first, then = scenario(3, "bash")[0].text.splitlines()
    walk(3, run, process)

    def rows(line: str, at: TinyRun) -> dict[str, Any]:
        arguments = [*line.split()[1:], "--json", "--set", "train.output_dir=runs/estimated"]
        ended = process.run("vlm_dist.cli", arguments, at.directory)
        assert ended.exit_code == 0, ended.output
        return next(row for row in json.loads(ended.stdout)["variants"] if row["as_the_run_file"])

    before, after = (rows(line, run) for line in (first, then))
    assert after["largest_total_bytes"] < before["largest_total_bytes"]
    parts = before["largest_bytes"], after["largest_bytes"]
    for part in ("adapter", "optimizer"):
        assert parts[1][part] == pytest.approx(parts[0][part] / 2, rel=0.01)
    edited = make_guide_run(tmp_path)
    edit_files(edited, scenario(3, "yaml"))
    assert rows(first, edited)["largest_bytes"] == after["largest_bytes"]


def test_4_each_stage_alone(run: TinyRun, process: Preloaded) -> None:
    ended = walk(4, run, process)
    assert len(ended) == 5
    assert "step" in ended[-1].stdout and "loss" in ended[-1].stdout
    # a fault is found where it is, and nowhere else
    for fault, stage, others in (
        ("collator.dataset_columns.question_column=question", "data", ("model",)),
        ("peft.target_modules=[nothing_proj]", "model", ("data", "processor")),
    ):
        for asked in (stage, *others):
            arguments = ["check", "configs/vqa.yaml", "--stage", asked, "--set", fault]
            found = process.run("vlm_dist.cli", arguments, run.directory)
            assert (found.exit_code != 0) == (asked == stage), found.output
