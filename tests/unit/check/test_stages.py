"""Each stage finds what is wrong with it, and what is not there keeps only those from running that need it."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.tiny_run import make_tiny_run
from vlm_dist.check.child import Lost, run_in_child
from vlm_dist.check.examination import DEFAULT_STAGES, Examination, examine
from vlm_dist.errors import ExitCode, SkipSample
from vlm_dist.observability.findings import Finding, Level, exit_code, format_table

EVERY_STEP = ("train.eval_steps=1", "train.save_steps=1")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("stages")
    make_tiny_run(made, num_images=12, num_clips=4)
    return made


def examined(directory: Path, monkeypatch: pytest.MonkeyPatch, *overrides: str, stages: object = None) -> Examination:
    monkeypatch.chdir(directory)
    wanted = DEFAULT_STAGES if stages is None else stages
    return examine(Path("configs/tiny.yaml"), overrides, wanted)  # type: ignore[arg-type]


def problems(found: Examination, stage: str) -> str:
    return "\n".join(one.found for one in found.found[stage] if one.level is Level.PROBLEM)


def test_a_missing_source_hides_no_other(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = ["data.train.0.path=nowhere", "data.eval.1.path=elsewhere", "peft.target_modules=[nothing_like_it]"]
    found = examined(directory, monkeypatch, *paths)
    assert "nowhere" in problems(found, "data") and "elsewhere" in problems(found, "data")
    assert "nothing_like_it" in problems(found, "model")
    assert any("not looked at" in one.found and "stage data" in one.found for one in found.found["batch"])
    assert found.exit_code == ExitCode.DATA


def test_pictures_that_cannot_be_read(directory: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    lines = [f'{{"image": "{number}.png", "question": "q", "answer": "a"}}\n' for number in range(4)]
    (tmp_path / "few.jsonl").write_text("".join(lines))
    for number in range(4):
        (tmp_path / f"{number}.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(40))
    source = f"data.train=[{{name: few, type: jsonl, path: {tmp_path / 'few.jsonl'}, media_root: {tmp_path}}}]"
    found = examined(
        directory, monkeypatch, source, "data.eval=[]", "collator.data_processing.video_data=false", stages=["data"]
    )
    assert "4 of 4 samples that were read cannot be used" in problems(found, "data")
    assert "0.png" in problems(found, "data") or "few" in problems(found, "data")
    assert found.exit_code == ExitCode.DATA


def test_the_batch_stage_refuses_a_metric_of_no_source(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = examined(directory, monkeypatch, "train.metric_for_best_model=imagse/loss", *EVERY_STEP, stages=["batch"])
    assert "did you mean images" in problems(found, "batch")


def test_an_output_dir_in_use_is_a_warning(directory: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "checkpoint-7").mkdir()
    found = examined(directory, monkeypatch, f"train.output_dir={tmp_path}", stages=["batch"])
    told = [one for one in found.found["batch"] if one.what == "output_dir"]
    assert [one.level for one in told] == [Level.WARNING] and "earlier run" in told[0].found
    assert found.exit_code == 0
    resumed = examined(directory, monkeypatch, f"train.output_dir={tmp_path}", "train.resume=auto", stages=["batch"])
    assert not [one for one in resumed.found["batch"] if one.what == "output_dir"]


def test_a_fault_is_told_once(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    column = "collator.dataset_columns.image_column=picture"
    found = examined(directory, monkeypatch, column, "data.train.1.path=data/images", stages=["data", "processor"])
    said = [one.found for one in found.findings if one.level is Level.PROBLEM and "no source has a column" in one.found]
    assert len(said) == len(set(said))
    assert any("not looked at any further" in one.found for one in found.found["processor"])
    unknown = examined(directory, monkeypatch, "model_id=modle")
    assert len([one for one in unknown.findings if one.level is Level.PROBLEM]) == 1
    assert "there is no such directory in" in problems(unknown, "config")


def test_space_for_checkpoints(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 2**20})())
    found = examined(
        directory, monkeypatch, "train.save_steps=1", "train.save_total_limit=null", "peft.r=64", stages=["model"]
    )
    assert "6 are written, up to 7 lie in run at a time" in problems(found, "model")
    assert found.exit_code == ExitCode.CHECKPOINT


def test_work_in_a_child_survives_what_kills_it() -> None:
    def killed() -> int:
        os.kill(os.getpid(), signal.SIGKILL)
        return 0

    def stuck() -> int:
        time.sleep(60)
        return 0

    def skipped() -> int:
        raise SkipSample("decode", "no picture")

    began = time.monotonic()
    outcomes = run_in_child([lambda: 1, killed, skipped, lambda: 2], 5.0)
    assert outcomes[0] == 1 and outcomes[3] == 2
    assert isinstance(outcomes[1], Lost) and "SIGKILL" in outcomes[1].message
    assert isinstance(outcomes[2], SkipSample) and outcomes[2].null_class == "decode"
    assert run_in_child([lambda: 1, stuck, lambda: 3], 0.5)[1:] == [Lost("timeout: it took longer than 0.5 s"), 3]
    assert time.monotonic() - began < 30


def test_the_table_has_the_worst_first_and_the_code_of_the_first_stage() -> None:
    found = [
        Finding(Level.OK, "a", "good"),
        Finding(Level.WARNING, "b", "odd", "look"),
        Finding(Level.PROBLEM, "c", "first line\nsecond line", "mend it", exit_code=ExitCode.DATA),
        Finding(Level.PROBLEM, "d", "worse", exit_code=ExitCode.MODEL),
    ]
    lines = format_table(found, "title").splitlines()
    assert lines[0] == "title: 2 problems, 1 warning"
    assert [line.split()[0] for line in lines[1:] if line[0] != " "] == ["PROBLEM", "PROBLEM", "WARNING", "ok"]
    assert lines[2].strip() == "second line" and "-> mend it" in lines[3]
    assert exit_code(found) is ExitCode.DATA and exit_code(found[:2]) is ExitCode.DONE
