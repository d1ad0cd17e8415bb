"""A few faults of the campaign; `make chaos` tries them all."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.tiny_run import ROOT

pytestmark = [pytest.mark.chaos, pytest.mark.e2e]


def test_a_few_faults_are_survived() -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "tests.chaos", "--short"], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    rows = [json.loads(line) for line in ended.stdout.splitlines() if line.startswith('{"name"')]
    assert [row for row in rows if not row["value"]] == []
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert len(rows) >= 6
