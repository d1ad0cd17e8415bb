"""`--debug` through the real command line: what is shown, and what is left alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from tests.tiny_run import TinyRun, make_tiny_run

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    return make_tiny_run(tmp_path_factory.mktemp("debug"), num_images=12, num_clips=8)


def test_two_steps_beside_the_run(run: TinyRun) -> None:
    mine = run.directory / "run"
    mine.mkdir()
    (mine / "note.txt").write_text("mine")
    command = [*run.train_command("train.report_to=[wandb]", "train.predict_with_generate=true"), "--debug"]
    for _ in range(2):  # what an earlier one has left is its own
        finished = run.command(command)
        assert finished.exit_code == 0, finished.output
    directory = run.directory / "run-debug"
    assert "debug: everything goes to run-debug" in finished.stderr
    assert [*mine.iterdir()] == [mine / "note.txt"]
    assert [record["step"] for record in run.metrics("run-debug")] == [1, 2]
    assert len(run.metrics("run-debug", "eval")) == 1
    assert not (directory / "wandb").exists()
    text = (directory / "first_batch.txt").read_text()
    assert "input_ids" in text and "pixel_values" in text
    assert "\u27e6" in text and "Which digit" in text  # brackets round what carries loss
    pictures = sorted((directory / "first_batch").iterdir())
    assert pictures
    for path in pictures:
        with Image.open(path) as picture:
            assert picture.size[0] > 1


def test_several_ranks_and_foreign_directories_are_refused(run: TinyRun, tmp_path: Path) -> None:
    finished = run.command(
        ["env", "RANK=0", "WORLD_SIZE=2", "LOCAL_RANK=0", "LOCAL_WORLD_SIZE=2", "MASTER_ADDR=127.0.0.1",
         "MASTER_PORT=1", *run.train_command(), "--debug"]
    )  # fmt: skip
    assert finished.exit_code == 2 and "--debug is for one process, and there are 2" in finished.stderr
    other = run.directory / "other-debug"
    other.mkdir()
    (other / "precious.txt").write_text("mine")
    finished = run.command([*run.train_command("train.output_dir=other"), "--debug"])
    assert finished.exit_code == 2 and "which something else has made" in finished.stderr
    assert (other / "precious.txt").read_text() == "mine"
