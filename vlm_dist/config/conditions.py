"""Conditions on a sample, as `where` in data_config.yaml writes them: `{image_width: ">= 224", language: "== en"}`."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BeforeValidator

from vlm_dist.config.section import expected

_OPERATORS: Mapping[str, Callable[[Any, Any], Any]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    "<": operator.lt,
}
_CONDITION = re.compile(r"\s*(>=|<=|==|!=|>|<)\s*(.*?)\s*$", re.DOTALL)
_EXAMPLES = 'a condition such as ">= 224", "< 60", "!= 0" or "== en", or a list of them that must all hold'


@dataclass(frozen=True, slots=True)
class Condition:
    """One comparison: what stands on its left is a sample's value.

    Attributes:
        column: of the sample.
        sign: of `>= <= == != > <`.
        value: a number, or a text for == and !=.
    """

    column: str
    sign: str
    value: float | str

    def holds(self, values: Any) -> Any:
        """Compare one value, or an array of numbers, which gives an array."""
        return _OPERATORS[self.sign](values, self.value)

    def holds_for(self, value: Any) -> bool:
        """Compare whatever a sample has; what is missing or of another kind does not meet a condition."""
        if isinstance(value, bool):
            value = str(value).lower()  # as YAML and JSON write it
        if isinstance(self.value, str) and isinstance(value, str):
            return bool(self.holds(value))
        if isinstance(self.value, str) or isinstance(value, str):
            return self._holds_mixed(value)
        return isinstance(value, int | float) and bool(self.holds(value))

    def _holds_mixed(self, value: Any) -> bool:
        """A number that data hold as text still compares as a number."""
        if not isinstance(value, str):
            return False
        try:
            return bool(self.holds(float(value)))
        except ValueError:
            return self.sign == "!="

    def __str__(self) -> str:
        return (
            f"{self.column} {self.sign} {self.value:g}"
            if isinstance(self.value, float)
            else f"{self.column} {self.sign} {self.value}"
        )


def parse_conditions(where: Mapping[str, Any]) -> tuple[Condition, ...]:
    """Read a `where`.

    Raises:
        PydanticCustomError: a condition cannot be understood.
    """
    conditions = []
    for column, given in where.items():
        for one in given if isinstance(given, list | tuple) else [given]:
            conditions.append(_parse(column, one))
    return tuple(conditions)


def _parse(column: str, given: Any) -> Condition:
    match = _CONDITION.match(given) if isinstance(given, str) else None
    if match is None or not match.group(2):
        raise expected(_EXAMPLES)
    sign, text = match.groups()
    try:
        return Condition(column, sign, float(text))
    except ValueError:
        if sign not in ("==", "!="):
            raise expected(f"a number behind {sign} in the condition of {column}, not {text!r}") from None
        return Condition(column, sign, text.strip("'\""))


def _check(value: Any) -> Any:
    if not isinstance(value, dict) or not all(isinstance(column, str) and column for column in value):
        raise expected(f"a mapping of column to {_EXAMPLES}")
    parse_conditions(value)
    return value


#: Column -> condition, or several that must all hold.
Where = Annotated[dict[str, str | list[str]], BeforeValidator(_check)]
