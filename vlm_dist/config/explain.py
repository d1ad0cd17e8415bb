"""From pydantic's errors to sentences: got X, expected Y; did you mean Z."""

from __future__ import annotations

import difflib
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import yaml
from pydantic import ValidationError

from vlm_dist.config.masking import masked
from vlm_dist.config.section import Section
from vlm_dist.config.yaml_document import KeyPath

_EXPECTED: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "bool_type": lambda c: "true or false",
    "int_type": lambda c: "a whole number",
    "int_from_float": lambda c: "a whole number",
    "float_type": lambda c: "a number",
    "finite_number": lambda c: "a finite number",
    "string_type": lambda c: "text",
    "string_too_short": lambda c: "text that is not empty",
    "tuple_type": lambda c: "a list",
    "list_type": lambda c: "a list",
    "dict_type": lambda c: "a mapping (key: value)",
    "model_type": lambda c: "a mapping (key: value)",
    "too_short": lambda c: "at least one item",
    "greater_than": lambda c: f"a number greater than {c['gt']:g}",
    "greater_than_equal": lambda c: f"a number of at least {c['ge']:g}",
    "less_than": lambda c: f"a number less than {c['lt']:g}",
    "less_than_equal": lambda c: f"a number of at most {c['le']:g}",
    "literal_error": lambda c: str(c["expected"]).replace("'", ""),
    "expected": lambda c: str(c["expected"]),
}


def explain(
    error: ValidationError, schema: type[Section], sections: Mapping[str, type[Section]]
) -> list[tuple[KeyPath, str]]:
    """What is wrong, by the path of each value.

    Args:
        error: raised by `schema`.
        schema: that refused the values.
        sections: all schemas, to find a key that stands in the wrong file.
    """
    found: dict[KeyPath, str] = {}
    for item in error.errors(include_url=False):
        path, message = _explain_one(cast(Mapping[str, Any], item), schema, sections)
        found.setdefault(path, message)  # the branches of a union say the same of one value
    return list(found.items())


def describe(value: Any) -> str:
    """A value as the user wrote it, and its kind where that is what matters."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str):
        return f"{_shorten(masked(value))!r} (text)"
    if isinstance(value, int | float):
        return str(value)
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}" if value else "an empty list"
    if isinstance(value, dict):
        return "a mapping"
    return f"{value} (a {type(value).__name__})"


def nearest(word: str, choices: list[str], cutoff: float = 0.6) -> str | None:
    """The choice that the word was probably meant to be, capitals apart."""
    lowered = {choice.lower(): choice for choice in choices}
    matches = difflib.get_close_matches(word.lower(), list(lowered), n=1, cutoff=cutoff)
    return lowered[matches[0]] if matches else None


def _explain_one(
    item: Mapping[str, Any], schema: type[Section], sections: Mapping[str, type[Section]]
) -> tuple[KeyPath, str]:
    kind, context, got = str(item["type"]), item.get("ctx", {}), item["input"]
    path = _known_path(schema, tuple(item["loc"]))
    if kind == "extra_forbidden":
        return path, _unknown_key(path, schema, sections)
    if kind == "missing":
        parent = section_at(schema, path[:-1])
        choices = typing.get_args(_inner(parent, path[-1])) if parent else ()
        return path, "is missing, expected " + (" or ".join(map(str, choices)) if choices else "text")
    if kind == "not_yet_supported":
        return path, f"got {describe(got)}: {item['msg']}"
    wanted = _EXPECTED.get(kind, lambda _: f"something else ({item['msg']})")(context)
    return path, f"got {describe(got)}, expected {wanted}{_hint(kind, got, wanted)}"


def section_at(schema: type[Section], path: KeyPath) -> type[Section] | None:
    """The schema of the mapping at a path."""
    here: Any = schema
    for part in path:
        here = _inner(here, part)
    return here if _is_section(here) else None


def _known_path(schema: type[Section], location: KeyPath) -> KeyPath:
    """Cut what pydantic adds to a path: names of the branches of a union, and `[key]`."""
    here: Any = schema
    for depth, part in enumerate(location):
        inside = _is_section(here) or isinstance(part, int) or _container(here) is dict
        if not inside or part == "[key]":
            return location[:depth]
        here = _inner(here, part)
    return location


def _inner(annotation: Any, part: str | int) -> Any:
    """The type of a field, an item or a value of what is annotated; None where there is no such thing."""
    if _is_section(annotation):
        found = annotation.model_fields.get(str(part))
        inner = found.annotation if found else None
    elif (container := _find(annotation, _is_container)) is not None:
        arguments = typing.get_args(container)
        inner = arguments[1] if typing.get_origin(container) is dict else arguments[0]
    else:
        return None
    return _find(inner, _is_section) or inner


def _container(annotation: Any) -> Any:
    return typing.get_origin(_find(annotation, _is_container))


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Section)


def _is_container(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (tuple, dict, list)


def _find(annotation: Any, wanted: Callable[[Any], bool]) -> Any:
    """The first type that fits, looking into unions but not into containers."""
    if wanted(annotation):
        return annotation
    if _is_container(annotation) or typing.get_origin(annotation) is typing.Literal:
        return None
    return next((found for inner in typing.get_args(annotation) if (found := _find(inner, wanted)) is not None), None)


def leaves(sections: Mapping[str, type[Section]]) -> Iterator[tuple[str, KeyPath]]:
    """(name, path) of each key of all schemas, apart from those inside lists."""
    for name, schema in sections.items():
        for key in schema.model_fields:
            yield key, (name, key)
            inner = _inner(schema, key)
            if _is_section(inner):
                yield from ((leaf, (name, *path)) for leaf, path in leaves({key: inner}))


def suggest_key(word: str, siblings: list[str], sections: Mapping[str, type[Section]]) -> str:
    """`; did you mean …`, or the keys there are: first among the neighbours, then anywhere in the files."""
    everywhere: dict[str, str] = {}
    for leaf, path in leaves(sections):
        everywhere.setdefault(leaf, ".".join(map(str, path)))
    close = nearest(word, siblings, cutoff=0.75)
    if close is None and word in everywhere:
        return f"; did you mean {everywhere[word]}?"
    close = close or nearest(word, siblings)
    if close is not None:
        return f"; did you mean {close}?"
    elsewhere = nearest(word, list(everywhere), cutoff=0.85)
    if elsewhere is not None:
        return f"; did you mean {everywhere[elsewhere]}?"
    return f", expected one of {', '.join(siblings)}" if len(siblings) <= 12 else ""


def _unknown_key(path: KeyPath, schema: type[Section], sections: Mapping[str, type[Section]]) -> str:
    word = str(path[-1])
    parent = section_at(schema, path[:-1])
    if parent is None:
        return "got an unknown key"
    if word in parent.foreign_keys:
        advice = parent.foreign_keys[word]
        return advice if advice.startswith("not yet supported") else f"got a key that does not exist here: {advice}"
    return f"got an unknown key{suggest_key(word, list(parent.model_fields), sections)}"


def _hint(kind: str, got: Any, wanted: str) -> str:
    if isinstance(got, str) and kind in {"bool_type", "int_type", "float_type"}:
        plain = {"on": True, "off": False}.get(got.lower(), _plain_value(got))
        fits = isinstance(plain, bool) if kind == "bool_type" else isinstance(plain, int | float)
        return "; remove the quotes" if fits and isinstance(plain, bool) is (kind == "bool_type") else ""
    if kind == "string_type" and isinstance(got, int | float | dict):
        return "; put it in quotes"
    if isinstance(got, str) and kind in {"literal_error", "expected"}:
        close = nearest(got, [word.strip() for word in wanted.replace(" or ", ", ").split(",") if word.strip()])
        return f"; did you mean {close}?" if close else ""
    return ""


def _plain_value(text: str) -> Any:
    try:
        return float(text) if any(c.isdigit() for c in text) else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError):
        return text


def _shorten(text: str, limit: int = 60) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"
