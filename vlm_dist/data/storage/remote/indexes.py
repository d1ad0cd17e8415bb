"""Indexes of shards that are not on this machine: fetched, or made from a copy, and kept under `index_dir`."""

from __future__ import annotations

import atexit
import logging
import shlex
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from vlm_dist.data.index.manifest import MANIFEST_NAME, Manifest, ShardEntry, read_manifest
from vlm_dist.data.index.shard_index import INDEX_SUFFIX, ShardIndex, read_index, read_metadata, replacing, write_index
from vlm_dist.data.index.tar_scan import scan_tar
from vlm_dist.data.storage.remote.shard_cache import NoRoomError, ShardCache
from vlm_dist.data.storage.remote.store import RemoteObject, store_for
from vlm_dist.data.storage.remote.urls import copy_key, digest_of, file_name, identity, shown, sibling, with_suffix
from vlm_dist.data.storage.shard_storage import CacheSettings
from vlm_dist.errors import DataError

#: Shards without an index are fetched and scanned up to this size together: about a minute over a fast line.
MAX_FIRST_USE_BYTES = 4 * 10**9

_NUM_THREADS = 16

log = logging.getLogger(__name__)


class RemoteIndexes:
    """Where indexes of remote shards are kept.

    Args:
        index_dir: None: in a directory of this process, gone when it ends.
    """

    def __init__(self, index_dir: Path | None) -> None:
        if index_dir is None:
            index_dir = Path(tempfile.mkdtemp(prefix="vlm-dist-index-"))
            atexit.register(shutil.rmtree, index_dir, ignore_errors=True)
        self.directory = index_dir
        self._folder = self.directory / "remote"

    def place(self, url: str) -> Path:
        """Where the index of a shard is kept."""
        plain = identity(url)
        return self._folder / digest_of(plain.rpartition("/")[0]) / (file_name(plain) + INDEX_SUFFIX)

    def load(self, url: str, digest: str) -> ShardIndex:
        """Load the index of this digest, from where it is kept or from the server.

        Raises:
            DataError: there is none any more, or it is another.
        """
        place = self.place(url)
        index = read_index(place)
        if index is None or index.digest != digest:
            index = self.fetch(url, "")
        if index is None:
            place.unlink(missing_ok=True)  # else the next start would trust what a damaged one says of itself
            raise DataError(f"{place}: the index of {shown(url)} is gone; start the run again, and it is made again")
        if index.digest != digest:
            raise DataError(
                f"{shown(url)}: its index has changed since this run began; start the run again (it will say whether "
                "the samples are still the same)"
            )
        return index

    def known(self, url: str, found: RemoteObject) -> ShardEntry | None:
        """Describe a shard by the index that is kept of this very object; None where there is none."""
        metadata = read_metadata(self.place(url))
        if metadata is None or not found.version or metadata["stamp"] != found.version:
            return None
        if found.num_bytes is not None and int(metadata["num_bytes"]) != found.num_bytes:
            return None
        return ShardEntry.of_metadata(file_name(url), metadata)

    def fetch(self, url: str, version: str) -> ShardIndex | None:
        """Fetch and keep the index that lies beside a shard; None where there is none."""
        data = store_for(url).read_whole(with_suffix(url, INDEX_SUFFIX))
        if data is None:
            return None
        place = self.place(url)
        place.parent.mkdir(parents=True, exist_ok=True)
        with replacing(place) as stream:
            stream.write(data)
        index = read_index(place)
        return None if index is None else self.keep(url, index, version)

    def keep(self, url: str, index: ShardIndex, version: str) -> ShardIndex:
        """Keep an index, with the version of the object that it is of."""
        index = replace(index, stamp=version)
        write_index(index, self.place(url))
        return index


def describe_remote_shards(
    where: str,
    shards: Mapping[str, RemoteObject],
    indexes: RemoteIndexes,
    settings: CacheSettings,
    max_bytes: int | None = None,
) -> Manifest:
    """Make the manifest of remote shards: from their directories' manifests, their indexes, or the shards themselves.

    Args:
        where: names the source in errors.
        shards: URL -> what is known of the object.
        indexes: where indexes are kept.
        settings: of the cache, for shards that have to be read.
        max_bytes: of all shards that have to be read; None: no limit.

    Raises:
        DataError: a shard is missing, or too much has to be read.
    """
    urls = list(shards)
    entries = _from_manifests(urls, shards)
    unknown = [url for url in urls if url not in entries]
    if unknown:
        with ThreadPoolExecutor(_NUM_THREADS) as threads:
            found = dict(zip(unknown, threads.map(lambda url: _describe(url, shards[url]), unknown), strict=True))
            known = threads.map(lambda url: _from_index(url, found[url], indexes), unknown)
            entries |= {url: entry for url, entry in zip(unknown, known, strict=True) if entry is not None}
        missing = [url for url in unknown if url not in entries]
        if missing:
            unindexed = {url: found[url] for url in missing}
            entries |= _index_all(where, unindexed, indexes, settings, max_bytes)
    return Manifest(tuple(replace(entries[url], name=name) for url, name in zip(urls, _names(urls), strict=True)))


def _index_all(
    where: str,
    shards: Mapping[str, RemoteObject],
    indexes: RemoteIndexes,
    settings: CacheSettings,
    max_bytes: int | None,
) -> dict[str, ShardEntry]:
    """Fetch shards that have no index, scan them, and keep the indexes."""
    total = sum(one.num_bytes or 0 for one in shards.values())
    if max_bytes is not None and total > max_bytes:
        first = next(iter(shards))
        raise DataError(
            f"{where}: {len(shards)} shards ({total / 1e9:.1f} GB) have no index, first {shown(first)}. Index them "
            f"where they lie before they are uploaded, with their {INDEX_SUFFIX} files beside them, or once from here:"
            f"\n  vlm-dist shards index {shlex.quote(shown(first).rpartition('/')[0] + '/…')} --index-dir "
            f"{shlex.quote(str(indexes.directory))}"
        )
    cache = ShardCache(settings.dir, settings.max_bytes)

    def index_one(url: str) -> ShardEntry:
        found = shards[url]
        key = copy_key(url, f"unindexed {found.version}")

        def download(descriptor: int, on_bytes: Callable[[int], None]) -> int:
            return store_for(url).download(url, found, descriptor, on_bytes)

        made: list[ShardIndex] = []
        try:
            cache.fetch(key, found.num_bytes, download, check=lambda copy: made.append(scan_tar(copy)))
        except NoRoomError as error:
            raise DataError(f"{where}: {shown(url)}: {error}") from error
        except DataError as error:
            raise DataError(str(error).replace(f"{cache.path(key)}.part", shown(url))) from error
        index = made[0] if made else scan_tar(cache.path(key))  # a copy that was left by a process that died
        cache.rename(key, copy_key(url, index.digest))
        log.info("%s: indexed %d samples of %s", where, len(index), shown(url))
        return ShardEntry.of(file_name(url), indexes.keep(url, index, found.version))

    with ThreadPoolExecutor(4) as threads:
        return dict(zip(shards, threads.map(index_one, shards), strict=True))


def _from_manifests(urls: Sequence[str], shards: Mapping[str, RemoteObject]) -> dict[str, ShardEntry]:
    """Find shards in the manifests of their directories; one request for each directory."""
    entries: dict[str, ShardEntry] = {}
    folders: dict[str, dict[str, ShardEntry]] = {}
    for url in urls:
        place = sibling(url, MANIFEST_NAME)
        folder = identity(place)
        if folder not in folders:
            folders[folder] = {entry.name: entry for entry in _read_manifest(place)}
        entry = folders[folder].get(file_name(url))
        if entry is not None and shards[url].num_bytes in (None, entry.num_bytes):
            entries[url] = entry
    return entries


def _read_manifest(url: str) -> Sequence[ShardEntry]:
    data = store_for(url).read_whole(url)
    if data is None:
        return ()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / MANIFEST_NAME).write_bytes(data)
        try:
            manifest = read_manifest(Path(folder))
        except DataError as error:
            raise DataError(f"{shown(url)}: the manifest cannot be read ({error.__cause__!r})") from error
    return manifest.shards if manifest is not None else ()


def _describe(url: str, listed: RemoteObject) -> RemoteObject:
    if listed.num_bytes is not None and listed.version:
        return listed
    found = store_for(url).describe(url)
    if found is None:
        raise DataError(f"{shown(url)}: the server has no such file")
    return found


def _from_index(url: str, found: RemoteObject, indexes: RemoteIndexes) -> ShardEntry | None:
    entry = indexes.known(url, found)
    if entry is not None:
        return entry
    index = indexes.fetch(url, found.version)
    if index is None or found.num_bytes not in (None, index.num_bytes):
        return None
    return ShardEntry.of(file_name(url), index)


def _names(urls: Sequence[str]) -> list[str]:
    """What tells the shards apart: the part of their URLs that they do not share, so that data may move."""
    plain = [identity(url) for url in urls]
    folders = [url.rpartition("/")[0] + "/" for url in plain]
    shared = folders[0]
    while not all(folder.startswith(shared) for folder in folders):
        shared = shared.rstrip("/").rpartition("/")[0] + "/"
    return [url.removeprefix(shared) for url in plain]
