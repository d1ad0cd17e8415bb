"""A checkpoint is whole or not there, the newest whole one is found, and it holds what was put in."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from vlm_dist.checkpoint import AdapterExport, Checkpoint, CheckpointStore, Retention, RunFacts
from vlm_dist.checkpoint.publish import publish_directory
from vlm_dist.engine import NamedState, TrainableState
from vlm_dist.errors import CheckpointError

FACTS = RunFacts(
    plan={"digest": "ab12", "position": 7},
    global_batch_size=16,
    resolved_config="train: {learning_rate: 0.1}\n",
    scheduler={"kind": "cosine", "num_steps": 30},
    versions={"torch": "2"},
    topology={"world_size": 2, "zero_stage": 3},
)


def trainable(seed: int) -> TrainableState:
    torch.manual_seed(seed)
    parameters = {
        f"base_model.model.layer.lora_{side}.default.weight": NamedState(*(torch.randn(3, 5) for _ in range(3)))
        for side in "AB"
    }
    hyperparameters = [{"lr": 0.1, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0}]
    return TrainableState(seed, parameters, hyperparameters, {"cur_scale": 2.0})


ADAPTER = AdapterExport({"peft_type": "LORA", "r": 3}, {"base_model.model.layer.lora_A.weight": torch.ones(3, 5)})


def save(store: CheckpointStore, step: int) -> Path:
    return store.save(step, trainable(step), ADAPTER, FACTS)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_what_comes_out_is_what_went_in(tmp_path: Path) -> None:
    path = save(CheckpointStore(tmp_path / "runs" / "a"), 7)
    assert names(path) == [
        "COMPLETE",
        "adapter_config.json",
        "adapter_model.safetensors",
        "resolved_config.yaml",
        "training_state.json",
        "training_state.safetensors",
    ]
    checkpoint = CheckpointStore(tmp_path / "runs" / "a").latest()
    assert checkpoint is not None
    assert (checkpoint.path, checkpoint.step) == (path, 7)
    for key in ("plan", "global_batch_size", "scheduler", "versions", "topology"):
        assert checkpoint.info[key] == getattr(FACTS, key)
    assert (path / "resolved_config.yaml").read_text() == FACTS.resolved_config
    wanted, got = trainable(7), checkpoint.read_trainable()
    assert (got.step, got.hyperparameters, got.loss_scaler) == (7, wanted.hyperparameters, wanted.loss_scaler)
    assert set(got.parameters) == set(wanted.parameters)
    for name, state in wanted.parameters.items():
        for part, tensor in vars(state).items():
            assert torch.equal(getattr(got.parameters[name], part), tensor)


def test_equal_states_write_equal_bytes(tmp_path: Path) -> None:
    paths = [save(CheckpointStore(tmp_path / name), 7) for name in ("a", "b")]
    assert all((paths[0] / name).read_bytes() == (paths[1] / name).read_bytes() for name in names(paths[0]))


def test_a_team_can_read_what_the_umask_lets_it(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        path = save(CheckpointStore(tmp_path), 7)
    finally:
        os.umask(before)
    assert {oct(file.stat().st_mode & 0o777) for file in path.iterdir()} == {"0o640"}


def test_weights_outside_the_adapter_have_a_file_of_their_own(tmp_path: Path) -> None:
    adapter = AdapterExport(ADAPTER.config, ADAPTER.tensors, {"model.visual.weight": torch.ones(2)})
    path = CheckpointStore(tmp_path).save_adapter(adapter)
    assert names(path) == ["adapter_config.json", "adapter_model.safetensors", "trained_weights.safetensors"]


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: (path / "COMPLETE").unlink(), "incomplete"),
        (lambda path: (path / "training_state.safetensors").unlink(), "damaged: .*training_state.safetensors"),
        (lambda path: os.truncate(path / "training_state.safetensors", 100), "has 100 bytes instead of"),
        (lambda path: flip_a_bit(path / "adapter_model.safetensors"), "adapter_model.safetensors does not match its"),
        (lambda path: flip_a_bit(path / "training_state.json"), "training_state.json is not what COMPLETE says"),
        (lambda path: (path / "COMPLETE").write_text(""), "training_state.json is not what COMPLETE says"),
        (lambda path: (path / "COMPLETE").write_bytes(b"\xff"), "cannot be read"),
    ],
)  # fmt: skip
def test_the_newest_whole_one_is_found(tmp_path: Path, damage: Any, reason: str) -> None:
    messages: list[str] = []
    store = CheckpointStore(tmp_path, report=messages.append)
    save(store, 5)
    newest = save(store, 10)
    damage(newest)
    checkpoint = store.latest()
    assert checkpoint is not None
    assert checkpoint.step == 5
    assert len(messages) == 1
    assert "checkpoint-10" in messages[0]
    with pytest.raises(CheckpointError, match=reason):
        store.load(newest)


def test_a_damaged_one_does_not_push_a_whole_one_out(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, Retention(2))
    for step in (3, 4):
        save(store, step)
    damaged = tmp_path / "checkpoint-4" / "adapter_model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    save(store, 6)
    assert names(tmp_path) == ["checkpoint-3", "checkpoint-4", "checkpoint-6"]


def test_nothing_to_find(tmp_path: Path) -> None:
    assert CheckpointStore(tmp_path / "none").latest() is None
    (tmp_path / "checkpoint-x").mkdir()
    (tmp_path / "checkpoint-3").touch()
    assert CheckpointStore(tmp_path).latest() is None
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        CheckpointStore(tmp_path).load(tmp_path / "checkpoint-4")


def test_retention_keeps_the_newest(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, Retention(2))
    for step in (1, 2, 9, 10, 11):
        save(store, step)
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-11"]


def test_retention_counts_whole_ones_only(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, Retention(1))
    (save(store, 1) / "COMPLETE").unlink()
    save(store, 2)
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-2"]
    with pytest.raises(CheckpointError, match="save_total_limit is 0"):
        Retention(0)


def test_a_run_that_resumed_earlier_leaves_its_old_future(tmp_path: Path) -> None:
    messages: list[str] = []
    store = CheckpointStore(tmp_path, Retention(1), report=messages.append)
    save(store, 20)
    save(store, 15)
    latest = store.latest()
    assert latest is not None
    assert latest.step == 15
    assert names(tmp_path) == ["checkpoint-15", "superseded-1-checkpoint-20"]
    assert "checkpoint-20" in messages[0]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 5)
    store.save(5, trainable(6), ADAPTER, FACTS)
    checkpoint = store.latest()
    assert checkpoint is not None
    assert checkpoint.read_trainable().step == 6
    assert names(tmp_path) == ["checkpoint-5"]


def test_a_full_disk_is_an_error_in_words_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    store = CheckpointStore(tmp_path)
    save(store, 5)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"checkpoint-10 could not be written: .*No space left"):
        save(store, 10)
    assert names(tmp_path) == ["checkpoint-5"]


def test_what_a_crash_left_is_cleared_away(tmp_path: Path) -> None:
    (tmp_path / ".adapter.writing").mkdir()
    (tmp_path / ".adapter.old").mkdir()
    publish_directory(tmp_path / "adapter", lambda fresh: (fresh / "x").touch())
    assert names(tmp_path) == ["adapter"]
    for name in (".checkpoint-7.writing", ".checkpoint-6.deleting", ".checkpoint-5.old", ".git.old-notes", ".old"):
        (tmp_path / name).mkdir()
    CheckpointStore(tmp_path).recover()
    assert names(tmp_path) == [".git.old-notes", ".old", "adapter", "checkpoint-5"]


def test_another_format_is_refused(tmp_path: Path) -> None:
    path = save(CheckpointStore(tmp_path), 5)
    info = json.loads((path / "training_state.json").read_text())
    (path / "training_state.json").write_text(json.dumps({**info, "format": 99}))
    from vlm_dist.checkpoint.layout import sha256_of

    (path / "COMPLETE").write_text(sha256_of(path / "training_state.json"))
    with pytest.raises(CheckpointError, match="format 99, this version reads formats 1 and 2"):
        Checkpoint.open(path)


def test_what_is_not_ours_is_never_deleted(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-6").mkdir()
    (tmp_path / "checkpoint-6" / "optimizer.pt").write_text("of another program")
    (tmp_path / "checkpoint-7").write_text("a file")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "notes.txt").write_text("mine")
    told: list[str] = []
    store = CheckpointStore(tmp_path, Retention(1), told.append)
    save(store, 6)
    save(store, 7)
    store.save_adapter(ADAPTER)
    store.save_adapter(ADAPTER)  # ours is replaced
    assert names(tmp_path) == [
        "adapter",
        "checkpoint-7",
        "superseded-1-adapter",
        "superseded-1-checkpoint-6",
        "superseded-1-checkpoint-7",
    ]
    assert (tmp_path / "superseded-1-checkpoint-6" / "optimizer.pt").read_text() == "of another program"
    assert (tmp_path / "superseded-1-adapter" / "notes.txt").read_text() == "mine"
    assert told[0] == ("checkpoint-6 is no whole checkpoint of this program; renamed to superseded-1-checkpoint-6")
    assert "left by resuming" not in " ".join(told)


def test_of_two_runs_in_one_directory_the_older_one_ends(tmp_path: Path) -> None:
    older, newer = CheckpointStore(tmp_path), CheckpointStore(tmp_path)
    older.claim()
    save(older, 2)
    newer.claim()
    save(newer, 3)
    with pytest.raises(
        CheckpointError, match=rf"was taken over by a run that was started later \(process {os.getpid()}"
    ):
        save(older, 4)
    assert [path.name for path in tmp_path.glob("checkpoint-*") if path.is_dir()].count("checkpoint-4") == 0
    (tmp_path / ".saved-by.json").unlink()
    save(newer, 4)


def test_what_is_no_checkpoint_is_called_so(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "run")
    path = save(store, 4)
    store.save_adapter(ADAPTER)
    with pytest.raises(CheckpointError, match=rf"run is no checkpoint, but has some: name one of {path}$"):
        store.load(tmp_path / "run")
    with pytest.raises(CheckpointError, match="adapter is no checkpoint of this program"):
        store.load(tmp_path / "run" / "adapter")
    with pytest.raises(CheckpointError, match=r"AUTO: no such checkpoint; .*; auto takes the newest"):
        store.load(Path("AUTO"))
