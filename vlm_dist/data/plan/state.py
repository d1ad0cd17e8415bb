"""What must be the same for a run to go on where it stopped, and what is said when it is not."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

from vlm_dist.errors import CheckpointError

_MAX_STATE_BYTES = 1000

_ABOUT_LENGTHS = (
    "    (lengths follow from the processor, the chat template, vlm_collator_config.yaml, data.lengths, and the "
    "versions of transformers, tokenizers and pillow)"
)

_PUT_BACK = "put these files back as they were (or the values of data.train, if those were changed)"
_OR_DATA = " (or the data itself, where only its contents have changed)"
_BEGIN_ANEW = (
    "or start a new run, in another train.output_dir, from what has been learned (peft.adapter: the checkpoint's "
    "directory)"
)

Identity = dict[str, Any]


def digest_of(value: Any) -> str:
    """Hex digest of a JSON-like value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


def bounded(state: dict[str, Any]) -> dict[str, Any]:
    """Shorten a state that would be above 1 KB of JSON: its sources become a digest."""
    if len(json.dumps(state).encode()) > _MAX_STATE_BYTES:
        state["sources"] = digest_of(state["sources"])
    return state


def check_same(
    saved: Mapping[str, Any], own: Identity, changed_files: Callable[[], Mapping[int, list[str]]] = dict
) -> None:
    """Compare a saved state with this run's identity.

    Args:
        saved: state.
        own: of this run.
        changed_files: finds out which files of each source have changed, as far as that is known.

    Raises:
        CheckpointError: naming everything that has changed.
    """
    if saved.get("digest") == digest_of(own):
        return
    sources = own["sources"] if isinstance(saved.get("sources"), list) else digest_of(own["sources"])
    changes = [
        f"  {name}: checkpoint {_shown(saved.get(name))}, now {_shown(value)}"
        for name, value in own.items()
        if name != "sources" and saved.get(name) != value
    ]
    if "lengths" in own and saved.get("lengths") != own["lengths"]:
        changes.append(_ABOUT_LENGTHS)
    files = changed_files()
    values = [name for name in own if name != "sources" and saved.get(name) != own[name]]
    has_other_values = bool(values) and (not files or values != ["lengths"])  # lengths follow from the files, too
    changes += _source_changes(saved.get("sources"), sources, files, [row[0] for row in own["sources"]])
    advice = [_PUT_BACK] if files else []
    if has_other_values or not files:
        advice.append("restore the values of the checkpoint" + ("" if files else _OR_DATA))
    raise CheckpointError(
        "the checkpoint's data order is not this run's; it cannot be continued exactly:\n"
        + "\n".join(changes or [f"  digest: checkpoint {saved.get('digest')}, now {digest_of(own)}"])
        + f"\n{' and '.join(advice)}; {_BEGIN_ANEW}"
    )


def _shown(value: Any) -> str:
    return "nothing" if value is None else json.dumps(value, ensure_ascii=False)


def _source_changes(before: Any, now: Any, files: Mapping[int, list[str]], names: list[str]) -> list[str]:
    """List how the sources differ, one line each, and under it which of its files do."""
    if not isinstance(before, list):
        if before == now:
            return []
        changes = ["  sources: their names, sizes, repeats or contents have changed"]
        for i, lines in files.items():
            changes += [f"  source {i} ({names[i]}):", *(f"    {line}" for line in lines)]
        return changes
    changes = []
    for i in range(max(len(before), len(now))):
        old, new = (rows[i] if i < len(rows) else None for rows in (before, now))
        if old == new:
            continue
        if old is None or new is None:
            changes.append(f"  source {i}: checkpoint {old and old[0]}, now {new and new[0]}")
            continue
        parts = [
            f"{what} {_shown(a)} -> {_shown(b)}"
            for what, a, b in zip(("name", "samples", "repeat", "contents"), old, new, strict=False)
            if a != b
        ]
        changes.append(f"  source {i} ({new[0]}): {', '.join(parts)}")
        changes += [f"    {line}" for line in files.get(i, ())]
    return changes
