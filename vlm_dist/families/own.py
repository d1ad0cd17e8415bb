"""A user's own row: what she says of her model in `model_classes`, on top of the row that fits best."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Mapping
from typing import Any

from pydantic import TypeAdapter, ValidationError

from vlm_dist.errors import ConfigError
from vlm_dist.families.family import Family
from vlm_dist.families.table import FAMILIES, GENERIC, family_for

#: Key that names the row to start from.
_LIKE = "like"
_FIELD = re.compile(r"\{\w*\}")
_FACTS = {fact.name for fact in dataclasses.fields(Family)} - {"name", "model_types", "processors"}


def choose_family(own: str | Mapping[str, Any] | None, where: str, model_type: str, processor: str) -> Family:
    """Find or make the row of a model.

    Args:
        own: `family` of its entry in `model_classes`: the name of a row, or facts of `Family` by name, with `like` for
            the row that has the others; None: by its type.
        where: the entry, for messages.
        model_type: of config.json.
        processor: name of the processor's class.

    Raises:
        ConfigError: no such row or fact, or a fact has a value that it cannot have.
    """
    if own is None:
        return family_for(model_type, processor)
    if isinstance(own, str):
        return _row(own, where)
    facts = dict(own)
    base = _row(facts.pop(_LIKE), where) if _LIKE in facts else family_for(model_type, processor)
    for name in facts:
        if name not in _FACTS:
            raise ConfigError(f"{where}.family: there is no {name!r}{_nearest(name, {*_FACTS, _LIKE})}")
    for name in ("image_marker", "video_marker"):
        unknown = set(_FIELD.findall(str(facts.get(name) or ""))) - {"{n}"}
        if unknown:
            raise ConfigError(
                f"{where}.family.{name}: got {facts[name]!r}: {min(unknown)} means nothing; {{n}} is the number of the "
                "image, from 1"
            )
    try:
        values = {**{fact.name: getattr(base, fact.name) for fact in dataclasses.fields(Family)}, **facts}
        return TypeAdapter(Family).validate_python({**values, "name": f"{base.name} with own facts"})
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        wanted = "expected a list" if first["type"] == "tuple_type" else first["msg"]
        raise ConfigError(f"{where}.family.{place}: got {first['input']!r}: {wanted}") from error


def _row(name: Any, where: str) -> Family:
    rows = {family.name: family for family in (*FAMILIES, GENERIC)}
    if name in rows:
        return rows[name]
    raise ConfigError(
        f"{where}.family: there is no family {name!r}{_nearest(str(name), rows)}; there are {', '.join(sorted(rows))}"
    )


def _nearest(name: str, known: Any) -> str:
    nearest = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {nearest[0]!r}?" if nearest else ""
