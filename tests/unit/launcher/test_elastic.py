"""What the elastic launcher decides from what the ranks have written down; the rest is in tests/e2e/test_faults.py."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launcher.elastic import Outcome, main, read_outcome, split_arguments
from vlm_dist.distributed.progress import StepFile


@pytest.mark.parametrize(
    ("arguments", "options", "command"),
    [
        ("--nproc_per_node 2 -m vlm_dist.train --config a.yaml", 2, ["-m", "vlm_dist.train", "--config", "a.yaml"]),
        ("--max_restarts=3 --module vlm_dist.train -m x", 1, ["-m", "vlm_dist.train", "-m", "x"]),
        ("--nproc_per_node 2", 2, []),
    ],
)
def test_what_is_the_launchers_and_what_the_ranks(arguments: str, options: int, command: list[str]) -> None:
    words = arguments.split()
    assert split_arguments(words) == (words[:options], command)


@pytest.mark.parametrize(
    "wrong", ["--max_restarts -1", "--nproc_per_node 0", "--nproc_per_node=two", "--nproc-per-node x"]
)
def test_numbers_that_make_no_sense(wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*wrong.split(), "-m", "vlm_dist.train"])
    assert ended.value.code == 2
    assert "error: " + wrong.replace("=", " ").replace("-per-", "_per_").split()[0] in capsys.readouterr().err


def write(directory: Path, **codes: tuple[int, float]) -> None:
    for rank, (code, at) in codes.items():
        (directory / f"rank-0000{rank[1:]}.json").write_text(json.dumps({"code": code, "at": at}))
        StepFile(str(directory / f"step-{rank[1:]}")).write(7)


@pytest.mark.parametrize(
    ("codes", "agent_code", "code", "rank", "is_final"),
    [
        ({"r0": (0, 2.0), "r1": (0, 1.0)}, 0, 0, 0, True),
        ({"r0": (6, 2.0), "r1": (-9, 1.0)}, 1, -9, 1, False),  # the other only followed
        ({"r0": (6, 1.0), "r1": (2, 2.0)}, 1, 2, 1, True),  # a wrong config wins, whoever was first
        ({"r0": (75, 1.0), "r1": (75, 2.0)}, 0, 75, 0, True),
        ({"r0": (75, 16.0), "r1": (-9, 1.0)}, 1, -9, 1, False),  # the other was ended by the agent, at start-up
        ({"r0": (70, 1.0), "r1": (70, 2.0)}, 1, 70, 0, False),
        ({}, -9, -9, None, False),  # the agent was killed
    ],
)
def test_which_end_counts(
    codes: dict[str, tuple[int, float]], agent_code: int, code: int, rank: int | None, is_final: bool, tmp_path: Path
) -> None:
    write(tmp_path, **codes)
    outcome = read_outcome(tmp_path, agent_code)
    assert outcome == Outcome(code, rank, 7 if codes else -1)
    assert outcome.is_final is is_final


def test_the_end_is_told_in_words() -> None:
    assert str(Outcome(-9, 1, 7)) == "rank 1 was killed by SIGKILL at step 7"
    assert str(Outcome(70, 0, -1)) == "rank 0 ended with exit code 70 (it hung) at start-up"
    assert Outcome(-9, 1, 7).exit_code == 137


def test_a_child_ends_with_its_parent() -> None:
    child = "import launcher.lifeline as l, time; l.end_with_parent(); print('up', flush=True); time.sleep(60)"
    parent = (
        "import subprocess, sys, time; "
        f"p = subprocess.Popen([sys.executable, '-c', {child!r}]); "
        "print(p.pid, flush=True); time.sleep(60)"
    )
    started = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True)
    assert started.stdout is not None
    words = sorted([started.stdout.readline().strip(), started.stdout.readline().strip()])
    os.kill(started.pid, signal.SIGKILL)
    started.wait()
    deadline = time.monotonic() + 5
    while Path(f"/proc/{words[0]}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{words[0]}").exists() or "Z" in Path(f"/proc/{words[0]}/stat").read_text().split()
