"""slurm/train.sbatch for one run: its `#SBATCH` lines, run file, overrides and variables filled in."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from vlm_dist.errors import ConfigError

#: Of a checkout; a wheel has no slurm/ folder.
_SHIPPED = Path(__file__).resolve().parent.parent / "slurm" / "train.sbatch"
#: What the shipped script has where the user's own belongs. Without an answer the cluster's default is better.
PLACEHOLDERS = {"account": "my-account", "partition": "gpu"}

_OPTION = re.compile(r"#SBATCH\s+--(?P<name>[a-z-]+)(?:=(?P<value>\S+))?(?P<rest>.*)")
_RUN_FILE = re.compile(r"^RUN_FILE=\S*(.*)$", re.MULTILINE)


def read_template(path: Path | None = None) -> str:
    """The script to fill in: the one that was named, else that of the working directory, else the shipped one.

    Raises:
        ConfigError: there is none.
    """
    candidates = [path] if path is not None else [Path("slurm/train.sbatch"), _SHIPPED]
    for candidate in candidates:
        if candidate.is_file():
            return candidate.read_text(encoding="utf-8")
    raise ConfigError(
        f"there is no {candidates[0]}; copy slurm/train.sbatch of the project's sources there, or name one: --template"
    )


def fill_run(template: str, run_file: Path, overrides: Sequence[str], origin: str) -> str:
    """The script with a run file and `--set` overrides in it.

    Args:
        template: of `read_template`.
        run_file: relative to the directory that sbatch is called in, or absolute.
        overrides: `section.key=value`; further ones may still be given to the script.
        origin: the command that made it, for its second line.

    Raises:
        ConfigError: the template has no line that says RUN_FILE=.
    """
    lines = [f"RUN_FILE={shlex.quote(str(run_file))}"]
    if overrides:
        flags = shlex.join([part for override in overrides for part in ("--set", override)])
        lines.append(f'set -- {flags} "$@"')
    text, count = _RUN_FILE.subn(lambda match: "\n".join(lines), template, count=1)
    if count == 0:
        raise ConfigError("the template has no line RUN_FILE=…, so that the run file cannot be put in; see --template")
    first, newline, rest = text.partition("\n")
    return f"{first}{newline}# Made by: {origin}\n{rest}"


def fill_variables(script: str, variables: Mapping[str, str]) -> str:
    """The script with lines such as `MODULES=${MODULES:-}` set.

    Args:
        script: a template, or one that has its run already.
        variables: name -> value.

    Raises:
        ConfigError: it has no such line.
    """
    for name, value in variables.items():
        line = f"{name}={shlex.quote(value)}"
        script, count = re.subn(rf"(?m)^{name}=(?:\$\{{[^}}]*\}}|\S*)", lambda match, line=line: line, script, count=1)  # type: ignore[misc]
        if count == 0:
            raise ConfigError(f"the template has no line {name}=…, so that {value} cannot be put in; see --template")
    return script


def fill_options(script: str, options: Mapping[str, str | None]) -> str:
    """The script with its `#SBATCH` lines replaced.

    Args:
        script: a template, or one that has its run already.
        options: name -> value; "" for an option without one; None takes the line out. What is not there yet comes
            after the others.
    """
    left = dict(options)
    lines: list[str] = []
    last = 0
    for line in script.splitlines():
        match = _OPTION.match(line)
        if match is None:
            lines.append(line)
            continue
        name = match["name"]
        if name in options:
            value = left.pop(name, None)
            if value is None:
                continue
            line = _line(name, value)
        lines.append(line)
        last = len(lines)
    added = [_line(name, value) for name, value in left.items() if value is not None]
    return "\n".join([*lines[:last], *added, *lines[last:]]) + "\n"


def placeholders(script: str) -> list[str]:
    """Options whose value is still the shipped script's own."""
    found = {match["name"]: match["value"] for match in map(_OPTION.match, script.splitlines()) if match is not None}
    return [name for name, value in PLACEHOLDERS.items() if found.get(name) == value]


def _line(name: str, value: str) -> str:
    return f"#SBATCH --{name}={value}" if value else f"#SBATCH --{name}"
