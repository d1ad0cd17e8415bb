"""Who writes, and which node's checkpoint is continued, where output directories are shared and where they are not."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import Ranks, run_ranks
from tests.unit.checkpoint.test_store import flip_a_bit, save
from vlm_dist.checkpoint import CheckpointStore, choose_checkpoint, find_places, places
from vlm_dist.errors import CheckpointError, ConfigError


def on_nodes(ranks: Ranks, directories: list[Path]) -> Ranks:
    """Each rank in a directory of its own, the first rank of its node."""
    directories[ranks.rank].mkdir(exist_ok=True)
    os.chdir(directories[ranks.rank])
    places.PATIENCE_SECONDS = 0.3
    return replace(ranks, topology=replace(ranks.topology, local_rank=0, local_world_size=1))


def find(ranks: Ranks, directories: list[Path]) -> tuple[Any, ...]:
    found = find_places(Path("run"), on_nodes(ranks, directories))
    return found.writers, found.is_writer, list(Path("run").iterdir())


def test_nodes_that_share_a_directory_are_found_out(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    assert run_ranks(find, 2, [a, a]) == [((0,), True, []), ((0,), False, [])]
    assert run_ranks(find, 3, [a, b, a]) == [((0, 1), True, []), ((0, 1), True, []), ((0, 1), False, [])]


def refused(ranks: Ranks, directories: list[Path]) -> str:
    with pytest.raises(ConfigError) as caught:
        find(ranks, directories)
    return str(caught.value)


def test_a_node_that_cannot_write_ends_the_start_of_all(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "run").touch()
    told = run_ranks(refused, 2, [tmp_path / "a", tmp_path / "b"])
    assert all("train.output_dir: cannot write to run" in message for message in told)


def refused_look(ranks: Ranks, directories: list[Path]) -> str:
    with pytest.raises(ConfigError) as caught:
        find_places(directories[ranks.rank] / "run", on_nodes(ranks, directories[:1] * 2))
    return str(caught.value)


def test_a_node_that_may_not_even_look_ends_the_start_of_all(tmp_path: Path) -> None:
    # as where it may not enter the directory, but also for root
    told = run_ranks(refused_look, 2, [tmp_path / "a", tmp_path / ("b" * 300)])
    assert all("train.output_dir: cannot write to" in message and "too long" in message for message in told)


def skipped(ranks: Ranks, directories: list[Path]) -> list[str]:
    ranks = on_nodes(ranks, directories)
    found = find_places(Path("run"), ranks)
    told: list[str] = []
    choose_checkpoint(CheckpointStore(Path("run"), report=told.append), ranks, "auto", found)
    return told


def test_what_another_node_skips_is_told_where_it_is_read(tmp_path: Path) -> None:
    nodes = [tmp_path / "a", tmp_path / "b"]
    save(CheckpointStore(nodes[0] / "run"), 2)
    flip_a_bit(save(CheckpointStore(nodes[1] / "run"), 4) / "training_state.safetensors")
    told = run_ranks(skipped, 2, nodes)[0]  # others' messages go nowhere
    assert len(told) == 1
    assert told[0].startswith("rank 1 (") and "skipped: run/checkpoint-4: damaged" in told[0]


def test_a_run_that_begins_anew_as_nothing_is_whole_says_so(tmp_path: Path) -> None:
    nodes = [tmp_path / "a", tmp_path / "b"]
    for node in nodes:
        flip_a_bit(save(CheckpointStore(node / "run"), 4) / "training_state.safetensors")
    told = run_ranks(skipped, 2, nodes)[0]
    assert len(told) == 3
    assert told[-1] == "no checkpoint can be used: the run begins at step 0"


def choose(ranks: Ranks, directories: list[Path], resume: str) -> tuple[int, int] | str | None:
    ranks = on_nodes(ranks, directories)
    found = find_places(Path("run"), ranks)
    try:
        chosen = choose_checkpoint(CheckpointStore(Path("run")), ranks, resume, found)
    except CheckpointError as error:
        return str(error)
    return (chosen.step, chosen.owner) if chosen is not None else None


def test_the_newest_whole_one_of_any_node_is_continued(tmp_path: Path) -> None:
    nodes = [tmp_path / "a", tmp_path / "b"]
    assert run_ranks(choose, 2, nodes, "auto") == [None, None]
    stores = [CheckpointStore(node / "run") for node in nodes]
    for store in stores:
        save(store, 2)
        save(store, 4)
    assert run_ranks(choose, 2, nodes, "auto") == [(4, 0)] * 2
    newest = save(stores[1], 6)
    assert run_ranks(choose, 2, nodes, "auto") == [(6, 1)] * 2
    assert run_ranks(choose, 2, nodes, "run/checkpoint-6") == [(6, 1)] * 2
    flip_a_bit(newest / "training_state.safetensors")
    assert run_ranks(choose, 2, nodes, "auto") == [(4, 0)] * 2
    told = run_ranks(choose, 2, nodes, "run/checkpoint-8")
    assert all("run/checkpoint-8: no such checkpoint" in str(message) for message in told)
