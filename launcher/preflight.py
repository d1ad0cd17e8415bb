"""What can be found wrong with a run before any process of it is started, without torch."""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Iterator
from pathlib import Path

from vlm_dist.config import RunConfig, load_run
from vlm_dist.errors import ConfigError


def check_run(run: Path, overrides: tuple[str, ...], *, same_machine: bool) -> tuple[RunConfig, list[str]]:
    """Read and check a run file, and look for what it names.

    Args:
        run: run file.
        overrides: of `--set`.
        same_machine: the run will be on this machine; elsewhere may be what is not here.

    Returns:
        The configuration, and what is worth a notice.

    Raises:
        ConfigError: with everything that is wrong, one per line.
    """
    config = load_run(run, overrides)
    problems, notices = [], list(config.notices)
    for problem, can_differ in _look(config):
        if can_differ and not same_machine:
            notices.append(f"{problem}, on this machine; the nodes have to have it")
        else:
            problems.append(problem)
    if problems:
        raise ConfigError("\n".join(problems))
    return config, notices


def _look(config: RunConfig) -> Iterator[tuple[str, bool]]:
    """Problems, and whether another machine may not have them."""
    try:
        json.loads(config.deepspeed.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        yield f"{config.deepspeed}: is not readable JSON: {error}", False
    model = Path(config.model_id)
    if (config.model_id.startswith((".", "/", "~")) or config.model_id.count("/") != 1) and not model.is_dir():
        yield f"model: there is no directory {config.model_id}, and it is no name of the hub (owner/name)", True
    for section, sources in (("train", config.data.train), ("eval", config.data.eval)):
        for position, source in enumerate(sources):
            paths = [source.path] if isinstance(source.path, str) else source.path or []
            for path in paths:
                if _is_local(path) and not _exists(path):
                    yield f"data.{section}[{position}].path: there is no {path}", True
    if not config.data.train:
        yield "data.train: names no source", False
    place = config.train.output_dir.absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        yield (
            f"train.output_dir: {config.train.output_dir} cannot be written, as {place} is not a writable directory",
            True,
        )


def _is_local(path: str) -> bool:
    return "://" not in path and not path.startswith("pipe:")


def _exists(path: str) -> bool:
    return Path(path).expanduser().exists() or bool(find_files(path))


def find_files(path: str) -> list[Path]:
    """Files that a local path of a source leads to: itself, the tars of a directory, or those of a pattern."""
    place = Path(path).expanduser()
    if place.is_dir():
        return sorted(place.rglob("*.tar")) or sorted(file for file in place.iterdir() if file.is_file())
    if place.is_file():
        return [place]
    return sorted(map(Path, glob.glob(_without_braces(str(place)))))  # noqa: PTH207  # absolute patterns, too


def _without_braces(path: str) -> str:
    """`shards-{0000..0099}.tar` as a pattern."""
    head, brace, rest = path.partition("{")
    return f"{head}*{_without_braces(rest.partition('}')[2])}" if brace else path
