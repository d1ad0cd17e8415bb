"""A process that is killed at any moment of a save costs at most the checkpoint that it was writing."""

from __future__ import annotations

import os
import pathlib
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.unit.checkpoint.test_store import flip_a_bit, save
from vlm_dist.checkpoint import CheckpointStore, Retention
from vlm_dist.checkpoint import files as checkpoint_files

RETENTION = Retention(total_limit=1, metric="eval_loss")


class Killer:
    """Ends this process by SIGKILL in the k-th operation on the disk: before it, or in the midst of a write."""

    def __init__(self, moment: int) -> None:
        self._left = moment

    def _is_now(self) -> bool:
        self._left -= 1
        return self._left < 0

    def before(self, real: Any) -> Any:
        def operation(*args: Any, **kwargs: Any) -> Any:
            if self._is_now():
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return operation

    def within(self, real: Any) -> Any:
        def write(hashed: Any, content: Any) -> Any:
            if self._is_now():
                real(hashed, content[: len(content) // 2])
                hashed._file.flush()
                os.kill(os.getpid(), signal.SIGKILL)
            return real(hashed, content)

        return write

    def install(self) -> None:
        """In a process that has no other use."""
        checkpoint_files._Hashed.write = self.within(checkpoint_files._Hashed.write)  # type: ignore[method-assign]
        os.fsync = self.before(os.fsync)
        shutil.rmtree = self.before(shutil.rmtree)  # type: ignore[assignment]
        for name in ("mkdir", "rename", "replace"):
            setattr(pathlib.Path, name, self.before(getattr(pathlib.Path, name)))


def is_killed(moment: int, work: Callable[[], Any]) -> bool:
    """Do the work in a child that is killed at a moment; False if it came through before."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            Killer(moment).install()
            work()
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0
    return False


def save_and_judge(directory: Path, step: int) -> None:
    """What the writer's thread does."""
    store = CheckpointStore(directory, RETENTION)
    save(store, step)
    store.mark(step, {"images/loss": 1 / step})


def resumed_step(directory: Path) -> int:
    """Where `resume: auto` goes on."""
    store = CheckpointStore(directory, RETENTION)
    store.recover()
    checkpoint = store.latest()
    assert checkpoint is not None
    checkpoint.read_trainable()
    return checkpoint.step


@pytest.mark.parametrize("is_damaged", [False, True])
def test_sigkill_at_every_moment_of_a_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_damaged: bool) -> None:
    """The save replaces a damaged checkpoint of the same step, or there is none."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # what a process wrote outlives it; a power cut is not this
    reached = []
    for moment in range(200):
        directory = tmp_path / str(moment)
        save_and_judge(directory, 5)
        if is_damaged:
            flip_a_bit(save(CheckpointStore(directory), 10) / "adapter_model.safetensors")
        was_killed = is_killed(moment, lambda directory=directory: save_and_judge(directory, 10))  # type: ignore[misc]
        reached.append(resumed_step(directory))
        visible = {path.name for path in directory.iterdir() if path.name.startswith(".")}
        assert not {name for name in visible if "checkpoint-" in name and not name.endswith(".json.writing")}
        save_and_judge(directory, 15)  # the next run is not in its way
        assert resumed_step(directory) == 15
        kept = sorted(path.name for path in directory.glob("checkpoint-*"))
        assert kept[0] == "checkpoint-15"
        if not was_killed:
            break
    else:
        pytest.fail("never came through")
    assert set(reached) == {5, 10}
    assert reached == sorted(reached)  # once it is published, it stays
    assert moment > 25
