"""`vlm-dist shards tokens`: counts what training will see, keeps it, and goes on where it was stopped."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.tiny_run import TinyRun, make_tiny_run
from vlm_dist import build, cli
from vlm_dist.config import load_run
from vlm_dist.data.lengths.token_store import ExactLengths
from vlm_dist.data.types import MicroBatchJob, SampleRef

NUM_IMAGES, NUM_CLIPS = 40, 3


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    return make_tiny_run(tmp_path_factory.mktemp("tokens"), num_images=NUM_IMAGES, num_clips=NUM_CLIPS)


@pytest.fixture
def run(made: TinyRun, monkeypatch: pytest.MonkeyPatch) -> TinyRun:
    monkeypatch.chdir(made.directory)
    shutil.rmtree(made.directory / "index", ignore_errors=True)
    return made


def count(*options: str) -> int:
    return cli.main(["shards", "tokens", "configs/tiny.yaml", "--workers", "0", *options])


def files(run: TinyRun) -> dict[str, float]:
    """Files of counts, and when they were written."""
    return {path.name: path.stat().st_mtime_ns for path in (run.directory / "index" / "tokens").rglob("*.arrow")}


def test_what_is_counted_is_what_training_sees(run: TinyRun, capsys: pytest.CaptureFixture[str]) -> None:
    assert count() == 0
    told = capsys.readouterr()
    assert f"counted {NUM_IMAGES + NUM_CLIPS} of {NUM_IMAGES + NUM_CLIPS} samples" in told.err
    assert f"images: {NUM_IMAGES} samples, " in told.out
    assert "median" in told.out
    assert "an epoch has 43 samples: 11 steps on one rank, at 4 per step and rank" in told.out
    config = load_run(Path("configs/tiny.yaml"))
    sources = build.open_sources_alone(config, "train")
    processor, family = build.make_processor(config)
    materialise = build.make_materialisers(config, sources, [], processor, family)
    lengths = build.make_lengths(config, sources, processor, family, materialise)
    assert isinstance(lengths, ExactLengths)
    for number, source in enumerate(sources):
        costs = lengths.costs(number, np.arange(len(source)))
        for row in range(len(source)):
            batch = materialise(MicroBatchJob(0, 0, (SampleRef(number, row),)))
            assert costs.tokens[row] == batch.num_tokens
            kind = "image" if source.name == "images" else "video"
            grid = batch.inputs[f"{kind}_grid_thw"]
            assert costs.patches[row] == int(grid.prod(dim=1).sum())


def test_what_is_counted_is_not_counted_again(run: TinyRun) -> None:
    count()
    before = files(run)
    assert len(before) == 3 + 1  # shards of at most 16 samples
    count()
    assert files(run) == before
    # another set-up has counts of its own
    count("--set", "collator.text_processing.max_length=30")
    assert len(list((run.directory / "index" / "tokens").iterdir())) == 2 + 2


def test_samples_that_do_not_fit_are_told(run: TinyRun, capsys: pytest.CaptureFixture[str]) -> None:
    count("--set", "collator.text_processing.max_length=36", "--set", "collator.text_processing.truncation=false")
    told = capsys.readouterr().out
    assert "too long for max_length 36, and left out" in told
    count("--set", "collator.text_processing.max_length=36")
    assert "with text cut at max_length 36" in capsys.readouterr().out


def test_a_killed_count_goes_on(run: TinyRun) -> None:
    command = [sys.executable, "-m", "vlm_dist.cli", "shards", "tokens", "configs/tiny.yaml", "--workers", "0"]
    process = subprocess.Popen(command, cwd=run.directory, env=run.environment(), stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("counted"):
            process.kill()
            break
    process.wait(timeout=30)
    process.stderr.close()
    before = files(run)
    assert before
    count()
    after = files(run)
    assert len(after) == 4
    assert all(after[name] == written for name, written in before.items())


def test_a_shard_that_is_added_is_counted_alone(run: TinyRun) -> None:
    count()
    before = files(run)
    added = run.directory / "data" / "images" / "images-000009.tar"
    shutil.copy(next((run.directory / "data" / "images-heldout").glob("*.tar")), added)
    try:
        count()
        after = files(run)
        assert len(after) == len(before) + 1
        assert before.items() < after.items()
    finally:
        for path in added.parent.glob(f"{added.name}*"):
            path.unlink()


def test_counts_are_demanded_with_the_command_that_makes_them(run: TinyRun, capsys: pytest.CaptureFixture[str]) -> None:
    plan = ["plan", "configs/tiny.yaml", "--step", "0", "--set", "data.lengths=exact"]
    assert cli.main(plan) != 0
    told = capsys.readouterr().err
    assert "data.lengths is exact" in told
    assert "vlm-dist shards tokens RUN.yaml" in told
    count()
    assert cli.main(plan) == 0


def test_a_wrong_number_of_workers_is_refused(run: TinyRun, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["shards", "tokens", "configs/tiny.yaml", "--workers", "-1"]) != 0
    assert "expected 0 (count in this process) or more" in capsys.readouterr().err
