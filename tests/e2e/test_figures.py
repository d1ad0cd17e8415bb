"""What a run tells while it goes on: the same figures on the console, in metrics.jsonl, in wandb and in TensorBoard."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.tiny_run import Finished, TinyRun, make_tiny_run
from vlm_dist import build
from vlm_dist.build.thumbnails import Thumbnails
from vlm_dist.config import load_run

pytestmark = pytest.mark.e2e

#: In every line of two ranks with two sources, on any device.
FIGURES = {
    *("loss", "learning_rate", "grad_norm", "tokens_per_second", "samples_per_second", "step_seconds", "eta_seconds"),
    *("tflops_per_device", "hardware_tflops_per_device", "mfu", "hfu", "data_wait_share", "padding_share"),
    *("num_skipped", "null_slots/decode", "host_memory_bytes", "slowest_rank", "slowest_rank_ratio"),
    *("images/loss", "images/token_share", "images/target_share", "clips/token_share", "clips/target_share"),
    *("learning_rate/vision", "learning_rate/language"),
}

SETTINGS = (
    "train.output_dir=told",
    "train.report_to=[wandb, tensorboard]",
    "train.max_steps=6",
    "train.save_steps=2",
    "train.eval_steps=3",
    "train.predict_with_generate=true",
    "train.generation_max_new_tokens=3",
    "train.device_peak_tflops=0.01",
    "train.profile.start_step=1",
    "train.profile.num_steps=1",
    "peft.towers_learning_rate.vision=1e-4",
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    return make_tiny_run(tmp_path_factory.mktemp("figures"), num_images=20, num_clips=20)


@pytest.fixture(scope="module")
def parts(run: TinyRun) -> list[Finished]:
    """Two ranks that stop after step 4, and are resumed from step 2, as if they had been killed."""
    first = run.train(*SETTINGS, "train.stop_at_step=4", processes=2)
    assert first.exit_code == 0, first.output[-3000:]
    second = run.train(*SETTINGS, "train.resume=told/checkpoint-2", processes=2)
    assert second.exit_code == 0, second.output[-3000:]
    return [first, second]


@pytest.fixture(scope="module")
def lines(run: TinyRun, parts: list[Finished]) -> list[dict[str, Any]]:
    return run.metrics("told")


def test_every_line_has_every_figure(lines: list[dict[str, Any]]) -> None:
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    for line in lines:
        assert set(line) >= FIGURES, FIGURES - set(line)
        assert line["mfu"] == pytest.approx(line["tflops_per_device"] / 0.01)
        assert 0 < line["mfu"] <= line["hfu"]
        assert line["slowest_rank"] in (0, 1) and line["slowest_rank_ratio"] >= 1
        assert line["learning_rate/vision"] == pytest.approx(0.1 * line["learning_rate/language"])


def test_the_parts_of_the_sources_are_the_whole(lines: list[dict[str, Any]]) -> None:
    for line in lines:
        for share in ("token_share", "target_share"):
            assert line[f"images/{share}"] + line[f"clips/{share}"] == pytest.approx(1)
        whole = sum((line[f"{name}/loss"] or 0.0) * line[f"{name}/target_share"] for name in ("images", "clips"))
        assert whole == pytest.approx(line["loss"], rel=1e-6)


def test_the_log_file_has_plain_lines(parts: list[Finished]) -> None:
    for part in parts:
        assert not re.search(r"[\x1b\r]", part.stdout)
        told = [line for line in part.stdout.splitlines() if re.search(r"  step \d/6  epoch", line)]
        assert len(told) == 4
        assert all(re.search(r"MFU \d+\.\d%.* eta \d:\d\d:\d\d$", line) for line in told), told
    assert [re.search(r"step (\d)/6", line)[1] for line in told] == ["3", "4", "5", "6"]  # type: ignore[index]


def test_tensorboard_has_each_step_once(run: TinyRun, lines: list[dict[str, Any]]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run.directory / "told" / "tensorboard"))
    events.Reload()
    read = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert read == [(line["step"], pytest.approx(line["loss"], rel=1e-6)) for line in lines]
    assert {"train/mfu", "train/images/loss", "eval/images/loss", "save/stall_seconds"} <= set(events.Tags()["scalars"])
    assert "eval/predictions/text_summary" in events.Tags()["tensors"]


def test_a_resumed_offline_run_goes_on_in_the_same_wandb_run(run: TinyRun, parts: list[Finished]) -> None:
    directory = run.directory / "told"
    run_id = json.loads((directory / "wandb_run.json").read_text())["id"]
    recordings = sorted(directory.glob("wandb/offline-run-*"))
    assert len(recordings) == 2 and all(path.name.endswith(run_id) for path in recordings)
    for recording, part in zip(recordings, parts, strict=True):
        assert f"wandb sync told/wandb/{recording.name}" in part.stdout
    tables = [json.loads(path.read_text()) for path in directory.rglob("predictions_*.table.json")]
    assert tables
    for table in tables:
        pictures = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
        assert {row["source"]: row["picture"] for row in pictures} == {"images": "Image", "clips": None}


def test_a_picture_is_that_of_its_sample(run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run.directory)
    config = load_run(Path("configs/tiny.yaml"))
    sources = build.open_sources_alone(config, "eval")
    picture_of = Thumbnails(config, sources, build.make_processor(config)[1])
    origin = sources[0].origin(3)
    answer = {"source": "images", "shard": origin.shard, "key": origin.key}
    original = Image.open(io.BytesIO(sources[0].read(3).fields["image"])).convert("RGB")
    assert picture_of(answer).tobytes() == original.tobytes()
    for unknown in ({"source": "clips"}, {"key": "none"}):
        assert picture_of(answer | unknown) is None


def test_one_step_of_rank_0_was_traced_in_each_part(run: TinyRun, parts: list[Finished]) -> None:
    traces = sorted(path.name for path in (run.directory / "told" / "profile").glob("*.gz"))
    assert traces == ["steps-2-2-rank-0.json.gz", "steps-4-4-rank-0.json.gz"]


def test_packed_and_padded_tell_the_same_of_the_sources(run: TinyRun) -> None:
    """All samples in one step, before any update."""
    whole = (
        *("train.max_steps=1", "train.per_device_train_batch_size=10", "train.gradient_accumulation_steps=4"),
        *("peft.lora_dropout=0.0", "train.group_by_length=false"),
    )
    told: list[dict[str, float]] = []
    for name, settings in (("padded", []), ("packed", ["train.packing=true"])):
        ended = run.train(*whole, f"train.output_dir={name}", *settings)
        assert ended.exit_code == 0, ended.output[-3000:]
        (line,) = run.metrics(name)
        told.append({key: line[key] for key in line if key == "loss" or key.startswith(("images/", "clips/"))})
    assert len(told[0]) == 7
    assert told[0] == pytest.approx(told[1], rel=1e-5)


def test_the_flag_traces_without_any_configuration(run: TinyRun) -> None:
    command = run.train_command("train.output_dir=flagged", "train.max_steps=14", "train.num_train_epochs=9")
    ended = run.command([*command, "--profile"])
    assert ended.exit_code == 0, ended.output[-3000:]
    names = {path.name for path in (run.directory / "flagged" / "profile").iterdir()}
    assert names == {"steps-11-13-rank-0.json.gz", "steps-11-13-rank-0.txt"}
