"""What must be the same for a run to go on where it stopped, and what is said when it is not."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from vlm_dist.errors import CheckpointError

_MAX_STATE_BYTES = 1000

_ABOUT_LENGTHS = (
    "    (lengths follow from the processor, the chat template, vlm_collator_config.yaml, data.lengths, and the "
    "versions of transformers, tokenizers and pillow)"
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


def check_same(saved: Mapping[str, Any], own: Identity) -> None:
    """Compare a saved state with this run's identity.

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
    changes += _source_changes(saved.get("sources"), sources)
    raise CheckpointError(
        "the checkpoint's data order is not this run's; it cannot be continued exactly:\n"
        + "\n".join(changes or [f"  digest: checkpoint {saved.get('digest')}, now {digest_of(own)}"])
        + "\nrestore the values of the checkpoint, or start a new run"
    )


def _shown(value: Any) -> str:
    return "nothing" if value is None else json.dumps(value, ensure_ascii=False)


def _source_changes(before: Any, now: Any) -> list[str]:
    """List how the sources differ, one line each."""
    if not isinstance(before, list):
        return [] if before == now else ["  sources: their names, sizes, repeats or contents have changed"]
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
    return changes
