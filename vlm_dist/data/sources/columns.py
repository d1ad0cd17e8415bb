"""What all sources share: their settings, their names and their column names."""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Protocol
from urllib.parse import urlsplit

from vlm_dist.data.index.members import ANY_OF, alternatives, is_numbered
from vlm_dist.errors import DataError

_MAX_CHOICES = 256


class SourceSettings(Protocol):
    """An entry of `data.train` or `data.eval`; `vlm_dist.config` has the schema."""

    @property
    def type(self) -> str:
        """Return tar, hf or jsonl."""


class ColumnNames:
    """Renames columns as the `columns: {new: own}` setting says; the others keep their names.

    A name may also stand for several columns, of which a sample's first counts: `jpg;png`, or the columns of `any_of`.
    Of those that are numbered (`image_000.jpg`, …) all that a sample has make a list.

    Args:
        where: names the source in errors.
        own: the columns that the data has.
        renames: new name -> own name.
        any_of: further columns -> the own columns that they may mean.

    Raises:
        DataError: if the data has no such column.
    """

    def __init__(
        self,
        where: str,
        own: Sequence[str],
        renames: Mapping[str, str] | None,
        any_of: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        self._renames = dict(renames or {})
        self._own = frozenset(own)
        self._any_of = {name: tuple(parts) for name, parts in (any_of or {}).items()}
        self._numbered = frozenset(filter(is_numbered, self._own))
        own = [*own, *self._any_of]
        chosen = {old: alternatives(old) for old in self._renames.values() if ANY_OF in old and old not in own}
        self._any_of |= {old: parts for old, parts in chosen.items() if self._own.intersection(parts)}
        unknown = sorted({old for old in self._renames.values() if old not in own and old not in self._any_of})
        if unknown:
            raise DataError(
                f"{where}: columns maps to {', '.join(map(repr, unknown))}, which the data does not have; "
                f"it has: {', '.join(own)}"
            )
        self._taken = {*self._renames.values(), *itertools.chain.from_iterable(chosen.values())}
        kept = [name for name in own if name not in self._taken and name not in self._renames]
        self.names: tuple[str, ...] = (*kept, *self._renames)
        self._used: frozenset[str] | None = None
        self._chosen: dict[tuple[str, ...], tuple[tuple[str, str | tuple[str, ...]], ...]] = {}

    def keep(self, used: Collection[str]) -> None:
        """Leave all other columns unread, though `names` still lists them; `used` has names after renaming."""
        self.declare(used)
        self._used = frozenset(used)
        self._chosen = {}

    def declare(self, wanted: Collection[str]) -> None:
        """Add the columns among these that are alternatives (`jpg;png`), where the data has one of them."""
        for name in wanted:
            if ANY_OF in name and name not in self.names and self._own.intersection(alternatives(name)):
                self._any_of[name] = alternatives(name)
                self._chosen = {}
                self.names = (*self.names, name)

    def is_kept(self, own: str) -> bool:
        """Whether a column, by its own name, has to be read."""
        if self._used is None:
            return True
        wanted = self._wanted(self._used)
        return own in wanted or any(own in self._any_of.get(name, ()) for name in wanted)

    def keeps_any_but(self, others: Collection[str]) -> bool:
        """Whether a column that is none of these, by its own name, has to be read."""
        if self._used is None:
            return True
        wanted = itertools.chain.from_iterable(self._any_of.get(name, (name,)) for name in self._wanted(self._used))
        return not set(wanted) <= set(others)

    def apply(self, fields: dict[str, Any]) -> dict[str, Any]:
        """Rename the fields of one sample; a field that the sample lacks stays absent."""
        if not self._renames and not self._any_of and self._used is None:
            return fields
        present = tuple(fields)
        chosen = self._chosen.get(present)
        if chosen is None:
            chosen = self._choose(present)
            if len(self._chosen) < _MAX_CHOICES:  # JSON may have any keys
                self._chosen[present] = chosen
        return {name: fields[own] if isinstance(own, str) else [fields[part] for part in own] for name, own in chosen}

    def _choose(self, present: tuple[str, ...]) -> tuple[tuple[str, str | tuple[str, ...]], ...]:
        """List what is given out of a sample with these columns: (new name, own name, or those of a list)."""
        chosen: dict[str, str | tuple[str, ...]] = {}
        for own in present:
            chosen.update(dict.fromkeys(self._outputs(own), own))
        for column, parts in self._any_of.items():
            having = tuple(part for part in parts if part in present)
            if having:
                value = having if having[0] in self._numbered else having[0]
                chosen.update(dict.fromkeys(self._outputs(column), value))
        return tuple(chosen.items())

    def _outputs(self, column: str) -> Iterator[str]:
        """Yield the names under which a column is given out."""
        names = [new for new, old in self._renames.items() if old == column]
        if column not in self._taken and column not in self._renames:
            names.append(column)
        return (name for name in names if self._used is None or name in self._used)

    def _wanted(self, used: Collection[str]) -> set[str]:
        """Own names of the columns that are used."""
        return {self._renames.get(name, name) for name in used}


def setting(settings: SourceSettings, name: str, default: Any = None) -> Any:
    """Read an optional setting."""
    value = getattr(settings, name, None)
    return default if value is None else value


def source_name(settings: SourceSettings, path: str) -> str:
    """Name a source for people: its `name`, or the last part of its path that is no pattern."""
    name = setting(settings, "name")
    if name is not None:
        return str(name)
    if path.startswith("pipe:"):
        return "pipe"
    if "://" in path:  # the server's name, where there is no other; never what stands before it, nor a signature
        url = urlsplit(path)
        path = url.path if url.path.strip("/") else f"{url.hostname}."
    parts = [part for part in path.split("/") if part and not set(part) & set("*?[]{}")]
    return parts[-1].rsplit(".", 1)[0] if parts and parts[-1] not in (".", "..") else str(settings.type)


def build_command(settings: SourceSettings, path: str | None = None) -> str:
    """Write the command that makes shards of what a setting means, for messages.

    Args:
        settings: of the source.
        path: of its records; None is that of the settings.
    """
    values = {
        "--from": settings.type,
        "--path": path or setting(settings, "path"),
        "--name": setting(settings, "name") if path is None and setting(settings, "path") is None else None,
        "--split": setting(settings, "split"),
        "--media-root": setting(settings, "media_root"),
    }
    given = " ".join(f"{option} {shlex.quote(str(value))}" for option, value in values.items() if value is not None)
    return f"vlm-dist shards build {given} --out DIRECTORY"
