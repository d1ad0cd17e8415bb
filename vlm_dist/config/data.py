"""`data_config.yaml`: which samples are trained on, and which are held out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from vlm_dist.config.section import AS_TUPLE, Count, Name, PathField, PositiveNumber, Section, expected


def _read_data_files(value: Any) -> Any:
    def is_names(item: Any) -> bool:
        return isinstance(item, str) or (isinstance(item, list) and all(isinstance(name, str) for name in item))

    if value is None or is_names(value) or (isinstance(value, dict) and all(is_names(v) for v in value.values())):
        return value
    raise expected("a path, a list of paths, or a mapping of split to paths")


def _refuse_cache(value: Any) -> None:
    if value is not None:
        raise PydanticCustomError("not_yet_supported", "not yet supported; remove it (data is read in place)", {})


class DataSource(Section):
    """One set of samples. `tar` and `jsonl` need a path; `hf` a path (save_to_disk) or a name."""

    type: Literal["tar", "hf", "jsonl"]
    name: Name | None = None  # hf without path: the dataset's name; otherwise a label for reports
    path: Name | None = None  # tar: a directory, a file or a glob; jsonl: a file; hf: a save_to_disk directory
    split: Name | None = None
    data_files: Annotated[str | list[str] | dict[str, str | list[str]] | None, BeforeValidator(_read_data_files)] = None
    repeat: PositiveNumber = 1.0  # passes over this source in an epoch
    media_root: PathField | None = None  # where relative paths in media columns start
    columns: dict[str, Name] = Field(default_factory=dict)  # new name -> this source's own name
    max_samples: Count | None = None  # only the first so many


class DataConfig(Section):
    """Sources are mixed by `repeat`: an epoch is the sum of floor(repeat x samples) over the sources."""

    train: Annotated[tuple[DataSource, ...], AS_TUPLE] = ()
    eval: Annotated[tuple[DataSource, ...], AS_TUPLE] = ()
    index_dir: PathField = Path("runs/index")
    cache: Annotated[None, BeforeValidator(_refuse_cache)] = None
