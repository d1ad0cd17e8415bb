"""Reads the media of a record, wherever they are, and looks at what they are."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from vlm_dist.data.index.facts import member_kind, probe_image, probe_video
from vlm_dist.data.media.images import decode_image
from vlm_dist.data.shards.build.bad_records import BadRecord
from vlm_dist.data.shards.build.fetch import Fetcher, is_url, shown_url
from vlm_dist.data.shards.build.records import Held
from vlm_dist.data.shards.build.sniff import describe_content, sniff_format
from vlm_dist.data.sources.media import MediaRoot, OutsideRoot
from vlm_dist.errors import DataError, SkipSample


class MediaReader:
    """Reads images and videos from bytes, files under the media root, and URLs; many threads may use one.

    Args:
        root: the folder that paths start in; None where there is none.
        own: what resolves paths that the data set's builder wrote.
        fetcher: of URLs.
        max_bytes: a larger file is bad.
        verify_images: decode every image.
    """

    def __init__(
        self, root: Path | None, own: MediaRoot, fetcher: Fetcher, max_bytes: int, verify_images: bool
    ) -> None:
        self._root = MediaRoot("--media-root", root)
        self._own = own
        self._fetcher = fetcher
        self._max_bytes = max_bytes
        self._verify_images = verify_images

    def check(self, item: Any, is_typed: bool) -> None:
        """See that a file is there, without reading it; URLs are not asked.

        Args:
            item: bytes, `Held`, a path or a URL.
            is_typed: the path comes from the data set's builder, not from a record.

        Raises:
            BadRecord: ("missing_media", "outside", "bad_media") it cannot be used.
            DataError: there is no folder that paths start in.
        """
        if isinstance(item, str) and not is_url(item):
            path = self._path(item, is_typed)
            if not path.is_file():
                self._check_root()
                raise BadRecord("missing_media", f"media file {path} does not exist")
        elif not isinstance(item, str | bytes | Held):
            raise BadRecord("bad_media", f"a media column holds {type(item).__name__} {str(item)[:60]!r}")

    def read(self, item: str | bytes, is_typed: bool) -> tuple[bytes, str]:
        """Read an image or video, and check its header.

        Args:
            item: the bytes, a path or a URL.
            is_typed: the path comes from the data set's builder, not from a record.

        Returns:
            The bytes, and the extension of their format.

        Raises:
            BadRecord: it cannot be read, or is no image and no video.
        """
        data = item if isinstance(item, bytes) else self._load(item, is_typed)
        named = "" if isinstance(item, bytes) else f"{shown_url(item) if is_url(item) else item}: "
        extension = sniff_format(data)
        if extension is None:
            raise BadRecord("bad_media", f"{named}no image or video, but {describe_content(data)}")
        check_media(named, extension, data, self._verify_images)
        return data, extension

    def _load(self, item: str, is_typed: bool) -> bytes:
        if is_url(item):
            return self._fetcher.fetch(item)
        path = self._path(item, is_typed)
        try:
            if path.stat().st_size > self._max_bytes:
                raise BadRecord("bad_media", f"{path}: more than {self._max_bytes} bytes (--max-media-size)")
            return self._root.read(path)
        except (FileNotFoundError, NotADirectoryError) as error:
            self._check_root()
            raise BadRecord("missing_media", f"media file {path} does not exist") from error
        except SkipSample as error:
            raise BadRecord("missing_media", error.message) from error

    def _path(self, item: str, is_typed: bool) -> Path:
        is_own = is_typed and (os.path.isabs(item) or self._root.root is None)  # noqa: PTH117 - once per media item
        try:
            return self._own.resolve_own(item) if is_own else self._root.resolve(item)
        except OutsideRoot as error:
            raise BadRecord("outside", error.message) from error
        except SkipSample as error:
            raise BadRecord("missing_media", error.message) from error
        except DataError as error:
            if not is_own and self._root.root is None:
                raise  # there is no folder, for any record
            raise BadRecord("outside", str(error)) from error

    def _check_root(self) -> None:
        if self._root.root is not None and not self._root.root.is_dir():
            raise DataError(
                f"--media-root {self._root.root} does not exist; set it to the folder that the paths start in"
            )


def check_media(where: str, extension: str, data: bytes, verify_images: bool) -> None:
    """Check the header of an image or video; with `verify_images` decode an image.

    Raises:
        BadRecord: ("bad_media") it cannot be read.
    """
    if member_kind(extension) == "image":
        if probe_image(data) is None:
            raise BadRecord("bad_media", f"{where}the header of the {extension} image cannot be read")
        if verify_images:
            try:
                decode_image(data)
            except SkipSample as error:
                raise BadRecord("bad_media", f"{where}{error.message}") from error
    elif probe_video(data) is None:
        raise BadRecord("bad_media", f"{where}the header of the {extension} video cannot be read")
