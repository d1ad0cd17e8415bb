"""Under ZeRO-3 no rank ever holds the base whole, not even the rank that reads it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engine.loading_memory import measure, save_base

pytestmark = pytest.mark.engine


def test_each_rank_holds_its_share_and_a_few_modules(tmp_path: Path) -> None:
    base = save_base(tmp_path, 160, shard="40MB")
    assert len(list(tmp_path.glob("*.safetensors"))) >= 4
    by_rank = measure(tmp_path, 4)
    megabytes = [{key: round(value / 1e6) for key, value in rank.items()} for rank in by_rank]
    # a module is gathered into one buffer and copied from there; else each process would end at the whole base
    room = 4 * by_rank[0]["largest"] + 30e6
    assert max(rank["peak"] for rank in by_rank) < base / 4 + room, (base, megabytes)
    assert max(rank["held"] for rank in by_rank) < base / 4 + 30e6, (base, megabytes)
