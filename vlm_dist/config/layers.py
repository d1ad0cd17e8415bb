"""Values laid over each other (files, then the run file's overrides, then `--set`), each with where it was written."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from vlm_dist.config.yaml_document import KeyPath, Origin, dotted

_KEY_PART = re.compile(r'"(?P<quoted>[^"]+)"|\[(?P<index>\d+)\]|(?P<plain>[^."\[\]]+)')
_KEY = re.compile(r'(?:"[^"]+"|[^."\[\]]+)(?:\[\d+\]|\.(?:"[^"]+"|[^."\[\]]+))*')


class Layers:
    """A tree of values that remembers the origin of each of them.

    Mappings are merged key by key; anything else, lists included, is replaced as a whole.
    """

    def __init__(self) -> None:
        self.value: dict[str, Any] = {}
        self.origins: dict[KeyPath, Origin] = {}

    def lay(self, value: Any, origins: Mapping[KeyPath, Origin], at: KeyPath = ()) -> None:
        """Put a value on top.

        Args:
            value: plain YAML value; is copied.
            origins: where its parts were written, by their path inside `value`.
            at: where it belongs; what is missing on the way is made.

        Raises:
            KeyError: the way leads through a list by something that is no index of it; the message says so.
        """
        parent: Any = self.value
        for depth, part in enumerate(at[:-1]):
            parent = self._descend(parent, part, at[: depth + 1], origins.get((), Origin("")))
        if not at:
            self._merge(self.value, value, origins, (), ())
        else:
            part = self._part(parent, at[-1], at)
            self._lay_child(parent, part, value, origins, (*at[:-1], part), ())

    def locate(self, path: KeyPath) -> Origin | None:
        """Where a value was written, or the closest mapping around it; of the outermost one only the source."""
        for length in range(len(path), -1, -1):
            origin = self.origins.get(path[:length])
            if origin is not None:
                return origin if length > 1 or length == len(path) else Origin(origin.source)
        return None

    def _descend(self, parent: Any, part: str | int, path: KeyPath, origin: Origin) -> Any:
        key: Any = self._part(parent, part, path)
        child = parent[key] if isinstance(parent, list) else parent.get(key)
        if not isinstance(child, dict | list):
            child = parent[key] = {}
            self._forget(path)
            self.origins[path] = origin
        return child

    @staticmethod
    def _part(parent: Any, part: str | int, path: KeyPath) -> str | int:
        """An index where the parent is a list, else a key."""
        if not isinstance(parent, list):
            return str(part)
        if not str(part).isdigit() or int(part) >= len(parent):
            name = dotted(path[:-1])
            raise KeyError(f"{name} is a list of {len(parent)}, expected an index from 0 on, got {part}")
        return int(part)

    def _merge(
        self,
        target: dict[str, Any],
        value: Mapping[str, Any],
        origins: Mapping[KeyPath, Origin],
        path: KeyPath,
        inner: KeyPath,
    ) -> None:
        if inner in origins:
            self.origins.setdefault(path, origins[inner])
        for key, child in value.items():
            self._lay_child(target, key, child, origins, (*path, key), (*inner, key))

    def _lay_child(
        self, parent: Any, part: str | int, value: Any, origins: Mapping[KeyPath, Origin], path: KeyPath, inner: KeyPath
    ) -> None:
        present = isinstance(parent, list) or part in parent
        if isinstance(value, dict) and present and isinstance(parent[part], dict):
            self._merge(parent[part], value, origins, path, inner)
            return
        parent[part] = _copy(value)
        self._forget(path)
        for known, origin in origins.items():
            if known[: len(inner)] == inner:
                self.origins[path + known[len(inner) :]] = origin

    def _forget(self, path: KeyPath) -> None:
        for known in [known for known in self.origins if known[: len(path)] == path]:
            del self.origins[known]


def split_key(text: str) -> KeyPath | None:
    """The path that a `--set` names: `train.seed`, `data.train[0].path`, `model.model_classes."org/name-1.5"`."""
    if not _KEY.fullmatch(text):
        return None
    parts: list[str | int] = []
    for match in _KEY_PART.finditer(text):
        parts.append(int(match["index"]) if match["index"] else match["quoted"] or match["plain"])
    return tuple(parts)


def _copy(value: Any) -> Any:
    """The same tree with containers of its own: later layers change it in place."""
    if isinstance(value, dict):
        return {key: _copy(child) for key, child in value.items()}
    return [_copy(child) for child in value] if isinstance(value, list) else value
