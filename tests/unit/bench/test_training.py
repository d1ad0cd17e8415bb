"""The arithmetic of the training benchmark: from the clocks' lines to figures, and a run that fails or hangs."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.bench.report import Report
from tests.bench.training import runs
from tests.bench.training.__main__ import _report
from tests.bench.training.figures import Resumptions, run_rounds, ways
from tests.bench.training.job import Clock, Job
from tests.bench.training.page import page
from tests.bench.training.runs import Resumed, Run, RunError, TooLongError, _read, resume_job, run_job
from tests.bench.training.samples import MIX, _sizes, make_model
from tests.bench.training.trainers.ours import run_file
from vlm_dist.config import load_run


def job(folder: Path, **changes: object) -> Job:
    made = Job("ours", "packing", str(folder), str(folder / "model"), str(folder / "out"), num_steps=6, save_at=4)
    return replace(made, **changes)  # type: ignore[arg-type]


def write_clock(folder: Path, rank: int, times: dict[int, float], tokens: int) -> None:
    lines = [{"event": "imported", "time": 105.0}, {"event": "train", "time": 106.0, "step": 0}]
    lines += [
        {"event": "step", "time": time, "step": step, "tokens": tokens, "loss": 2.0 + rank}
        for step, time in times.items()
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"clock-{rank}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_figures_of_a_run(tmp_path: Path) -> None:
    times = {1: 110.0, 2: 112.0, 3: 113.0, 4: 115.0, 5: 120.0, 6: 122.0}  # a checkpoint between 4 and 5
    for rank in range(2):
        write_clock(tmp_path / "out", rank, times, tokens=100)
    with (tmp_path / "out" / "clock-0.jsonl").open("a") as clock:
        clock.write(json.dumps({"event": "saved", "time": 115.75, "step": 4}) + "\n")
    checkpoint = tmp_path / "out" / "run" / "checkpoint-4"
    checkpoint.mkdir(parents=True)
    (checkpoint / "weights").write_bytes(bytes(1000))
    run = _read(job(tmp_path), 100.0, 500.0)
    assert run.step_seconds == (2.0, 2.0)  # steps 4 and 6: the first three warm up, the fifth waited for a checkpoint
    assert run.tokens == 400 and run.tokens_per_second == 100.0
    assert run.import_seconds == 5.0 and run.first_step_seconds == 5.0
    assert run.save_seconds == 0.75 and run.checkpoint_bytes == 1000
    assert run.first_loss == 2.5 and run.peak_mib == 500.0


def test_a_run_that_stops_early_is_none(tmp_path: Path) -> None:
    for rank in range(2):
        write_clock(tmp_path / "out", rank, {1: 110.0}, tokens=1)
    with pytest.raises(RunError, match="1 of 6 steps"):
        _read(job(tmp_path), 100.0, 0.0)


@pytest.mark.parametrize(
    ("text", "expected"), [("raise ValueError('no such model')", "no such model"), ("", "clock-0")]
)
def test_a_run_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, expected: str) -> None:
    script = tmp_path / "torch" / "distributed" / "run.py"
    script.parent.mkdir(parents=True)
    for package in (tmp_path / "torch", script.parent):
        (package / "__init__.py").write_text("")
    script.write_text(text)
    monkeypatch.setattr(runs, "ROOT", tmp_path)
    monkeypatch.setattr(runs, "python_of", lambda trainer: Path(sys.executable))
    with pytest.raises(RunError, match=expected):
        run_job(job(tmp_path, trainer="hf_trainer"), 60, tmp_path / "log")


def test_a_run_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sleeper = tmp_path / "sleeper"
    sleeper.write_text("#!/bin/sh\nsleep 100 & sleep 100\n")
    sleeper.chmod(0o755)
    monkeypatch.setattr(runs, "python_of", lambda trainer: sleeper)
    with pytest.raises(RunError, match="took over 1 s"):
        run_job(job(tmp_path, trainer="hf_trainer"), 1.0, tmp_path / "log")


def test_what_failed_is_not_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def fake(one: Job, seconds: float, log: Path) -> Run:
        tried.append((one.trainer, one.settings))
        if one.settings == "batch_rebalance":
            raise RunError("no")
        speeds = {"packing": 40.0, "group_by_length": 30.0, "default": 10.0, "our patch embedding": 35.0}
        speed = speeds[one.settings]
        return Run(speed, (1.0,), 1, 1.0, 1.0, 3.0, 0.1, 10, 5.0)

    monkeypatch.setattr("tests.bench.training.figures.run_job", fake)
    asked = ways(("ours", "hf_trainer"))
    *_, results = run_rounds(job(tmp_path), asked, 2, 1.0, tmp_path)
    assert tried.count(("hf_trainer", "batch_rebalance")) == 1 and tried.count(("ours", "packing")) == 2
    assert results.best("hf_trainer") == ("hf_trainer", "group_by_length")  # what is offered
    report = Report()
    _report(report, "mix", results, ("ours", "hf_trainer"))
    compared = {figure.name: figure for figure in report.figures if figure.has_aim}
    default = compared["mix/packing beside hf_trainer, default (default)"]
    best = compared["mix/packing beside hf_trainer, best (group_by_length)"]
    assert default.ratio == 4.0 and default.is_met and best.ratio == pytest.approx(4 / 3) and best.is_met
    found = {("ours", "packing"): Resumed(1.0, 2.0), ("hf_trainer", "streaming"): Resumed(5.0, 90.0, is_over=True)}
    resumed = Resumptions(found, {("llamafactory", "default"): "the first start: took over 150 s"})
    text = page({"mix": results}, resumed, report, 2)
    assert "| vlm-dist | packing | 1.0 s | 2.0 s |" in text and "| streaming | 5.0 s | over 90.0 s |" in text
    assert "default: no figure: the first start: took over 150 s" in text
    assert "batch_rebalance: not measured: no" in text and "1.33 times (aim 1.15): met" in text


def test_a_resumption_is_a_checkpoint_made_later_and_a_run_that_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Job] = []

    def train(one: Job, deadline_seconds: float, log: Path) -> tuple[float, float]:
        asked.append(one)
        if one.resumed_at:
            assert one.checkpoint() == str(tmp_path / "out" / "run" / "checkpoint-30")
            for rank in range(2):
                write_clock(tmp_path / "out", rank, {31: 112.0 + rank}, tokens=1)
        else:
            left = tmp_path / "out" / "run" / "checkpoint-1"
            left.mkdir(parents=True)
            (left / "trainer_state.json").write_text(json.dumps({"global_step": 1, "epoch": 0.02, "max_steps": 1}))
        return 100.0, 0.0

    monkeypatch.setattr(runs, "_train", train)
    found = resume_job(job(tmp_path, trainer="hf_trainer"), 30, 9.0, tmp_path / "log")
    assert found == Resumed(5.0, 8.0)
    assert [(one.num_steps, one.save_at, one.resumed_at) for one in asked] == [(1, 1, 0), (31, 0, 30)]

    def hang(one: Job, deadline_seconds: float, log: Path) -> tuple[float, float]:
        if not one.resumed_at:
            return 0.0, 0.0
        write_clock(tmp_path / "out", 0, {}, tokens=1)
        write_clock(tmp_path / "out", 1, {}, tokens=1)
        raise TooLongError(100.0, deadline_seconds)

    monkeypatch.setattr(runs, "_train", hang)
    again = resume_job(job(tmp_path), 30, 9.0, tmp_path / "log")
    assert again == Resumed(5.0, 4.0, is_over=True)
    state = json.loads((tmp_path / "out" / "run" / "checkpoint-30" / "trainer_state.json").read_text())
    assert state == {"global_step": 30, "epoch": 0.6, "max_steps": 1}


def test_the_run_file_is_a_good_one(tmp_path: Path) -> None:
    made = job(tmp_path)
    (tmp_path / "out").mkdir()
    make_model(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text(
        json.dumps({"image": None, "question": "q", "answer": "a", "tokens": 9}) + "\n"
    )
    assert not load_run(run_file(made), []).collator.data_processing.image_data
    (tmp_path / "rows.jsonl").write_text(json.dumps({"image": "x", "question": "q", "answer": "a", "tokens": 9}) + "\n")
    config = load_run(run_file(made), [])
    assert config.collator.data_processing.image_data
    assert config.train.packing and config.train.save_steps == 4 and not config.train.bf16
    assert config.peft.towers.vision == "freeze"


def test_a_clock_counts_since_the_last_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    clock = Clock(job(tmp_path))
    clock.count(5)
    clock.count(7)
    clock.step(1, loss=1.0)
    clock.count(2)
    clock.step(2)
    lines = [json.loads(line) for line in (tmp_path / "out" / "clock-1.jsonl").read_text().splitlines()]
    assert [line["tokens"] for line in lines] == [12, 2]


def test_lengths_keep_their_shape() -> None:
    tokens, tiles = _sizes(replace(MIX, num_samples=4000))
    assert 300 < tokens.mean() < 500 and tokens.max() <= MIX.max_tokens
    assert 0.4 < np.mean(tiles > 0) < 0.6
