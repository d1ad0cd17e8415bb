"""A bounded memory of what was used last."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

_K = TypeVar("_K")
_V = TypeVar("_V")


class Recent(Generic[_K, _V]):
    """Keeps the values that were used last; several threads may use it.

    Args:
        max_entries: how many are kept.
    """

    def __init__(self, max_entries: int) -> None:
        self.max_entries = max_entries
        self._values: OrderedDict[_K, _V] = OrderedDict()

    def __len__(self) -> int:
        return len(self._values)

    def find(self, key: _K) -> _V | None:
        """Return a value that is kept, without making it."""
        return self._values.get(key)

    def get(self, key: _K, make: Callable[[_K], _V]) -> _V:
        """Return a value; what is not kept is made."""
        values = self._values
        value = values.get(key)
        if value is None:
            value = values[key] = make(key)
            while len(values) > self.max_entries:
                self._forget_oldest()
            return value
        try:
            values.move_to_end(key)
        except KeyError:  # another thread has dropped it meanwhile
            values[key] = value
        return value

    def drop_where(self, is_stale: Callable[[_V], bool]) -> None:
        """Forget values that are of no use any more."""
        for key, value in list(self._values.items()):
            if is_stale(value):
                self._values.pop(key, None)

    def _forget_oldest(self) -> None:
        try:
            self._values.popitem(last=False)
        except KeyError:  # emptied by another thread
            return
