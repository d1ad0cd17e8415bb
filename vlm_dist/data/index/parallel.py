"""Indexes many shards in parallel processes, and reports all that are damaged, not only the first."""

from __future__ import annotations

import logging
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from vlm_dist.data.index.manifest import ShardEntry
from vlm_dist.data.index.open_index import MAX_COMPARED, index_tar, recheck
from vlm_dist.data.index.tar_scan import probe_scan
from vlm_dist.errors import DataError

_MAX_WORKERS = 32  # more only wait for the storage
_ALONE_SECONDS = 3.0  # starting processes takes longer than doing so much work
_PROBED_SHARDS = 4

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class IndexOutcome:
    """What became of one shard: an entry or an error."""

    path: Path
    entry: ShardEntry | None
    error: str | None
    warnings: tuple[str, ...] = ()


def index_shards(
    paths: Sequence[Path],
    index_dir: Path | None = None,
    *,
    workers: int = 1,
    checksums: bool = False,
    force: bool = False,
    on_done: Callable[[IndexOutcome], None] | None = None,
) -> list[IndexOutcome]:
    """Scan tars and keep their indexes.

    Args:
        paths: the tars.
        index_dir: where indexes go that cannot lie beside their tar.
        workers: processes; 1 works in this one.
        checksums: read all content, and keep a checksum of every sample.
        force: whatever index there is already; else one that fits is kept (see `recheck`).
        on_done: is called with every outcome as it comes.

    Returns:
        One outcome per path, in their order.

    Raises:
        DataError: if a worker process dies.
    """
    outcomes: dict[Path, IndexOutcome] = {}

    def finish(outcome: IndexOutcome) -> None:
        for warning in outcome.warnings:
            log.warning("%s", warning)
        outcomes[outcome.path] = outcome
        if on_done is not None:
            on_done(outcome)

    workers = min(workers, len(paths))
    if workers <= 1:
        for path in paths:
            finish(_index_one(path, index_dir, checksums, force))
    else:
        # spawned: a fork would copy the locks of this process's threads, and a GPU context
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, mp_context=context) as executor:
            jobs = [executor.submit(_index_in_worker, path, index_dir, checksums, force) for path in paths]
            try:
                for job in as_completed(jobs):
                    finish(job.result())
            except BrokenProcessPool as error:
                missing = next(path for path in paths if path not in outcomes)
                raise DataError(
                    f"a process that indexes shards has died (out of memory?), at {missing} or one near it; "
                    "try again with --workers 1"
                ) from error
            except BaseException:
                executor.shutdown(wait=False, cancel_futures=True)
                raise
    return [outcomes[path] for path in paths]


def default_workers() -> int:
    """Processes that this machine gives us."""
    return max(1, min(len(os.sched_getaffinity(0)), _MAX_WORKERS))


def workers_for(seconds: float) -> int:
    """Choose how many processes do work that takes one process so long."""
    return default_workers() if seconds > _ALONE_SECONDS else 1


def estimate_seconds(paths: Sequence[Path], sizes: Sequence[int], checksums: bool = False) -> float:
    """Estimate how long one process needs to index tars, from the time that the start of a few of them takes.

    Args:
        paths: the tars.
        sizes: their bytes.
        checksums: whether all content is read.
    """
    num_bytes, seconds = 0, 0.0
    for i in range(0, len(paths), -(-len(paths) // _PROBED_SHARDS)):
        start = time.perf_counter()
        num_bytes += probe_scan(paths[i], checksums)
        seconds += time.perf_counter() - start
    return seconds * sum(sizes) / max(num_bytes, 1)


def _index_one(path: Path, index_dir: Path | None, checksums: bool, force: bool) -> IndexOutcome:
    try:
        known = None if force else recheck(path, index_dir, MAX_COMPARED)
        if known is not None and (known.checksums is not None or not checksums):
            return IndexOutcome(path, ShardEntry.of(path.name, known), None)
        return IndexOutcome(path, ShardEntry.of(path.name, index_tar(path, index_dir, checksums)), None)
    except DataError as error:
        return IndexOutcome(path, None, str(error))


def _index_in_worker(path: Path, index_dir: Path | None, checksums: bool, force: bool) -> IndexOutcome:
    with _collected_warnings() as warnings:
        outcome = _index_one(path, index_dir, checksums, force)
    return IndexOutcome(outcome.path, outcome.entry, outcome.error, tuple(warnings))


@contextmanager
def _collected_warnings() -> Iterator[list[str]]:
    """Keep what is logged: lines of other processes would tear the progress bar."""
    messages: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    collector = Collector(logging.WARNING)
    logger = logging.getLogger("vlm_dist")
    logger.addHandler(collector)
    before, logger.propagate = logger.propagate, False
    try:
        yield messages
    finally:
        logger.removeHandler(collector)
        logger.propagate = before
