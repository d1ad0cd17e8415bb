"""Makes or renews the indexes of existing tar shards, and the manifests of their directories."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from vlm_dist.data.index.manifest import MANIFEST_NAME, Manifest, ShardEntry
from vlm_dist.data.index.open_index import stamp_of, stat_shard
from vlm_dist.data.index.parallel import IndexOutcome, estimate_seconds, index_shards, workers_for
from vlm_dist.data.index.shard_index import read_metadata, sidecar_paths

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class IndexUpdate:
    """What `update_indexes` did.

    Attributes:
        entries: path -> what is known of every sound shard.
        num_indexed: shards that were scanned.
        errors: one message per damaged shard.
        manifests: files that were written.
    """

    entries: dict[Path, ShardEntry]
    num_indexed: int
    errors: tuple[str, ...]
    manifests: tuple[Path, ...]


def update_indexes(
    paths: Sequence[Path],
    index_dir: Path | None = None,
    *,
    workers: int | None = None,
    checksums: bool = False,
    force: bool = False,
    on_start: Callable[[int], Callable[[], None]] | None = None,
) -> IndexUpdate:
    """Index the shards that have no index of their present size and time.

    A directory all of whose tars are given, and sound, gets a `manifest.json`: a data set of many shards is opened
    faster with one.

    Args:
        paths: the tars.
        index_dir: where indexes go that cannot lie beside their tar.
        workers: processes; None: as many as the work is worth.
        checksums: also keep checksums of all content; indexes without them are made again.
        force: make all indexes again.
        on_start: is told how many shards will be scanned, and gives back what to call after each.

    Raises:
        DataError: a tar cannot be opened at all, or a worker process dies.
    """
    entries: dict[Path, ShardEntry] = {}
    for path in [] if force else paths:
        entry = _present(path, index_dir, checksums)
        if entry is not None:
            entries[path] = entry
    left = [path for path in paths if path not in entries]
    if workers is None and left:
        workers = workers_for(estimate_seconds(left, [stat_shard(path).st_size for path in left], checksums))
    advance = on_start(len(left)) if on_start is not None else None

    def on_done(outcome: IndexOutcome) -> None:
        if advance is not None:
            advance()

    outcomes = index_shards(left, index_dir, workers=workers or 1, checksums=checksums, force=force, on_done=on_done)
    entries |= {outcome.path: outcome.entry for outcome in outcomes if outcome.entry is not None}
    errors = tuple(outcome.error for outcome in outcomes if outcome.error is not None)
    return IndexUpdate(entries, len(outcomes) - len(errors), errors, tuple(_write_manifests(entries)))


def _present(path: Path, index_dir: Path | None, checksums: bool) -> ShardEntry | None:
    status = stat_shard(path)
    for place in sidecar_paths(path, index_dir):
        found = read_metadata(place)
        if found is None or (found["num_bytes"], found["stamp"]) != (str(status.st_size), stamp_of(status)):
            continue
        if not checksums or found["has_checksums"] == "yes":
            return ShardEntry.of_metadata(path.name, found)
    return None


def _write_manifests(entries: dict[Path, ShardEntry]) -> list[Path]:
    by_folder: dict[Path, dict[str, ShardEntry]] = defaultdict(dict)
    for path, entry in entries.items():
        by_folder[path.parent][path.name] = entry
    written: list[Path] = []
    for folder, known in by_folder.items():
        present = {path.name for path in folder.glob("*.tar") if not path.name.startswith(".")}
        if present != set(known):
            continue
        manifest = Manifest(tuple(replace(known[name], name=name) for name in sorted(known)))
        try:
            manifest.write(folder)
        except OSError as error:
            log.info("%s: cannot write %s: %s", folder, MANIFEST_NAME, error.strerror)
            continue
        written.append(folder / MANIFEST_NAME)
    return written
