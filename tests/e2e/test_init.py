"""`vlm-dist init`, from flags and on a terminal: what it writes is what trains."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import subprocess
import time
from pathlib import Path

import pytest

from tests.tiny_run import TinyRun, make_tiny_run
from vlm_dist.config import load_run
from vlm_dist.errors import ConfigError
from vlm_dist.start.answers import Answers, complete, guess
from vlm_dist.start.run_file import write_run_file

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    made = make_tiny_run(tmp_path_factory.mktemp("init"), num_images=12, num_clips=4)
    lines = [json.dumps({"query": "What is it?", "response": str(number), "note": "x"}) for number in range(8)]
    (made.directory / "odd names.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return made


def test_from_flags_it_trains(run: TinyRun) -> None:
    command = ["vlm-dist", "init", "my runs/vqa.yaml", "--model", "model", "--data", "data/images"]
    command += ["--eval-data", "data/images-heldout", "--gpus", "0", "--output-dir", "runs/vqa", "--yes"]
    finished = run.command(command)
    assert finished.exit_code == 0, finished.output
    assert "next:  vlm-dist check 'my runs/vqa.yaml'" in finished.stdout
    path = run.directory / "my runs" / "vqa.yaml"
    assert path.read_text().startswith("# python -m vlm_dist.train --config 'my runs/vqa.yaml'\n")
    assert run.command(command).exit_code == 2  # it is there
    assert run.command([*command, "--force"]).exit_code == 0
    trained = run.train_command(
        "train.stop_at_step=1", "train.bf16=false", "model.loading_params.torch_dtype=float32", "train.logging_steps=1"
    )
    trained[trained.index("--config") + 1] = "my runs/vqa.yaml"
    finished = run.command(trained)
    assert finished.exit_code == 0, finished.output
    assert run.metrics("runs/vqa")[0]["loss"] > 0


def test_on_a_terminal_it_asks(run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = ["model", "odd names.jsonl", "-", "-", "query", "response", "runs/odd", "16"]
    ours, theirs = pty.openpty()
    child = subprocess.Popen(
        ["vlm-dist", "init", "asked.yaml"], cwd=run.directory, env=run.environment(), stdin=theirs, stdout=theirs,
        stderr=theirs, close_fds=True,
    )  # fmt: skip
    os.close(theirs)
    said = ""
    deadline = time.monotonic() + 120
    while answers or child.poll() is None:
        assert time.monotonic() < deadline, said
        if select.select([ours], [], [], 0.2)[0]:
            try:
                said += os.read(ours, 4096).decode(errors="replace")
            except OSError:
                break
        if answers and said.rstrip().endswith(":"):
            os.write(ours, f"{answers.pop(0)}\n".encode())
            said += "\n"
    assert child.wait(30) == 0, said
    assert re.search(r"columns: (?=.*query)(?=.*response)(?=.*note)", said)
    monkeypatch.chdir(run.directory)
    config = load_run("asked.yaml")
    assert config.collator.dataset_columns.mapping["question_column"] == "query"
    assert "sbatch --nodes=2" in (run.directory / "asked.yaml").read_text()


def test_columns_are_found_by_their_names() -> None:
    assert guess(["Image", "query", "response", "id"]) == {"image": "Image", "question": "query", "answer": "response"}
    assert guess(["conversations", "image", "answer"]) == {"messages": "conversations", "image": "image"}


def test_what_cannot_be_is_refused(run: TinyRun, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(run.directory)
    with pytest.raises(ConfigError, match="has no column nothing; it has: "):
        complete(Answers("model", "odd names.jsonl", columns={"answer": "nothing"}), asks=False)
    (tmp_path / "strange.jsonl").write_text(json.dumps({"a": "x", "b": "y"}) + "\n")
    with pytest.raises(ConfigError, match="--question-column, --answer-column"):
        complete(Answers("model", str(tmp_path / "strange.jsonl")), asks=False)
    with pytest.raises(ConfigError, match="--gpus 12: expected 0 to 8, or a multiple of 8"):
        complete(Answers("model", "odd names.jsonl", num_gpus=12), asks=False)
    sound = complete(Answers("model", "odd names.jsonl", num_gpus=8), asks=False)
    with pytest.raises(ConfigError, match="cannot be written"):
        write_run_file(run.config / "below a file.yaml", sound)
    finished = run.command(["vlm-dist", "init", "none.yaml"])
    assert finished.exit_code == 2 and "name a --model and --data" in finished.stderr
