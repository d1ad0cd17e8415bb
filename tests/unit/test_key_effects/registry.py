"""Which test shows the effect of which key: `@shows("train.weight_decay")` on a test says that it does.

`test_every_key_has_an_effect.py` walks the schemas and misses no key.
"""

from __future__ import annotations

import typing
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from vlm_dist.config import SECTIONS
from vlm_dist.config.section import Section

F = TypeVar("F", bound=Callable[..., Any])

#: Key -> the tests that show its effect.
SHOWN: dict[str, list[str]] = {}


def shows(*keys: str) -> Callable[[F], F]:
    """Say that a test fails if one of these keys has no effect."""

    def register(test: F) -> F:
        assert test.__name__.startswith("test_"), f"{test.__name__} is not collected"
        for key in keys:
            SHOWN.setdefault(key, []).append(f"{test.__module__}::{test.__name__}")
        return test

    return register


def all_keys() -> list[str]:
    """Every key of every file; `[]` are the items of a list, `*` keys that the user may add."""
    return [key for name, schema in SECTIONS.items() for key in _keys(schema, name)]


def _keys(schema: type[Section], prefix: str) -> Iterator[str]:
    for name, field in schema.model_fields.items():
        yield from _of_type(field.annotation, f"{prefix}.{name}")
    if schema.model_config.get("extra") == "allow":
        yield f"{prefix}.*"


def _of_type(annotation: Any, key: str) -> Iterator[str]:
    """The keys below a field, or the field itself where it has no section inside."""
    arguments = [one for one in typing.get_args(annotation) if one not in (type(None), Ellipsis)]
    origin = typing.get_origin(annotation)
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield from _keys(annotation, key)
    elif origin is tuple and _has_section(arguments[0]):
        yield from _of_type(arguments[0], f"{key}[]")
    elif origin is dict and _has_section(arguments[1]):
        yield from _of_type(arguments[1], f"{key}.*")
    elif len(arguments) == 1 and _has_section(arguments[0]):  # Section | None, Annotated[Section, ...]
        yield from _of_type(arguments[0], key)
    else:
        yield key


def _has_section(annotation: Any) -> bool:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return True
    return any(_has_section(one) for one in typing.get_args(annotation))
