"""What all sources share: their settings, their names and their column names."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol

from vlm_dist.errors import DataError


class SourceSettings(Protocol):
    """An entry of `data.train` or `data.eval`; `vlm_dist.config` has the schema."""

    @property
    def type(self) -> str:
        """Return tar, hf or jsonl."""


class ColumnNames:
    """Renames columns as the `columns: {new: own}` setting says; the others keep their names.

    Args:
        where: names the source in errors.
        own: the columns that the data has.
        renames: new name -> own name.

    Raises:
        DataError: if the data has no such column.
    """

    def __init__(self, where: str, own: Sequence[str], renames: Mapping[str, str] | None) -> None:
        self._renames = dict(renames or {})
        unknown = sorted({old for old in self._renames.values() if old not in own})
        if unknown:
            raise DataError(
                f"{where}: columns maps to {', '.join(map(repr, unknown))}, which the data does not have; "
                f"it has: {', '.join(own)}"
            )
        taken = set(self._renames.values())
        kept = [name for name in own if name not in taken and name not in self._renames]
        self.names: tuple[str, ...] = (*kept, *self._renames)
        self._used: frozenset[str] | None = None

    def keep(self, used: Collection[str]) -> None:
        """Leave all other columns unread, though `names` still lists them; `used` has names after renaming."""
        self._used = frozenset(used)

    def is_kept(self, own: str) -> bool:
        """Whether a column, by its own name, has to be read."""
        return self._used is None or any(self._renames.get(name, name) == own for name in self._used)

    def apply(self, fields: dict[str, Any]) -> dict[str, Any]:
        """Rename the fields of one sample; a field that the sample lacks stays absent."""
        if self._used is not None:
            fields = {name: value for name, value in fields.items() if self.is_kept(name)}
        if not self._renames:
            return fields
        renamed = {new: fields[old] for new, old in self._renames.items() if old in fields}
        taken = set(self._renames.values())
        kept = {name: value for name, value in fields.items() if name not in taken and name not in self._renames}
        return {**kept, **renamed}


def setting(settings: SourceSettings, name: str, default: Any = None) -> Any:
    """Read an optional setting."""
    value = getattr(settings, name, None)
    return default if value is None else value


def source_name(settings: SourceSettings, path: str) -> str:
    """Name a source for people: its `name`, or the last part of its path that is no pattern."""
    name = setting(settings, "name")
    if name is not None:
        return str(name)
    parts = [part for part in path.split("/") if part and not set(part) & set("*?[]{}")]
    return parts[-1].rsplit(".", 1)[0] if parts and parts[-1] not in (".", "..") else str(settings.type)
