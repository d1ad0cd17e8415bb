"""Which files a run's sources consist of, written down beside its checkpoints, so that a refused resume can name them.

A checkpoint knows each source by one digest. That tells that something has changed, and an index that was made again
tells no more what there was before. The file is written by runs that may go on, so it fits every checkpoint beside it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlm_dist.data.index.shard_index import replacing
from vlm_dist.data.types import Source

CONTENTS_NAME = "data_files.json"

_MAX_NAMED = 5
_VERSION = 1

#: Per source its name, and name and digest of each of its files, in order.
Contents = list[tuple[str, list[tuple[str, str]]]]

log = logging.getLogger(__name__)


def contents_of(sources: Sequence[Source]) -> Contents:
    """List the files of sources."""
    return [(source.name, [(name, digest) for name, digest in source.files]) for source in sources]


def write_contents(directory: Path, contents: Contents) -> None:
    """Write them into the directory of a run, atomically; 60 bytes per file. A failure costs a later hint only."""
    document = {"version": _VERSION, "sources": [{"name": name, "files": files} for name, files in contents]}
    try:
        with replacing(directory / CONTENTS_NAME) as stream:
            stream.write((json.dumps(document, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace"))
    except OSError as error:
        log.warning("%s cannot be written: %s", directory / CONTENTS_NAME, error)


def read_contents(directory: Path) -> Contents | None:
    """Read them back; None where there is no such file, or none that can be understood."""
    path = directory / CONTENTS_NAME
    try:
        document: dict[str, Any] = json.loads(path.read_bytes())
        if document["version"] != _VERSION:
            return None
        return [(str(row["name"]), [(str(a), str(b)) for a, b in row["files"]]) for row in document["sources"]]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.debug("%s: cannot be read: %s", path, error)
        return None


def changed_files(before: Contents, now: Contents) -> dict[int, list[str]]:
    """Say which files of each source are not what they were.

    Returns:
        Position of the source -> one line per kind of change; sources whose files are the same are left out.
    """
    changes = {}
    for i, ((_, old_files), (_, new_files)) in enumerate(zip(before, now, strict=False)):
        old, new = _by_name(old_files), _by_name(new_files)
        kinds = {
            "changed": [name for name in new if name in old and old[name] != new[name]],
            "missing": [name for name in old if name not in new],
            "new": [name for name in new if name not in old],
        }
        lines = [f"{kind}: {_listed(names)}" for kind, names in kinds.items() if names]
        if not lines and old_files != new_files:
            lines = ["the same files in another order"]
        if lines:
            changes[i] = lines
    return changes


def _by_name(files: Sequence[tuple[str, str]]) -> dict[str, list[str]]:
    """Name -> digests: files of several directories may have one name."""
    digests: dict[str, list[str]] = {}
    for name, digest in files:
        digests.setdefault(name, []).append(digest)
    return {name: sorted(found) for name, found in digests.items()}


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
    return ", ".join(names[:_MAX_NAMED]) + more
