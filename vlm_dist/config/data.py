"""`data_config.yaml`: which samples are trained on, and which are held out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from vlm_dist.config.conditions import Where
from vlm_dist.config.section import AS_TUPLE, ByteSize, Count, Name, PathField, PositiveNumber, Section, expected


def _read_data_files(value: Any) -> Any:
    def is_names(item: Any) -> bool:
        return isinstance(item, str) or (isinstance(item, list) and all(isinstance(name, str) for name in item))

    if value is None or is_names(value) or (isinstance(value, dict) and all(is_names(v) for v in value.values())):
        return value
    raise expected("a path, a list of paths, or a mapping of split to paths")


def _read_paths(value: Any) -> Any:
    if value is None or (isinstance(value, str) and value):
        return value
    if isinstance(value, list) and value and all(isinstance(one, str) and one for one in value):
        return value
    raise expected("a path or URL, or a list of them")


class Subset(Section):
    """A random part of a source, the same in every run and epoch."""

    share: Annotated[float, Field(gt=0, le=1)] = 1.0
    seed: Annotated[int, Field(ge=0)] = 0  # another one chooses others


class DataSource(Section):
    """One set of samples. `tar` and `jsonl` need a path; `hf` a path (save_to_disk) or a name."""

    type: Literal["tar", "hf", "jsonl"]
    name: Name | None = None  # hf without path: the dataset's name; otherwise a label for reports
    # tar: a directory, a file, a glob, a URL (s3, gs, http), a pipe:, or a list of them; jsonl: a file; hf: a
    # save_to_disk directory
    path: Annotated[str | list[str] | None, BeforeValidator(_read_paths)] = None
    split: Name | None = None
    data_files: Annotated[str | list[str] | dict[str, str | list[str]] | None, BeforeValidator(_read_data_files)] = None
    repeat: PositiveNumber = 1.0  # passes over this source in an epoch
    weight: PositiveNumber | None = None  # in the place of repeat: share of an epoch, relative to the other sources
    media_root: PathField | None = None  # where relative paths in media columns start
    columns: dict[str, Name] = Field(default_factory=dict)  # new name -> this source's own name
    max_samples: Count | None = None  # only the first so many
    where: Where = Field(default_factory=dict)  # only samples that meet all conditions, out of those
    subset: Subset | None = None  # only a random share, out of those


class DataCache(Section):
    """Copies of shards on this machine."""

    dir: PathField | None = None  # on a disk of the node; null: a folder of this user in the temporary directory
    max_size: ByteSize = "200GB"  # of all copies of a node; what was not used for longest goes first
    mode: Literal["auto", "whole", "range"] = "auto"  # copy shards; read samples over the network; or both
    lookahead_steps: Count = 64  # a shard is fetched so many steps before it is needed
    stage_files: bool = False  # also of shards in files: those of a file system that nodes share


class DataConfig(Section):
    """Sources are mixed by `repeat`: an epoch is the sum of floor(repeat x samples) over the sources."""

    train: Annotated[tuple[DataSource, ...], AS_TUPLE] = ()
    eval: Annotated[tuple[DataSource, ...], AS_TUPLE] = ()
    index_dir: PathField = Path("runs/index")
    lengths: Literal["auto", "exact", "estimate"] = "auto"  # of samples, for batches of like length and for packs
    cache: DataCache = Field(default_factory=DataCache)
    sample_timeout_seconds: Annotated[float, Field(gt=0, le=180)] = 60.0  # to decode one sample; reading is not counted
    worker_memory_gib: PositiveNumber | None = 4.0  # a worker that grows beyond it is replaced; null: never
    max_bad_share: Annotated[float, Field(ge=0, le=1)] = 0.05  # of the last 1000 samples of all ranks; 1: no limit
