"""`--help` of `vlm-dist` and of every command below it: it teaches, and it comes at once."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from vlm_dist.cli.help import EXAMPLES, GROUPS
from vlm_dist.cli.main import _parser

SECONDS = 0.5
ROOT = Path(__file__).parents[3]


def below(parser: argparse.ArgumentParser, above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, child in action.choices.items():
                yield (*above, name)
                yield from below(child, (*above, name))


COMMANDS = [(), *below(_parser())]


def asked(arguments: list[str]) -> tuple[int, str, float]:
    """Exit code, what was printed, and the seconds of CPU time of the process itself."""
    read, write = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-m", "vlm_dist.cli", *arguments], stdout=write, stderr=subprocess.STDOUT, cwd=ROOT
    )
    os.close(write)
    with os.fdopen(read) as pipe:
        said = pipe.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, said, usage.ru_utime + usage.ru_stime


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(command) or "vlm-dist")
def test_help_comes_at_once_and_has_an_example(command: tuple[str, ...]) -> None:
    took = []
    for _ in range(3):
        code, said, seconds = asked([*command, "--help"])
        assert code == 0, said
        took.append(seconds)
        if seconds < SECONDS:
            break
    assert min(took) < SECONDS, took
    assert "Traceback" not in said and "Error" not in said
    assert f"vlm-dist {' '.join(command)} ".replace("  ", " ") in said
    assert sum(line.startswith("  vlm-dist ") for line in said.splitlines()) >= 1, said


def test_the_help_names_every_command_in_its_group_and_no_other() -> None:
    _, said, _ = asked(["--help"])
    commands = {command[0] for command in COMMANDS if command}
    assert "More:" not in said, "a command is in no group of vlm_dist/cli/help.py"
    positions = []
    for title, names in GROUPS.items():
        positions.append(said.index(f"{title}:"))
        for name in names:
            is_named = re.search(rf"^  {name} +\S", said, re.MULTILINE) is not None
            assert is_named == (name in commands), name
    assert positions == sorted(positions)
    for file in ("configs/README.md", "configs/README.ko.md"):
        assert file in said and (ROOT / file).is_file()
    assert all(len(line) <= 120 for line in said.splitlines())


def test_examples_parse() -> None:
    """What an example says is what the command takes; `--help` ends the parsing, which is fine too."""
    import shlex

    there = {" ".join(command) for command in COMMANDS}
    for path, example in EXAMPLES.items():
        if path in there and not example.endswith("--help"):
            _parser().parse_args(shlex.split(example)[1:])
