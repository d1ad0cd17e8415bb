"""`vlm-dist plan`: names what a step sees, and tells before a run what its steps will cost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_run import TinyRun, make_tiny_run
from vlm_dist.cli import main

PACKED = ("--set", "train.packing=true", "--set", "train.pack_max_tokens=256")


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    return make_tiny_run(tmp_path_factory.mktemp("plan"), num_images=20, num_clips=4)


@pytest.fixture
def shown(tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    monkeypatch.chdir(tiny_run.directory)

    def show(*arguments: str) -> tuple[int, str, str]:
        code = main(["plan", "configs/tiny.yaml", *arguments])
        return (code, *capsys.readouterr())

    return show


def lines_of(output: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output.splitlines()]


def names(lines: list[dict[str, Any]]) -> set[tuple[str, str]]:
    return {(line["shard"], line["key"]) for line in lines if "key" in line}


@pytest.mark.parametrize("world_size", ["1", "2", "3"])
def test_packs_hold_the_samples_that_padded_batches_would(shown: Any, world_size: str) -> None:
    ranks = ("--step", "1", "--world-size", world_size)
    padded = lines_of(shown(*ranks, "--set", "train.group_by_length=false")[1])
    packed = lines_of(shown(*ranks, *PACKED)[1])
    assert names(packed) == names(padded) != set()
    assert {line["rank"] for line in packed} == set(range(int(world_size)))
    for number in {line["micro_batch"] for line in packed}:
        mine = [line for line in packed if line["micro_batch"] == number and "key" in line]
        assert {line["micro_batch_tokens"] for line in mine} <= {sum(line["tokens"] for line in mine)}
        assert {line["micro_batch_patches"] for line in mine} <= {sum(line["patches"] for line in mine)}


def test_a_rank_without_a_sample_is_named_too(shown: Any) -> None:
    lines = lines_of(shown("--step", "0", *PACKED, "--world-size", "32")[1])
    assert {line["rank"] for line in lines} == set(range(32))
    assert len(names(lines)) == 24
    assert sum(line.get("null") == "no sample" for line in lines) == 8


def test_a_summary_tells_what_the_modes_cost(shown: Any) -> None:
    found = {}
    for name, changes in (("padding", ("--set", "train.group_by_length=false")), ("packing", PACKED)):
        code, out, err = shown("--summary", "--world-size", "2", *changes)
        assert code == 0
        found[name] = json.loads(out)
        assert found[name]["mode"] == name
        assert "global batch" in err
        assert (name == "packing") == ("packs of up to 256 tokens, about " in err)
    assert found["packing"]["padding_share"] == 0 < found["padding"]["padding_share"]
    assert found["packing"]["token_max_over_mean"] >= 1
    assert found["packing"]["idle_share"] == pytest.approx(1 - 1 / found["packing"]["token_max_over_mean"], abs=1e-3)


def test_few_samples_per_pack_are_warned_of(shown: Any) -> None:
    warned = shown("--summary", *PACKED, "--set", "train.pack_max_tokens=64")[2]
    assert "too few to balance; raise pack_max_tokens" in warned


def test_a_scope_that_cannot_be_is_told(shown: Any) -> None:
    told = shown("--summary", "--set", "train.balance_scope=node", "--world-size", "4", "--ranks-per-node", "3")[2]
    assert "balance_scope: node has no effect, as 4 ranks are no multiple of 3 ranks per node" in told


def test_nothing_asked_for_is_an_error(shown: Any) -> None:
    code, _, err = shown()
    assert code != 0
    assert "name a step (--step 0), or ask for --summary" in err
    assert not Path("runs/tiny").exists()
