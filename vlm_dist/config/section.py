"""What all schemas share: a strict, frozen base, and the field types that pydantic has no word for."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

_BYTE_SIZE = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*((?:[kmgt]i?)?b|)\s*$", re.IGNORECASE)
_BYTES_OF: dict[str, int] = {
    unit + ending: base**power
    for power, unit in enumerate(("", "K", "M", "G", "T"))
    for ending, base in (("B", 1000), ("IB", 1024))
    if unit or ending == "B"
}


class Section(BaseModel):
    """A mapping in a config file. Unknown keys and wrong types are errors; values cannot be changed once read."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        protected_namespaces=(),
        defer_build=True,  # the launcher and `vlm-dist --help` import the schemas without ever validating
    )

    #: Keys that people know from elsewhere and that do not exist here -> what to do instead.
    foreign_keys: ClassVar[dict[str, str]] = {}

    @model_validator(mode="before")
    @classmethod
    def _empty_mapping(cls, value: Any) -> Any:
        """A heading whose keys are all commented out reads as null: nothing given, all defaults."""
        return {} if value is None else value


def expected(what: str) -> PydanticCustomError:
    """The error of a value that is not what the field wants; the report adds what it got."""
    return PydanticCustomError("expected", "expected {expected}", {"expected": what})


def not_yet_supported(*values: Any, instead: str) -> AfterValidator:
    """Refuses values that are part of the schema, but whose effect is not built yet.

    Args:
        values: the refused ones.
        instead: what to write for now.
    """

    def refuse(value: Any) -> Any:
        if value in values:
            raise PydanticCustomError("not_yet_supported", "not yet supported; {instead}", {"instead": instead})
        return value

    return AfterValidator(refuse)


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _check_interval(value: float) -> float:
    if value >= 1 and value != int(value):
        raise expected("a whole number of steps, or a share of all steps below 1")
    return int(value) if value >= 1 else value


def _check_pattern(value: str) -> str:
    try:
        re.compile(value)
    except re.error as error:
        raise expected(f"a regular expression, a list of names or all-linear ({error})") from error
    return value


def _read_pattern_or_names(value: Any) -> Any:
    if isinstance(value, str) and value:
        return _check_pattern(value)
    if isinstance(value, list | tuple) and value and all(isinstance(name, str) and name for name in value):
        return tuple(value)
    raise expected("all-linear, a list of module names, or a regular expression")


def num_bytes(size: str) -> int:
    """Return the bytes that a size such as `200GB` means.

    Raises:
        ValueError: it is no such size.
    """
    match = _BYTE_SIZE.match(size)
    if match is None:
        raise ValueError(size)
    number, unit = match.groups()
    return round(float(number) * _BYTES_OF[unit.upper() or "B"])


def _check_byte_size(value: Any) -> Any:
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return f"{value}B"
    if isinstance(value, str) and _BYTE_SIZE.match(value) and num_bytes(value) > 0:
        return value
    raise expected("a size such as 200GB or 500GiB")


def read_path(value: Any) -> Any:
    """Text to a path; `~` is the home directory. The empty text is no path."""
    if isinstance(value, str) and value.strip():
        return Path(value).expanduser()
    if isinstance(value, Path):
        return value
    raise expected("a path")


#: A path, relative to the working directory unless it says otherwise.
PathField = Annotated[Path, BeforeValidator(read_path)]

#: `200GB` (powers of 1000) or `500GiB` (powers of 1024); a number is bytes. `num_bytes` reads it.
ByteSize = Annotated[str, BeforeValidator(_check_byte_size)]

#: Text that is not empty.
Name = Annotated[str, Field(min_length=1)]

#: Any YAML list.
Names = Annotated[tuple[Name, ...], BeforeValidator(_as_tuple)]

#: Steps: 0 is never, below 1 is a share of all steps, from 1 on a whole number of steps.
Interval = Annotated[float, Field(ge=0), AfterValidator(_check_interval)]

#: A number above 0, and an integer from 1 on.
PositiveNumber = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]

#: `all-linear`, module names, or a regular expression over full module names.
ModulePattern = Annotated[str | tuple[str, ...], BeforeValidator(_read_pattern_or_names)]

#: Converts a YAML list, for `Annotated[tuple[X, ...], AS_TUPLE]`.
AS_TUPLE = BeforeValidator(_as_tuple)
