"""Keys that decide what happens when something goes wrong between ranks."""

from __future__ import annotations

import functools
import time
from pathlib import Path

import pytest

from tests.ranks import Ranks, run_ranks
from tests.unit.test_key_effects.conftest import Project
from tests.unit.test_key_effects.registry import shows
from vlm_dist.build import ending
from vlm_dist.build import run as build_run
from vlm_dist.config.train import TrainConfig
from vlm_dist.distributed import watchdog
from vlm_dist.distributed.signals import StopRequest
from vlm_dist.errors import ExitCode


def stand_still(ranks: Ranks, directory: Path, minutes: float) -> list[int]:
    codes: list[int] = []
    watchdog.FIRST_USE_SECONDS = 0.0
    ending.Watchdog = functools.partial(watchdog.Watchdog, end=codes.append)  # type: ignore[assignment, misc]
    with ending.told_clearly(TrainConfig(output_dir=directory, hang_timeout_minutes=minutes), ranks):
        ranks.progress.at("forward", 3)
        time.sleep(4)
    return codes


@shows("train.hang_timeout_minutes")
def test_a_phase_may_take_so_many_minutes(tmp_path: Path) -> None:
    assert run_ranks(stand_still, 1, tmp_path, 0.02) == [[int(ExitCode.HANG)]]
    assert (tmp_path / "stacks" / "rank-0.txt").is_file()
    assert run_ranks(stand_still, 1, tmp_path, 1) == [[]]
    assert ending.collective_timeout(TrainConfig(hang_timeout_minutes=60)).total_seconds() > 3600  # it speaks first


class Told(Exception):  # noqa: N818
    """What comes next has been reached."""


@shows("train.debug_collectives")
@pytest.mark.parametrize("is_on", [False, True])
def test_collectives_are_compared_before_the_groups_are_made(
    is_on: bool, project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []

    def groups(*args: object) -> None:
        done.append("groups")
        raise Told

    monkeypatch.setattr(build_run, "compare_collectives", lambda: done.append("compare"))
    monkeypatch.setattr(build_run, "init_process_groups", groups)
    with pytest.raises(Told):
        build_run.train(project.config({"train.debug_collectives": is_on}), StopRequest())
    assert done == (["compare", "groups"] if is_on else ["groups"])
