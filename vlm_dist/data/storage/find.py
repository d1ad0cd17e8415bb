"""Finding local files by directory, glob or brace pattern."""

from __future__ import annotations

import glob
import itertools
import logging
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from vlm_dist.config.masking import masked
from vlm_dist.errors import DataError

#: Endings of shards that cannot be read by offset, and are unpacked once.
COMPRESSED = (".tar.gz", ".tgz", ".tar.zst", ".tar.xz", ".tar.bz2")

_MAX_NAMED = 3

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"^(\d+)\.\.(\d+)$")

log = logging.getLogger(__name__)


def find_files(where: str, pattern: str, endings: tuple[str, ...]) -> list[Path]:
    """List the local files that a setting means, sorted within each part of the pattern.

    Args:
        where: names the source in errors.
        pattern: a file, a directory (all files in it with one of the endings), a glob, or a brace pattern as in
            `train-{000..099}.tar`, whose files must all exist.
        endings: of the files, with their dot.

    Raises:
        DataError: if nothing is found, or a file named by braces is missing.
    """
    if "://" in pattern or pattern.startswith("pipe:"):
        raise DataError(
            f"{where}: {masked(pattern)!r} is not a local path; only shards (type: tar) are read from elsewhere"
        )
    found: list[Path] = []
    missing: list[str] = []
    unread: list[Path] = []
    # a file or folder of just this name is meant before a pattern is
    for text in [pattern] if Path(pattern).expanduser().exists() else expand_braces(pattern):
        path = Path(text).expanduser()
        if path.is_dir():
            listed = sorted(p for p in path.iterdir() if not p.name.startswith("."))
            files = [p for p in listed if p.name.endswith(endings)]
            unread += _like_shards(listed, endings)
        elif glob.has_magic(text) and not path.exists():
            files = [Path(p) for p in sorted(glob.glob(str(path), recursive=True))]  # noqa: PTH207 - absolute patterns too
            files = [p for p in files if p.is_file()]
        else:
            files = [path] if path.is_file() else []
            if not files:
                missing.append(text)
        found.extend(files)
    if not found:
        raise DataError(
            f"{where}: no {' or '.join(endings)} files found for {pattern!r} (looked in {_folder(pattern)})"
            + (f"; {_how_to_read(unread)}" if unread else "")
        )
    if unread:
        log.warning("%s: %s", where, _how_to_read(unread))
    if missing:
        raise DataError(f"{where}: {len(missing)} of the files that {pattern!r} names do not exist, first {missing[0]}")
    return list(dict.fromkeys(found))


def _like_shards(listed: Sequence[Path], endings: tuple[str, ...]) -> list[Path]:
    """List the files of a directory of shards that are shards by their names, but not by those of plain tars."""
    if endings != (".tar",):
        return []
    return [p for p in listed if not p.name.endswith(".tar") and p.name.lower().endswith((".tar", *COMPRESSED))]


def _how_to_read(unread: Sequence[Path]) -> str:
    names = ", ".join(path.name for path in unread[:_MAX_NAMED]) + (", …" if len(unread) > _MAX_NAMED else "")
    compressed = [path for path in unread if path.name.endswith(COMPRESSED)]
    ways = []
    if compressed:
        ending = next(ending for ending in COMPRESSED if compressed[0].name.endswith(ending))
        pattern = str(compressed[0].parent / f"*{ending}")
        ways.append(f"name compressed shards by a pattern, in a source of their own (path: {pattern!r})")
    if len(compressed) < len(unread):
        ways.append("rename files so that they end in small letters (.tar)")
    counted = "1 file is" if len(unread) == 1 else f"{len(unread)} files are"
    return f"{counted} not read ({names}): a directory stands for its *.tar alone; {'; '.join(ways)}"


def expand_braces(pattern: str) -> list[str]:
    """Expand `{000..099}` (zero-padded) and `{a,b}`; several braces give their product."""
    parts: list[list[str]] = []
    position = 0
    for match in _BRACES.finditer(pattern):
        parts.append([pattern[position : match.start()]])
        parts.append(list(_alternatives(match.group(1))))
        position = match.end()
    parts.append([pattern[position:]])
    return ["".join(choice) for choice in itertools.product(*parts)]


def _alternatives(body: str) -> Iterator[str]:
    match = _RANGE.match(body)
    if match is None:
        yield from body.split(",") if "," in body else ["{" + body + "}"]
        return
    first, last = match.groups()
    width = len(first) if first.startswith("0") or len(first) == len(last) else 0
    for number in range(int(first), int(last) + 1):
        yield f"{number:0{width}d}"


def _folder(pattern: str) -> str:
    """Say in which folder the search ended, and whether it exists."""
    fixed = re.split(r"[*?\[{]", pattern)[0]
    folder = Path(os.path.dirname(fixed) or ".").expanduser().resolve()  # noqa: PTH120 - keeps the part before a slash
    if fixed == pattern and Path(fixed).is_dir():
        folder = Path(fixed).resolve()
    return f"{folder}" + ("" if folder.is_dir() else ", which does not exist")
