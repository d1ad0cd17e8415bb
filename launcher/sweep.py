"""A list of runs in a text file, of which each task of a job array takes its own.

One run a line, as one would type it after `vlm-dist train`: a run file, overrides, or both:

    configs/run.yaml train.learning_rate=1e-4
    train.learning_rate=3e-4 peft.r=32          # the job's own run file
    configs/other.yaml train.output_dir=runs/other
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from vlm_dist.errors import ConfigError

_OUTPUT_DIR = "train.output_dir="


@dataclass(frozen=True)
class SweepRun:
    """One line of the list.

    Attributes:
        run_file: None: the job's own.
        overrides: `section.key=value`.
        output_dir: of this run alone.
    """

    run_file: str | None
    overrides: tuple[str, ...]
    output_dir: str

    @property
    def arguments(self) -> list[str]:
        """What the trainer is given after its run file."""
        return [
            word for override in (*self.overrides, f"{_OUTPUT_DIR}{self.output_dir}") for word in ("--set", override)
        ]


def read_sweep(path: Path) -> list[SweepRun]:
    """Read a list. A run without an output_dir of its own gets `runs/<name of the list>/<number of the run>`.

    Args:
        path: of the list; empty lines and what follows a # are no runs.

    Raises:
        ConfigError: it cannot be read, a line is none of that, or two runs have one output_dir.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"SWEEP={path}: cannot be read: {error}") from None
    runs: list[SweepRun] = []
    first_line: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            words = shlex.split(line, comments=True)
        except ValueError as error:
            raise ConfigError(f"{path}, line {number}: {error}; quotes are read as a shell reads them") from None
        if not words:
            continue
        run = _read_line(words, f"{path}, line {number}", f"runs/{path.stem}/{len(runs) + 1}")
        place = str(Path(run.output_dir))
        if place in first_line:
            raise ConfigError(
                f"{path}, line {number}: train.output_dir={place} is that of line {first_line[place]}, too; each run "
                "needs one of its own (without any: runs/<list>/<number>)"
            )
        first_line[place] = number
        runs.append(run)
    return runs


def choose_run(path: Path, task: int) -> SweepRun:
    """The run of a task of an array.

    Args:
        path: of the list.
        task: its number, the first run being 1.

    Raises:
        ConfigError: as `read_sweep`; or the list is too short.
    """
    runs = read_sweep(path)
    if not 1 <= task <= len(runs):
        raise ConfigError(
            f"{path} has {len(runs)} runs, and this is task {task} of the array; submit with --array=1-{len(runs)}"
        )
    return runs[task - 1]


def _read_line(words: list[str], where: str, output_dir: str) -> SweepRun:
    run_file = words.pop(0) if "=" not in words[0] and not words[0].startswith("-") else None
    overrides = []
    for word in words:
        if word == "--set":  # as on a command line
            continue
        name, equals, value = word.removeprefix("--set=").partition("=")
        if not equals or name.startswith("-"):
            raise ConfigError(f"{where}: {word!r} is no override; expected a form like train.learning_rate=1e-4")
        if f"{name}=" == _OUTPUT_DIR:
            output_dir = value
        else:
            overrides.append(f"{name}={value}")
    return SweepRun(run_file, tuple(overrides), output_dir)
