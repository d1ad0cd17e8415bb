"""A run that is killed, resumed, stopped and finished through the real command line, and what its report tells."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.tiny_run import TinyRun, make_tiny_run

pytestmark = pytest.mark.e2e

SETTINGS = (
    "train.output_dir=told", "train.resume=auto", "train.max_steps=400", "train.save_steps=4", "train.eval_steps=8",
    "train.save_total_limit=2", "train.metric_for_best_model=images/loss", "train.predict_with_generate=true",
    "train.generation_max_new_tokens=3", "data.cache.dir=cache",
)  # fmt: skip


def start(run: TinyRun, log: Path, *overrides: str) -> subprocess.Popen[bytes]:
    command = run.train_command(*SETTINGS, *overrides)
    with log.open("wb") as stream:
        return subprocess.Popen(command, cwd=run.directory, env=run.environment(), stdout=stream, stderr=stream)


def wait_for_step(run: TinyRun, step: int, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 200
    metrics = run.directory / "told" / "metrics.jsonl"
    while not metrics.exists() or max((line["step"] for line in run.metrics("told")), default=0) < step:
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    made = make_tiny_run(tmp_path_factory.mktemp("report"), num_images=12, num_clips=2)
    log = made.directory / "log.txt"
    process = start(made, log)
    wait_for_step(made, 6, process, log)
    process.kill()
    process.wait()
    process = start(made, log)
    wait_for_step(made, 11, process, log)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 75, log.read_text()
    steps = max(line["step"] for line in made.metrics("told")) + 2
    ended = made.train(*SETTINGS, f"train.max_steps={steps}", "train.resume_anyway=[data]")
    assert ended.exit_code == 0, ended.output
    return made


def report(run: TinyRun, *arguments: str) -> str:
    command = [str(Path(sys.executable).parent / "vlm-dist"), "report", *arguments]
    ended = run.command(command, 120)
    assert ended.exit_code == 0, ended.output
    return ended.stdout


def test_what_happened_is_on_record_and_in_the_report(run: TinyRun) -> None:
    events = [json.loads(line) for line in (run.directory / "told" / "events.jsonl").read_text().splitlines()]
    told = [(one["event"], one.get("resumed_from") is not None) for one in events if one["event"] != "checkpoint"]
    assert told == [("started", False), ("started", True), ("stopped", False), ("started", True), ("done", False)]
    assert [one["signal"] for one in events if one["event"] == "stopped"] == ["SIGTERM"]
    written = {one["name"]: one["bytes"] for one in events if one["event"] == "checkpoint"}
    assert "checkpoint-4" in written and min(written.values()) > 10_000

    lives = json.loads((run.directory / "told" / "environment.json").read_text())["lives"]
    assert [life["life"] for life in lives] == [1, 2, 3] and lives[0]["world_size"] == 1
    assert "--set train.output_dir=told" in lives[0]["command"] and lives[0]["versions"]["torch"]

    said = report(run, "told", "--terminal")
    for what in ("told  done", "start 1 ended without a word", "resumed at step", "stopped by a signal, SIGTERM"):
        assert what in said, said
    report(run, "told")
    page = (run.directory / "report.html").read_text()
    for what in ("checkpoint-4", "superseded", "Loss by source, held out", "learning_rate", "data:image/jpeg;base64"):
        assert what in page, what
