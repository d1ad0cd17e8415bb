"""What a build is asked for, what it tells on its way, and what came out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from vlm_dist.errors import DataError

#: Settings that do not change the bytes of the shards, so that a resumed build may have others.
_WITHOUT_EFFECT = frozenset({"out", "overwrite", "resume", "workers", "timeout_seconds", "skip_bad"})


@dataclass(frozen=True, slots=True)
class BuildSettings:
    """A build.

    Attributes:
        type: where the records come from: hf (Hugging Face datasets), jsonl (JSON lines or a JSON list) or tar.
        out: directory of the shards.
        path: file, directory or glob of the records; None for a data set of the hub.
        name: of a data set of the hub.
        split: of a Hugging Face data set.
        streaming: read a Hugging Face data set from its first row to its last, without a local copy.
        media_root: folder that media paths start in; None is the folder of the records.
        prefix: names of the shards start with it.
        max_shard_bytes: a shard is closed when it has reached this size.
        max_samples: a shard is closed when it has this many samples.
        overwrite: replace shards of the same prefix.
        resume: go on where a stopped build of the same settings ended.
        shuffle: seed of the order of the samples; None keeps the order of the records.
        shuffle_buffer: records that a stream is shuffled among.
        limit: use only so many records, the first of the order.
        columns: new name -> own name of a column or member; all other settings use the new names.
        drop: columns or members to leave out.
        image_columns: columns of images; with `video_columns` the only media columns. Empty: found by their values.
        video_columns: columns of videos.
        messages_column: column of conversations; None finds it by its values.
        key_column: column that names the samples; None numbers them.
        skip_bad: leave out records that cannot be used, and write them to the report; otherwise they are an error.
        verify_images: decode every image, not its header alone.
        workers: threads that read, fetch and check media ahead of the writer.
        timeout_seconds: of one attempt to fetch a URL, without any progress.
        max_media_bytes: a file or download above this is bad.
    """

    type: Literal["hf", "jsonl", "tar"]
    out: Path
    path: str | None = None
    name: str | None = None
    split: str | None = None
    streaming: bool = False
    media_root: Path | None = None
    prefix: str = "shard"
    max_shard_bytes: int = 512 * 1024 * 1024
    max_samples: int = 10_000
    overwrite: bool = False
    resume: bool = False
    shuffle: int | None = None
    shuffle_buffer: int = 10_000
    limit: int | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    drop: tuple[str, ...] = ()
    image_columns: tuple[str, ...] = ()
    video_columns: tuple[str, ...] = ()
    messages_column: str | None = None
    key_column: str | None = None
    skip_bad: bool = False
    verify_images: bool = False
    workers: int = 4
    timeout_seconds: float = 30.0
    max_media_bytes: int = 1024 * 1024 * 1024

    def check(self) -> None:
        """Refuse what makes no sense, all at once.

        Raises:
            DataError: one line per problem.
        """
        problems = []
        if self.path is None and (self.type != "hf" or self.name is None):
            problems.append("give the records: --path (a file, directory or glob), or --from hf --name of a data set")
        if self.streaming and self.type != "hf":
            problems.append("--streaming is for --from hf; local files are read by number anyway")
        if self.streaming and self.resume:
            problems.append("--resume needs records that can be read by number; --streaming has none: leave one out")
        if self.overwrite and self.resume:
            problems.append("--resume keeps what is there, --overwrite replaces it: leave one out")
        if self.type == "tar":
            rows_only = ("media_root", "image_columns", "video_columns", "messages_column", "key_column")
            problems += [
                f"--{name.replace('_', '-')} is not for --from tar" for name in rows_only if getattr(self, name)
            ]
        for name in ("max_shard_bytes", "max_samples", "workers", "limit", "shuffle_buffer", "max_media_bytes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                problems.append(f"--{name.replace('_', '-').replace('-bytes', '-size')} must be positive, got {value}")
        if problems:
            raise DataError("\n".join(problems))

    @property
    def identity(self) -> dict[str, Any]:
        """What the bytes of the shards depend on, apart from the input's content."""
        values = {one.name: getattr(self, one.name) for one in fields(self) if one.name not in _WITHOUT_EFFECT}
        if self.media_root is not None:
            values["media_root"] = str(self.media_root.resolve())
        return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()} | {
            "columns": dict(self.columns)
        }


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a build is. `total` is None for a stream."""

    phase: Literal["checking", "writing"]
    done: int  # records
    total: int | None
    num_samples: int = 0
    num_skipped: int = 0
    num_shards: int = 0
    num_bytes: int = 0


@dataclass(frozen=True, slots=True)
class BuildSummary:
    """What a build has made, all shards of its prefix together."""

    num_shards: int
    num_samples: int
    num_bytes: int
    seconds: float
    skipped: Mapping[str, int]  # class -> number of records that were left out
    notices: tuple[str, ...]
    report: Path | None  # names the records that were left out
    config: str  # YAML for data_config.yaml and vlm_collator_config.yaml
