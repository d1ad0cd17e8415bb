"""Under ZeRO-3 no rank ever holds the base whole, not even the rank that reads it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.engine


def test_each_rank_holds_its_share_and_a_few_modules() -> None:
    # in a process of its own: what the tests before have freed would be filled first, and look like growth
    command = [sys.executable, "-m", "tests.engine.loading_memory", "160", "4"]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=True, cwd=root)
    by_rank = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(by_rank) == 4
    share = by_rank[0]["base_MB"] / 4
    # a module is gathered into one buffer and copied from there; without `freed_memory_goes_back` it is the whole base
    assert max(rank["peak_MB"] for rank in by_rank) < share + 4 * by_rank[0]["largest_MB"] + 30, by_rank
    assert max(rank["held_MB"] for rank in by_rank) < share + 30, by_rank
