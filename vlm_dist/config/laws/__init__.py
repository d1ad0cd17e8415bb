"""Laws between keys: each value is fine alone, but not beside another; and what is legal but worth a line.

A law reads a draft of the whole configuration and yields findings. A finding names every path that it depends on,
so that it is not reported where one of them is broken already.
"""

from __future__ import annotations

from collections.abc import Iterator

from vlm_dist.config.laws.collator import check_media, check_messages, check_processing, check_variables
from vlm_dist.config.laws.data import check_sources
from vlm_dist.config.laws.finding import Draft, Finding
from vlm_dist.config.laws.model import (
    check_attention,
    check_compilation,
    check_known_model,
    check_placement,
    check_precision,
    check_towers,
)
from vlm_dist.config.laws.reporting import check_reporting
from vlm_dist.config.laws.train import (
    check_best,
    check_early_end,
    check_lengths,
    check_packing,
    check_training,
    check_workers,
)

__all__ = ["Draft", "Finding", "findings"]


def findings(draft: Draft) -> Iterator[Finding]:
    """All findings of all laws."""
    yield from check_known_model(draft)
    yield from check_precision(draft)
    yield from check_placement(draft)
    yield from check_variables(draft.collator)
    yield from check_messages(draft.collator)
    yield from check_media(draft.collator)
    yield from check_processing(draft.collator, draft.train)
    yield from check_training(draft.train, draft.data)
    yield from check_best(draft.train, draft.data)
    yield from check_early_end(draft.train)
    yield from check_packing(draft.train, draft.collator)
    yield from check_lengths(draft.train, draft.data)
    yield from check_workers(draft.train, draft.data, draft.collator)
    yield from check_reporting(draft.train)
    yield from check_attention(draft)
    yield from check_compilation(draft)
    yield from check_towers(draft.peft)
    yield from check_sources(draft.data)
