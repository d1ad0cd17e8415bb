"""Runs a build: checks all records, then reads ahead in threads and writes in order; can be stopped and resumed."""

from __future__ import annotations

import itertools
import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from vlm_dist.config.data import DataSource
from vlm_dist.data.index.manifest import Manifest, ShardEntry, read_manifest
from vlm_dist.data.shards.build.bad_records import BadRecord, BadRecords
from vlm_dist.data.shards.build.config_lines import config_lines
from vlm_dist.data.shards.build.fetch import Fetcher
from vlm_dist.data.shards.build.keys import UniqueKeys, clean_key, numbered_key
from vlm_dist.data.shards.build.media import MediaReader
from vlm_dist.data.shards.build.order import record_order, shuffle_stream
from vlm_dist.data.shards.build.records import Record, Records, open_records
from vlm_dist.data.shards.build.rows import RowMaker
from vlm_dist.data.shards.build.settings import BuildSettings, BuildSummary, Progress
from vlm_dist.data.shards.build.state import (
    BuildState,
    finished_shards,
    only_build,
    read_state,
    remove_leavings,
    report_path,
    state_path,
)
from vlm_dist.data.shards.writer import PreparedSample, ShardWriter, prepare_sample
from vlm_dist.data.sources import open_source
from vlm_dist.data.sources.media import MediaRoot
from vlm_dist.errors import DataError

_AHEAD = 4  # records in work per thread
_TELL_EVERY = 64  # records

log = logging.getLogger(__name__)

OnProgress = Callable[[Progress], None]


class Maker(Protocol):
    """Makes samples of records."""

    @property
    def messages_column(self) -> str | None:
        """The column of conversations, if there is one."""

    def observe(self, record: Record) -> None:
        """Learn what columns there are, record by record in the order of the source."""

    def check_names(self) -> None:
        """See that the columns that the settings name exist."""

    def draft(self, record: Record) -> Any:
        """Check a record without reading its media; the result has a `key`."""

    def members(self, draft: Any) -> dict[str, Any]:
        """Read and check the media."""


@dataclass(frozen=True, slots=True)
class _Outcome:
    """What became of a record."""

    number: int
    where: str
    key: Any
    sample: PreparedSample | BadRecord


def build_shards(settings: BuildSettings, on_progress: OnProgress = lambda progress: None) -> BuildSummary:
    """Write the shards, their indexes and the manifest.

    Args:
        settings: of the build.
        on_progress: is told how far the build is, in this thread.

    Raises:
        DataError: the input or the output cannot be used; shards that were finished stay, for `resume`.
    """
    settings.check()
    start = time.monotonic()
    with only_build(settings.out):
        summary = _build(settings, on_progress)
    return replace(summary, seconds=time.monotonic() - start)


def _build(settings: BuildSettings, on_progress: OnProgress) -> BuildSummary:
    state = read_state(settings) if settings.resume else None
    if state is not None and state.is_complete:
        return _summarise(settings, state, ["this build is complete already"])
    if state is None:
        ShardWriter(settings.out, settings.prefix, overwrite=settings.overwrite)  # refuse before long work
        report_path(settings).unlink(missing_ok=True)
    if settings.streaming:
        from vlm_dist.data.shards.build.hf_records import RowStream

        stream = RowStream(settings)
        maker: Maker = _row_maker(settings, stream.typed, stream.media_root, stream.own_folders)
        work = _Work(settings, maker, BuildState(settings.identity, ""), [], UniqueKeys(), None, on_progress)
        return work.write(_stream_outcomes(settings, maker, stream))
    records = open_records(settings)
    if state is not None and state.input != records.stamp:
        raise DataError(f"{records.name}: changed since the build to resume; build anew with --overwrite")
    maker = _maker(settings, records)
    order = record_order(len(records), settings.shuffle, settings.limit)
    _check(settings, records, maker, order, on_progress)
    if state is None:
        state = BuildState(settings.identity, records.stamp)
    state = replace(state, messages_column=maker.messages_column)
    entries, taken = finished_shards(settings, state.num_shards)
    keys = UniqueKeys(taken if settings.type == "tar" or settings.key_column else ())
    work = _Work(settings, maker, state, entries, keys, len(order), on_progress)
    work.notices += _notices(records)
    return work.write(_outcomes(settings, records, maker, order[state.position :].tolist()))


def _maker(settings: BuildSettings, records: Records) -> Maker:
    if settings.type == "tar":
        from vlm_dist.data.shards.build.tar_records import TarMaker

        return TarMaker(settings)
    return _row_maker(settings, records.typed, records.media_root, records.own_folders)


def _row_maker(
    settings: BuildSettings, typed: dict[str, str], folder: Path | None, own_folders: Sequence[Path]
) -> RowMaker:
    fetcher = Fetcher(settings.timeout_seconds, settings.max_media_bytes)
    own = MediaRoot("--media-root", settings.media_root, own_folders)
    root = settings.media_root or folder
    media = MediaReader(root, own, fetcher, settings.max_media_bytes, settings.verify_images)
    return RowMaker(settings, typed, media)


def _notices(records: Records) -> list[str]:
    notices = [f"{path}: used up to the damage ({reason})" for path, reason in getattr(records, "damaged", [])]
    if num_other := getattr(records, "num_other", 0):
        notices.append(f"{num_other} tar members are no part of a sample (no extension, or links) and were left out")
    if num_repaired := getattr(records, "num_repaired", 0):
        notices.append(f"{num_repaired} keys had a dot; it is `_` now")
    if num_joined := getattr(records, "num_joined", 0):
        notices.append(f"the members of {num_joined} samples did not follow each other; they do now")
    return notices


def _check(settings: BuildSettings, records: Records, maker: Maker, order: Any, on_progress: OnProgress) -> None:
    """Look at all records without reading media.

    Raises:
        DataError: some cannot be used, and `skip_bad` is off; or the settings name columns that are not there.
    """
    bad = BadRecords(report_path(settings))
    for done, record in enumerate(records.outline(np.sort(order).tolist())):
        maker.observe(record)
        try:
            draft = maker.draft(record)
            if settings.key_column:
                clean_key(draft.key)
        except BadRecord as error:
            bad.add(record.number, record.where, error)
        if done % _TELL_EVERY == 0:
            on_progress(Progress("checking", done, len(order), num_skipped=bad.counts.total()))
    on_progress(Progress("checking", len(order), len(order), num_skipped=bad.counts.total()))
    maker.check_names()
    if not settings.skip_bad:
        bad.refuse(len(order))


def _outcomes(settings: BuildSettings, records: Records, maker: Maker, order: list[int]) -> Iterator[_Outcome]:
    """Make samples of records that are read by number, in the order given."""

    def make(number: int) -> _Outcome:
        record = records.read(number)
        try:
            draft = maker.draft(record)
        except BadRecord as error:
            return _Outcome(number, record.where, None, error)
        return _finish(maker, record, draft)

    return _in_order(settings.workers, make, order)


def _stream_outcomes(settings: BuildSettings, maker: Maker, stream: Iterable[Record]) -> Iterator[_Outcome]:
    """Make samples of records that come once; what columns are is learned in their order, in this thread."""

    def drafts() -> Iterator[tuple[Record, Any]]:
        for record in itertools.islice(stream, settings.limit):
            maker.observe(record)
            try:
                yield record, maker.draft(record)
            except BadRecord as error:
                yield record, error

    def make(item: tuple[Record, Any]) -> _Outcome:
        record, draft = item
        if isinstance(draft, BadRecord):
            return _Outcome(record.number, record.where, None, draft)
        return _finish(maker, record, draft)

    items: Iterable[tuple[Record, Any]] = drafts()
    if settings.shuffle is not None:
        items = shuffle_stream(items, settings.shuffle, settings.shuffle_buffer)
    return _in_order(settings.workers, make, items)


def _finish(maker: Maker, record: Record, draft: Any) -> _Outcome:
    sample: PreparedSample | BadRecord
    try:
        members = maker.members(draft)
    except BadRecord as error:
        return _Outcome(record.number, record.where, draft.key, error)
    try:
        sample = prepare_sample(record.where, members)
    except DataError as error:
        sample = BadRecord("unwritable", str(error))
    return _Outcome(record.number, record.where, draft.key, sample)


def _in_order(workers: int, make: Callable[[Any], _Outcome], items: Iterable[Any]) -> Iterator[_Outcome]:
    """Map in threads, a bounded number of items ahead, results in the order of the items."""
    waiting: deque[Future[_Outcome]] = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="build")
    try:
        for item in items:
            waiting.append(pool.submit(make, item))
            if len(waiting) >= workers * _AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


class _Work:
    """The writing part of a build."""

    def __init__(
        self,
        settings: BuildSettings,
        maker: Maker,
        state: BuildState,
        entries: list[ShardEntry],
        keys: UniqueKeys,
        total: int | None,
        on_progress: OnProgress,
    ) -> None:
        self._settings = settings
        self._maker = maker
        self._state = state
        self._entries = entries
        self._keys = keys
        self._total = total
        self._on_progress = on_progress
        self._bad = BadRecords(report_path(settings), Counter(state.skipped), state.report_bytes)
        self._position = state.position
        self._num_samples = sum(entry.num_samples for entry in entries)
        self._num_bytes = sum(entry.num_bytes for entry in entries)
        self.notices: list[str] = []

    def write(self, outcomes: Iterator[_Outcome]) -> BuildSummary:
        """Write the samples, and remember how far it came after every shard."""
        settings = self._settings
        remove_leavings(settings)
        writer = ShardWriter(
            settings.out,
            settings.prefix,
            settings.max_shard_bytes,
            settings.max_samples,
            overwrite=settings.overwrite or settings.resume,
            finished=self._entries,
        )
        self._state.write(state_path(settings))
        with writer:
            for outcome in outcomes:
                self._take(writer, outcome)
            self._check_not_empty()
            with _writing(settings):
                manifest = writer.close()
            self._tell()
        self._save(manifest=manifest)
        return _summarise(settings, self._state, self.notices)

    def _take(self, writer: ShardWriter, outcome: _Outcome) -> None:
        try:
            if isinstance(outcome.sample, BadRecord):
                raise outcome.sample
            entry = self._write_one(writer, outcome, outcome.sample)
        except BadRecord as error:
            if not self._settings.skip_bad:
                go_on = "" if self._settings.streaming else "mend the file and go on with --resume, or "
                raise DataError(
                    f"{outcome.where}: {error.message}. {self._num_samples} samples came before; "
                    f"{go_on}leave such records out with --skip-bad"
                ) from error
            self._bad.add(outcome.number, outcome.where, error)
            entry = None
        self._position += 1
        if entry is not None:
            self._entries.append(entry)
            self._num_bytes += entry.num_bytes
            self._save()
        if self._position % _TELL_EVERY == 0 or entry is not None:
            self._tell()

    def _write_one(self, writer: ShardWriter, outcome: _Outcome, sample: PreparedSample) -> ShardEntry | None:
        if self._settings.type == "tar" or self._settings.key_column:
            key = self._keys.unique(clean_key(outcome.key))
        else:
            key = numbered_key(outcome.number)
        try:
            with _writing(self._settings):
                entry = writer.write_prepared(key, sample)
        except DataError as error:  # raised before anything of the sample is written
            if isinstance(error.__cause__, OSError):
                raise
            raise BadRecord("members", str(error)) from error
        self._num_samples += 1
        return entry

    def _check_not_empty(self) -> None:
        if not self._num_samples:
            self._bad.flush()
            raise DataError(f"not one of {self._position} records can be used; see {self._bad.report}")

    def _save(self, manifest: Manifest | None = None) -> None:
        self._bad.flush()
        self._state = replace(
            self._state,
            position=self._position,
            num_shards=len(self._entries) if manifest is None else len(_own_shards(self._settings, manifest)),
            report_bytes=self._bad.num_bytes,
            skipped=dict(self._bad.counts),
            messages_column=self._maker.messages_column,
            is_complete=manifest is not None,
        )
        self._state.write(state_path(self._settings))

    def _tell(self) -> None:
        self._on_progress(
            Progress(
                "writing", self._position, self._total, self._num_samples, self._bad.counts.total(),
                len(self._entries), self._num_bytes,
            )
        )  # fmt: skip


@contextmanager
def _writing(settings: BuildSettings) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(f"{settings.out}: cannot be written: {error}; make room and go on with --resume") from error


def _own_shards(settings: BuildSettings, manifest: Manifest) -> list[ShardEntry]:
    return [shard for shard in manifest.shards if shard.name.startswith(f"{settings.prefix}-")]


def _summarise(settings: BuildSettings, state: BuildState, notices: list[str]) -> BuildSummary:
    manifest = read_manifest(settings.out)
    entries = _own_shards(settings, manifest) if manifest is not None else []
    if settings.streaming and settings.shuffle is not None:
        notices.append(
            f"a stream is shuffled among {settings.shuffle_buffer} records at a time only; training shuffles anyway"
        )
    others = any(not path.name.startswith(f"{settings.prefix}-") for path in settings.out.glob("*.tar"))
    path = str(settings.out / f"{settings.prefix}-*.tar") if others else str(settings.out)
    columns = open_source(DataSource(type="tar", path=path)).columns
    return BuildSummary(
        num_shards=len(entries),
        num_samples=sum(entry.num_samples for entry in entries),
        num_bytes=sum(entry.num_bytes for entry in entries),
        seconds=0.0,
        skipped=state.skipped,
        notices=tuple(notices),
        report=report_path(settings) if state.skipped else None,
        config=config_lines(path, columns, state.messages_column),
    )
