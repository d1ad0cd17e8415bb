"""Faults through the real command line: each ends in time, with a message, an exit code, and nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.tiny_run import TinyRun, make_tiny_run
from vlm_dist.distributed.group import free_port

pytestmark = pytest.mark.e2e

PRELOAD = Path(__file__).parent / "preload_faults"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    return make_tiny_run(tmp_path_factory.mktemp("faults"))


class Command:
    """A command under way; its output goes to a file."""

    def __init__(
        self, run: TinyRun, name: str, launcher: list[str], overrides: tuple[str, ...], fault: str = ""
    ) -> None:
        self.log = run.directory / f"{name}.log"
        self.output_dir = run.directory / name
        command = [*launcher, "-m", "vlm_dist.train", "--config", str(run.config)]
        for override in ("train.max_steps=500", *overrides, f"train.output_dir={name}"):
            command += ["--set", override]
        environment = run.environment() | {"FAULT": fault, "FAULT_RUN": name}
        environment["PYTHONPATH"] = f"{PRELOAD}:{environment['PYTHONPATH']}"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command, cwd=run.directory, env=environment, stdout=log, stderr=log, start_new_session=True
            )

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def wait_for(self, text: str, seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while text not in self.output:
            assert self.process.poll() is None, self.output
            assert time.monotonic() < deadline, self.output
            time.sleep(0.1)

    def ranks(self) -> dict[int, int]:
        """Rank -> process id, of trainers that the `deepspeed` command has started."""
        found: dict[int, int] = {}
        for process in self.family():
            try:
                words = process.cmdline()
                if any(word.startswith("--local_rank=") for word in words) and "vlm_dist.train" in words:
                    found[int(process.environ().get("RANK", "0"))] = process.pid
            except psutil.Error:
                continue
        return found

    def family(self) -> list[psutil.Process]:
        """All living processes of this run, orphans too."""
        wanted = f"FAULT_RUN={self.output_dir.name}\0".encode()
        found = []
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and wanted in (entry / "environ").read_bytes():
                    found.append(psutil.Process(int(entry.name)))
            except (OSError, psutil.Error):
                continue
        return found

    def end(self, seconds: float = 60) -> int:
        """Its exit code; all its processes are gone soon after."""
        code = self.process.wait(seconds)
        deadline = time.monotonic() + 15
        while self.family() and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not self.family(), [process.cmdline() for process in self.family()]
        return code

    def close(self) -> None:
        for process in self.family():
            process.kill()
        self.process.wait(10)


@pytest.fixture
def start(run: TinyRun) -> Iterator[Callable[..., Command]]:
    started: list[Command] = []

    def begin(name: str, launcher: list[str], *overrides: str, fault: str = "") -> Command:
        started.append(Command(run, name, launcher, overrides, fault))
        return started[-1]

    yield begin
    for command in started:
        command.close()


ALONE = [sys.executable]


def deepspeed() -> list[str]:
    command = str(Path(sys.executable).parent / "deepspeed")
    return [command, "--num_gpus", "2", "--master_port", str(free_port())]


def elastic(*options: str) -> list[str]:
    return [sys.executable, "-m", "launcher.elastic", "--nproc_per_node", "2", *options]


def test_ctrl_c_saves_and_stops_and_twice_stops_at_once(start: Callable[..., Command]) -> None:
    workers = "train.dataloader_num_workers=1"
    once = start("once", ALONE, workers)
    once.wait_for("step 3/")
    os.killpg(once.process.pid, signal.SIGINT)  # as a terminal does: to the workers, too
    assert once.end() == 75
    assert "Ctrl-C: saving a checkpoint, then stopping" in once.output
    assert "stopped by a signal at step" in once.output
    assert list(once.output_dir.glob("checkpoint-*/COMPLETE"))

    twice = start("once", ALONE, workers, "train.resume=auto", fault="hang:0:forward:12")
    twice.wait_for("hangs now")  # in native code, where no handler of Python's runs
    os.killpg(twice.process.pid, signal.SIGINT)
    twice.wait_for("once more stops at once")
    began = time.monotonic()
    os.killpg(twice.process.pid, signal.SIGINT)
    assert twice.end() == 130
    assert time.monotonic() - began < 15
    assert "stopped at once" in twice.output


@pytest.mark.parametrize("phase", ["import", "groups", "loading", "evaluation", "saving", "data"])
def test_usr1_in_each_phase(phase: str, start: Callable[..., Command]) -> None:
    fault = {"evaluation": "usr1:0:evaluation:2", "saving": "usr1:0:saving:2", "data": "usr1:0:data wait:2"}.get(
        phase, f"usr1:0:{phase}:-1"
    )
    command = start(
        phase,
        ALONE,
        "train.save_steps=2",
        "train.eval_steps=2",
        "train.predict_with_generate=true",
        f"train.dataloader_num_workers={int(phase == 'data')}",
        fault=fault,
    )
    assert command.end(120) == 75, command.output
    saved = sorted(command.output_dir.glob("checkpoint-*/COMPLETE"))
    if phase in ("import", "groups", "loading"):
        assert "stopped by a signal at start-up" in command.output
        assert not saved
        return
    assert "stopped by a signal at step" in command.output
    assert saved
    if phase != "saving":  # else the evaluation behind the save may have begun
        assert ("the evaluation at step 2 is given up" in command.output) is (phase == "evaluation")


def test_a_rank_that_hangs_and_one_that_is_killed_under_deepspeed(start: Callable[..., Command]) -> None:
    hung = start("hung", deepspeed(), "train.hang_timeout_minutes=0.1", "train.save_steps=2", fault="hang:1:forward:4")
    assert hung.end(150) == 70, hung.output
    assert "error: hang: nothing has moved for 0.1 min. Rank 1 lags: step 4, forward, samples " in hung.output
    assert "hang_here" in (hung.output_dir / "stacks" / "rank-1.txt").read_text()
    assert (hung.output_dir / "stacks" / "rank-0.txt").is_file()

    killed = start("hung", deepspeed(), "train.resume=auto")
    killed.wait_for("step 6/")
    os.kill(killed.ranks()[1], signal.SIGKILL)
    assert killed.end() != 0
    assert "another rank is gone: rank 1, last heard of" in killed.output


def test_a_crash_names_rank_step_and_samples(start: Callable[..., Command]) -> None:
    command = start("crash", deepspeed(), fault="crash:1:forward:3")
    assert command.end(120) == 1, command.output
    assert "error: rank 1 failed at step 3, forward, samples " in command.output
    assert command.output.index("error: rank 1 failed") < command.output.index("Traceback")
    assert "ZeroDivisionError: boom" in command.output


def test_a_killed_rank_is_restarted_and_the_run_completes(start: Callable[..., Command]) -> None:
    command = start(
        "elastic", elastic("--max_restarts", "2"), "train.save_steps=2", "train.max_steps=8", fault="kill:1:forward:5"
    )
    assert command.end(240) == 0, command.output
    assert "restart 1 of 2" in command.output
    assert "rank 1 was killed by SIGKILL" in command.output
    assert "resumed from" in command.output
    assert "done: 8 steps" in command.output


def test_what_cannot_succeed_is_not_restarted_and_signals_pass_through(start: Callable[..., Command]) -> None:
    wrong = start("wrong", elastic(), "train.learning_rate=-1")
    assert wrong.end(60) == 2
    assert "restart 1" not in wrong.output

    asked = start("asked", elastic())
    asked.wait_for("step 3/")
    asked.process.send_signal(signal.SIGUSR1)
    assert asked.end() == 75, asked.output
    assert "SIGUSR1" in asked.output
    assert list(asked.output_dir.glob("checkpoint-*/COMPLETE"))


def test_no_rank_survives_its_agent_or_launcher(start: Callable[..., Command]) -> None:
    command = start("orphans", elastic("--max_restarts", "0"))
    command.wait_for("step 3/")
    command.process.kill()
    assert command.end(30) == -9  # and checks that nobody is left


def test_a_failure_that_comes_back_at_the_same_step_ends_the_restarts(start: Callable[..., Command]) -> None:
    command = start("again", elastic("--max_restarts", "5"), "train.save_steps=2", fault="crash-always:1:forward:3")
    assert command.end(240) == 1, command.output
    assert "failed at step 3 twice" in command.output
    assert command.output.count("restart 1 of 5") == 1
    assert "restart 2 of 5" not in command.output
