"""Makes the manifest of some tar shards from what is known of them, indexing what is not."""

from __future__ import annotations

import logging
import os
import shlex
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from vlm_dist.data.index.manifest import MANIFEST_NAME, Manifest, ShardEntry, read_manifest, unfinished_builds
from vlm_dist.data.index.open_index import MAX_COMPARED, known_entry, recheck, stamp_of, stat_shard
from vlm_dist.data.index.parallel import default_workers, estimate_seconds, index_shards, workers_for
from vlm_dist.data.index.progress import ShardProgress
from vlm_dist.data.index.shard_index import sidecar_paths
from vlm_dist.errors import DataError

#: How long shards without an index may keep a run from starting: all its devices are idle meanwhile.
MAX_FIRST_USE_SECONDS = 60.0

_COMPARED_SAMPLES = (
    100_000  # of all shards together, when their times have changed: seconds, on a slow storage a minute
)
_MIN_COMPARED = 16
_NUM_THREADS = 8
_MAX_LISTED = 20

log = logging.getLogger(__name__)


def describe_shards(
    paths: Sequence[Path], index_dir: Path | None = None, pattern: str | None = None, whole: Collection[Path] = ()
) -> Manifest:
    """Make the manifest of some shards from their directories' manifests and from their indexes.

    Shards that have changed since they were indexed are indexed again, and so are those without an index where that is
    a matter of seconds.

    Args:
        paths: the shards.
        index_dir: where indexes lie, and go, that cannot be beside their shard.
        pattern: what the user calls these shards, for commands in messages.
        whole: directories of which all shards are meant.

    Raises:
        DataError: if a shard is missing or damaged (all of them are named), or indexing takes too long.
    """
    statuses = [stat_shard(path) for path in paths]
    manifests = {folder: _by_name(read_manifest(folder)) for folder in {path.parent for path in paths}.union(whole)}
    _refuse_gone(manifests, paths, whole)
    entries = _trusted_entries(paths, statuses, manifests, index_dir)
    unsure = [i for i, entry in enumerate(entries) if entry is None]
    if unsure:
        where = pattern or _common_pattern([paths[i] for i in unsure])
        for i, entry in _recheck_all(paths, unsure, index_dir, where).items():
            entries[i] = entry
        unsure = [i for i in unsure if entries[i] is None]
    if unsure:
        found = _index_all([paths[i] for i in unsure], [statuses[i].st_size for i in unsure], index_dir, where)
        for i, entry in zip(unsure, found, strict=True):
            entries[i] = entry
    folders = {folder: folder.resolve() for folder in dict.fromkeys(path.parent for path in paths)}
    _tell_unfinished(paths, list(folders))
    root = os.path.commonpath(list(folders.values()))
    below = {folder: os.path.relpath(resolved, root) for folder, resolved in folders.items()}
    names = [os.path.normpath(f"{below[path.parent]}/{path.name}") for path in paths]
    return Manifest(tuple(replace(entry, name=name) for entry, name in zip(entries, names, strict=True) if entry))


def _tell_unfinished(paths: Sequence[Path], folders: Sequence[Path]) -> None:
    """Warn where shards are the first part of more."""
    for folder in folders:
        for prefix in unfinished_builds(folder):
            if any(path.parent == folder and path.name.startswith(f"{prefix}-") for path in paths):
                log.warning(
                    "%s: the build of %s-*.tar was stopped, samples are missing; go on with its command and --resume",
                    folder, prefix,
                )  # fmt: skip


def _by_name(manifest: Manifest | None) -> dict[str, ShardEntry]:
    return {shard.name: shard for shard in manifest.shards} if manifest else {}


def _refuse_gone(
    manifests: Mapping[Path, Mapping[str, ShardEntry]], paths: Sequence[Path], whole: Collection[Path]
) -> None:
    """A shard that its directory's manifest lists has to be there: without a word, training would be on less data."""
    present = set(paths)
    for folder in whole:
        gone = [name for name in manifests[folder] if folder / name not in present]
        if gone:
            raise DataError(
                f"{folder}: {_counted(len(gone), 'shard')} of its {MANIFEST_NAME} {'is' if len(gone) == 1 else 'are'} "
                f"not there, first {gone[0]}; bring {'it' if len(gone) == 1 else 'them'} back, or, if that is meant, "
                f"run: vlm-dist shards index {shlex.quote(str(folder))}"
            )


def _trusted_entries(
    paths: Sequence[Path],
    statuses: Sequence[os.stat_result],
    manifests: Mapping[Path, Mapping[str, ShardEntry]],
    index_dir: Path | None,
) -> list[ShardEntry | None]:
    """Find the shards whose size and time are those that were indexed."""
    entries: list[ShardEntry | None] = []
    for path, status in zip(paths, statuses, strict=True):
        entry = manifests[path.parent].get(path.name)
        fits = entry is not None and (entry.num_bytes, entry.stamp) == (status.st_size, stamp_of(status))
        has_index = fits and sidecar_paths(path, None)[0].is_file()
        entries.append(entry if has_index else known_entry(path, status, index_dir))
    return entries


def _recheck_all(
    paths: Sequence[Path], unsure: Sequence[int], index_dir: Path | None, where: str
) -> dict[int, ShardEntry]:
    """Compare shards of another time than their index's with what was indexed."""
    each = max(_MIN_COMPARED, min(MAX_COMPARED, _COMPARED_SAMPLES // len(unsure)))
    with ThreadPoolExecutor(_NUM_THREADS) as threads:
        indexes = list(threads.map(lambda i: recheck(paths[i], index_dir, each), unsure))
    same = {i: index for i, index in zip(unsure, indexes, strict=True) if index is not None}
    if same:
        num_samples = sum(len(index) for index in same.values())
        num_compared = sum(min(len(index), each) for index in same.values())
        log.info(
            "%s: another time than when indexed; %s of their %d samples were compared and agree%s",
            _counted(len(same), "shard"),
            "all" if num_compared == num_samples else num_compared,
            num_samples,
            "" if num_compared == num_samples else f" (to compare all: vlm-dist shards verify {shlex.quote(where)})",
        )
    return {i: ShardEntry.of(paths[i].name, index) for i, index in same.items()}


def _index_all(paths: Sequence[Path], sizes: Sequence[int], index_dir: Path | None, where: str) -> list[ShardEntry]:
    workers = default_workers()
    seconds = estimate_seconds(paths, sizes)
    if seconds / workers > MAX_FIRST_USE_SECONDS:
        folder = f" --index-dir {shlex.quote(str(index_dir))}" if index_dir is not None else ""
        raise DataError(
            f"{_counted(len(paths), 'shard')} ({sum(sizes) / 1e9:.1f} GB) without an index that fits; to make it takes "
            f"about {seconds / workers / 60:.0f} minutes here, too long for the start of a run; make it once, before "
            f"it:\n  vlm-dist shards index {shlex.quote(where)}{folder}"
        )
    with ShardProgress("indexing", len(paths)) as progress:
        outcomes = index_shards(
            paths,
            index_dir,
            workers=workers_for(seconds),
            force=True,  # what could be kept is
            on_done=lambda outcome: progress.advance(),
        )
    errors = [outcome.error for outcome in outcomes if outcome.error]
    if errors:
        left = len(errors) - _MAX_LISTED
        raise DataError("\n".join(errors[:_MAX_LISTED]) + (f"\nand {left} more damaged shards" if left > 0 else ""))
    entries = [outcome.entry for outcome in outcomes if outcome.entry is not None]
    num_samples = sum(entry.num_samples for entry in entries)
    log.info("indexed %s: %s", _counted(len(entries), "shard"), _counted(num_samples, "sample"))
    return entries


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _common_pattern(paths: Sequence[Path]) -> str:
    """Name shards for a command: their file, their directory, or a glob."""
    if len(paths) == 1:
        return str(paths[0])
    folders = {path.parent for path in paths}
    return str(folders.pop()) if len(folders) == 1 else os.path.commonpath(list(folders)) + "/**/*.tar"
