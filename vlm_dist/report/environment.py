"""Where each start of a run took place, as rows of a table; whatever is missing or damaged is left out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from vlm_dist.report.happenings import clock_time
from vlm_dist.report.lines import as_number, parse_time

_FACTS = {
    "command": "command",
    "working_directory": "working directory",
    "commit": "commit",
    "platform": "platform",
    "cuda": "CUDA of torch",
}


@dataclass(frozen=True)
class LifeView:
    """One start.

    Attributes:
        title: which one, when and where.
        facts: names and values.
        versions: packages and their versions.
    """

    title: str
    facts: list[tuple[str, str]]
    versions: list[tuple[str, str]]


def describe_life(life: Mapping[str, Any], number: int) -> LifeView:
    """A start for people.

    Args:
        life: an entry of environment.json.
        number: its place there, from 1.
    """
    size = life.get("world_size")
    title = [f"start {life.get('life', number)}"]
    if type(life.get("step")) is int:
        title.append(f"at step {life['step']:,}")
    title.append(f"on {clock_time(parse_time(life.get('time')))} UTC")
    if type(size) is int:
        title.append(f"with {size} rank{'' if size == 1 else 's'}")
    if life.get("host"):
        title.append(f"from {life['host']}")
    facts = [(label, str(life[name])) for name, label in _FACTS.items() if life.get(name)]
    for group in life.get("devices") or () if isinstance(life.get("devices"), list) else ():
        if isinstance(group, Mapping):
            facts.append(_device(group))
    job = life.get("job")
    facts += [(str(name), str(value)) for name, value in job.items()] if isinstance(job, Mapping) else []
    packages = life.get("versions")
    versions = [(str(name), str(value)) for name, value in packages.items()] if isinstance(packages, Mapping) else []
    return LifeView(" ".join(title), facts, versions)


def _device(group: Mapping[str, Any]) -> tuple[str, str]:
    memory = as_number(group.get("device_memory_bytes"))
    size = f", {memory / 2**30:.1f} GiB" if memory is not None else ""
    ranks = group.get("ranks")
    numbers = describe_ranks(ranks) if isinstance(ranks, list) else "?"
    return (
        f"rank{'s' if numbers != '0' else ''} {numbers}",
        f"{group.get('device', '?')}{size} on {group.get('host', '?')}",
    )


def describe_ranks(ranks: Iterable[object]) -> str:
    """Numbers as ranges: 0-3, 8."""
    numbers = sorted({one for one in ranks if type(one) is int})
    parts: list[str] = []
    first = None
    for number, following in zip(numbers, [*numbers[1:], None], strict=False):
        first = number if first is None else first
        if following != number + 1:
            parts.append(str(number) if first == number else f"{first}-{number}")
            first = None
    return ", ".join(parts)
