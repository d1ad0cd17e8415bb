"""Checkpoints as a user meets them: written while training goes on, kept as asked, on whatever disks there are."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.tiny_run import Finished, TinyRun, make_tiny_run
from vlm_dist.distributed.group import free_port

COMMON = (
    "train.max_steps=6",
    "train.logging_steps=1",
    "train.eval_steps=0",
    "train.save_steps=2",
    "train.report_to=none",
    "train.dataloader_num_workers=1",
    "train.learning_rate=0.5",  # learns nothing good: the first checkpoints are the better ones
)


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    return make_tiny_run(tmp_path_factory.mktemp("checkpoints"), num_images=40, num_clips=2)


def checkpoints(directory: Path) -> list[int]:
    return sorted(int(path.name.rpartition("-")[2]) for path in directory.glob("checkpoint-*"))


@pytest.fixture(scope="module")
def kept(tiny_run: TinyRun) -> Finished:
    """Two ranks, six steps."""
    return tiny_run.train(
        *COMMON,
        "train.output_dir=kept",
        "train.eval_steps=2",
        "train.save_total_limit=1",
        "train.save_keep_steps=4",
        "train.metric_for_best_model=eval_loss",
        "train.greater_is_better=false",
        processes=2,
    )


def test_a_save_is_told_when_it_begins_and_when_it_is_true(tiny_run: TinyRun, kept: Finished) -> None:
    assert kept.exit_code == 0, kept.output[-3000:]
    for step in (2, 4, 6):
        begun = kept.stdout.index(f"checkpoint-{step} is collected and being written")
        assert kept.stdout.index(f"checkpoint written: kept/checkpoint-{step}") > begun
    assert kept.stdout.index("done: 6 steps") > kept.stdout.index("checkpoint written: kept/checkpoint-6")
    stalls = tiny_run.metrics("kept", "save")
    assert [record["step"] for record in stalls] == [2, 4, 6]
    for record in stalls:
        assert 0 < record["save_stall_seconds"] < 10
        assert record["save_stall_seconds"] == pytest.approx(
            record["save_wait_seconds"] + record["save_collect_seconds"]
        )


def test_nothing_of_deepspeeds_is_there(tiny_run: TinyRun, kept: Finished) -> None:
    assert kept.exit_code == 0
    files = {path.name for path in (tiny_run.directory / "kept").rglob("*") if path.is_file()}
    assert not {name for name in files if name.endswith((".pt", ".bin", ".pkl", ".py")) or name == "latest"}
    directories = {path.name for path in (tiny_run.directory / "kept").iterdir() if path.is_dir()}
    assert {name for name in directories if name.startswith((".", "step", "global"))} == set()


def test_the_best_and_every_fourth_stay(tiny_run: TinyRun, kept: Finished) -> None:
    assert kept.exit_code == 0
    evaluations = tiny_run.metrics("kept", "eval")
    losses = {record["step"]: (record["images/loss"] + record["clips/loss"]) / 2 for record in evaluations}
    best = min(losses, key=lambda step: losses[step])
    assert checkpoints(tiny_run.directory / "kept") == sorted({best, 4, 6})
    marked = json.loads((tiny_run.directory / "kept" / "best_checkpoint.json").read_text())
    assert (marked["checkpoint"], marked["metric"]) == (f"checkpoint-{best}", "eval_loss")
    assert marked["value"] == pytest.approx(losses[best])


def test_a_run_told_to_go_on_from_an_earlier_one_never_returns_to_what_it_left(
    tiny_run: TinyRun, kept: Finished
) -> None:
    """It may end before its first save, and is then started again with resume=auto."""
    assert kept.exit_code == 0
    left = tiny_run.directory / "left"
    shutil.copytree(tiny_run.directory / "kept", left)
    records = [json.loads(line) for line in (left / "metrics.jsonl").read_text().splitlines()]
    unfinished = [record for record in records if (record["kind"], record["step"]) != ("eval", 4)]
    (left / "metrics.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in unfinished))
    (left / "best_checkpoint.json").unlink()
    common = (*COMMON, "train.resume=left/checkpoint-4", "train.stop_at_step=4", "train.eval_steps=2")
    best = ("train.metric_for_best_model=eval_loss", "train.save_total_limit=1", "train.save_keep_steps=4")
    ended = tiny_run.train(*common, *best, "train.output_dir=left")
    assert ended.exit_code == 0, ended.output[-3000:]
    assert max(checkpoints(left)) == 4  # else resume=auto would take the 6 that was left
    assert (left / "superseded-1-checkpoint-6").is_dir()
    # killed between the save and its evaluation, which is made up for: it may be the best
    wanted = next(record for record in tiny_run.metrics("kept", "eval") if record["step"] == 4)
    found = [record for record in tiny_run.metrics("left", "eval") if record["step"] == 4]
    assert [record["images/loss"] for record in found] == pytest.approx([wanted["images/loss"]])
    assert json.loads((left / "best_checkpoint.json").read_text())["step"] == 4

    elsewhere = tiny_run.train(*common, "train.output_dir=elsewhere")
    assert elsewhere.exit_code == 0, elsewhere.output[-3000:]
    assert checkpoints(tiny_run.directory / "elsewhere") == [4]  # else resume=auto would begin at 0


def test_a_checkpoint_that_cannot_be_written_ends_the_run_on_all_ranks(tiny_run: TinyRun) -> None:
    output = tiny_run.directory / "stuck"
    output.mkdir()
    (output / ".checkpoint-4.writing").touch()  # in the way of the directory of that name, also for root
    ended = tiny_run.train(*COMMON, "train.output_dir=stuck", "train.max_steps=10", processes=2)
    assert ended.exit_code == 5, ended.output[-3000:]
    assert "checkpoint-4 could not be written" in ended.output
    assert "checkpoint written: stuck/checkpoint-4" not in ended.output
    assert "done:" not in ended.stdout
    assert checkpoints(output) == [2]


def test_each_rank_writes_its_own_share_of_a_full_fine_tuning(tiny_run: TinyRun) -> None:
    full = [f"peft.towers.{tower}=full" for tower in ("vision", "projector", "language")]
    common = (*COMMON, *full, "train.learning_rate=0.001")
    together = tiny_run.train(*common, "train.output_dir=together", processes=2)
    assert together.exit_code == 0, together.output[-3000:]

    sliced = (*common, "train.output_dir=sliced", "train.save_in_slices=true")
    stopped = tiny_run.train(
        *sliced, "deepspeed=ds_configs/tiny3.json", "train.stop_at_step=3", "train.save_steps=1", processes=2
    )
    assert stopped.exit_code == 0, stopped.output[-3000:]
    assert "every rank writes its own share of a checkpoint" in stopped.output
    names = {path.name for path in (tiny_run.directory / "sliced" / "checkpoint-3").glob("*.safetensors")}
    shares = {f"training_state-0000{rank}-of-00002.safetensors" for rank in (1, 2)}
    assert names == {"trained_weights.safetensors", *shares}

    resumed = tiny_run.train(*sliced, "train.resume=auto", "train.save_in_slices=auto")  # one process, another stage
    assert resumed.exit_code == 0, resumed.output[-3000:]
    assert "resumed from sliced/checkpoint-3" in resumed.output
    assert tiny_run.losses("sliced") == pytest.approx(tiny_run.losses("together"), rel=1e-4)
    assert (tiny_run.directory / "sliced" / "checkpoint-6" / "training_state.safetensors").is_file()


class TwoNodes:
    """Two ranks, each with a working directory of its own, and so with its own output directory."""

    def __init__(self, run: TinyRun, other: Path) -> None:
        self._run = run
        self.directories = (run.directory, other)
        other.mkdir()
        for name in ("data", "model", "configs", "ds_configs"):
            (other / name).symlink_to(run.directory / name)

    def train(self, *overrides: str) -> list[Finished]:
        port = str(free_port())
        processes = []
        for rank, directory in enumerate(self.directories):
            environment = self._run.environment() | {
                "RANK": str(rank),
                "WORLD_SIZE": "2",
                "LOCAL_RANK": "0",
                "LOCAL_WORLD_SIZE": "1",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            }
            command = self._run.train_command(*COMMON, "train.output_dir=own-disk", *overrides)
            processes.append(
                subprocess.Popen(
                    command,
                    cwd=directory,
                    env=environment,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        try:
            outputs = [process.communicate(timeout=240) for process in processes]
        finally:
            for process in processes:
                process.kill()
        return [Finished(p.returncode, *output) for p, output in zip(processes, outputs, strict=True)]


def test_every_node_has_a_copy_and_any_one_continues_the_run(tiny_run: TinyRun, kept: Finished, tmp_path: Path) -> None:
    nodes = TwoNodes(tiny_run, tmp_path / "other")
    first, second = (directory / "own-disk" for directory in nodes.directories)
    second.mkdir()
    (second / ".checkpoint-2.writing").touch()
    ended = nodes.train("train.stop_at_step=4")
    assert [end.exit_code for end in ended] == [0, 0], ended[0].output[-3000:] + ended[1].output[-2000:]
    assert "own-disk is not shared by all nodes" in ended[0].stdout
    # one node's failure is told, and costs that node's copy alone
    assert re.search(r"warning: rank 1 \(\S+\): \S*checkpoint-2 could not be written", ended[0].stdout)
    assert (checkpoints(first), checkpoints(second)) == ([2, 4], [4])
    for name in ("training_state.safetensors", "training_state.json", "adapter_model.safetensors"):
        assert (first / "checkpoint-4" / name).read_bytes() == (second / "checkpoint-4" / name).read_bytes()

    shutil.rmtree(first)
    resumed = nodes.train("train.resume=auto")
    assert [end.exit_code for end in resumed] == [0, 0], resumed[0].output[-3000:] + resumed[1].output[-2000:]
    assert "resumed from own-disk/checkpoint-4 at step 4 of 6" in resumed[0].stdout
    assert kept.exit_code == 0  # the same six steps, undisturbed
    weights = "checkpoint-6/training_state.safetensors"
    wanted = (tiny_run.directory / "kept" / weights).read_bytes()
    assert (first / weights).read_bytes() == (second / weights).read_bytes() == wanted
