"""What commands log while they work: plain lines on the standard error."""

from __future__ import annotations

import logging


def counted(count: int, noun: str) -> str:
    """A number and its noun: `1 shard`, `1,000 shards`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def show_messages() -> None:
    """Show our own messages and everybody's warnings; may be called again."""
    from vlm_dist.observability import logging_setup

    logging_setup.show_messages("%(levelname)s: %(message)s")
    logging.getLogger("vlm_dist").setLevel(logging.INFO)
