"""train_config.yaml: keys whose effect shows without a run. The others are in test_train_keys_in_a_run.py."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.unit.test_key_effects.conftest import Project
from tests.unit.test_key_effects.registry import shows
from vlm_dist import build
from vlm_dist.build import continuation, metering
from vlm_dist.build import saving as build_saving
from vlm_dist.checkpoint import AdapterExport, CheckpointStore, RunFacts
from vlm_dist.config.arithmetic import resolve_batch
from vlm_dist.data.lengths.estimate import estimate_num_tokens
from vlm_dist.data.plan.plan import Plan
from vlm_dist.data.storage.open_files import OpenFiles
from vlm_dist.data.types import MicroBatch, MicroBatchJob
from vlm_dist.data.workers.pool import WorkerPool
from vlm_dist.engine import TrainableState
from vlm_dist.errors import ConfigError
from vlm_dist.model import attach_adapter, load_model
from vlm_dist.optim import make_lr_schedule, make_optimizer, parameter_groups


def plan(project: Project, changes: dict[str, Any] | None = None) -> Plan:
    """The plan of the tiny run: 20 images and 4 clips, 4 samples a step."""
    config = project.config(changes)
    return build.make_plan(config, build.open_sources_alone(config, "train"), resolve_batch(config.train, 1))


def updated(project: Project, gradients: Sequence[float], **changes: Any) -> float:
    """Where a weight of 1 (of a matrix) is after updates with these gradients, at a rate of 0.1."""
    values = {"learning_rate": 0.1, "adam_epsilon": 1e-30} | changes
    settings = project.config({f"train.{key}": value for key, value in values.items()}).train
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    optimizer = make_optimizer(settings, parameter_groups(model, settings.weight_decay))
    for gradient in gradients:
        model.weight.grad = torch.full_like(model.weight, gradient)
        optimizer.step()
    return float(model.weight.detach())


@shows("train.learning_rate")
def test_the_learning_rate_is_adams_first_step(project: Project) -> None:
    assert updated(project, [1.0]) == pytest.approx(0.9)
    assert updated(project, [1.0], learning_rate=0.3) == pytest.approx(0.7)


@shows("train.weight_decay")
def test_weights_decay_without_a_gradient(project: Project) -> None:
    assert updated(project, [0.0], adam_epsilon=1.0) == pytest.approx(1.0)
    assert updated(project, [0.0], adam_epsilon=1.0, weight_decay=0.5) == pytest.approx(1 - 0.1 * 0.5)


@shows("train.adam_beta1", "train.adam_beta2", "train.adam_epsilon")
def test_adam_has_its_parameters(project: Project) -> None:
    def by_hand(beta1: float, beta2: float, epsilon: float) -> float:
        weight, first, second = 1.0, 0.0, 0.0
        for step, gradient in enumerate([1.0, 3.0], start=1):
            first = beta1 * first + (1 - beta1) * gradient
            second = beta2 * second + (1 - beta2) * gradient**2
            weight -= 0.1 * first / (1 - beta1**step) / (math.sqrt(second / (1 - beta2**step)) + epsilon)
        return weight

    results = set()
    for beta1, beta2, epsilon in ((0.9, 0.999, 1e-8), (0.5, 0.999, 1e-8), (0.9, 0.8, 1e-8), (0.9, 0.999, 0.7)):
        got = updated(project, [1.0, 3.0], adam_beta1=beta1, adam_beta2=beta2, adam_epsilon=epsilon)
        assert got == pytest.approx(by_hand(beta1, beta2, epsilon), rel=1e-5)
        results.add(round(got, 6))
    assert len(results) == 4


@shows("train.lr_scheduler_type", "train.warmup_ratio", "train.warmup_steps")
def test_the_schedule_has_its_shape_and_its_warm_up(project: Project) -> None:
    def factors(**changes: Any) -> list[float]:
        schedule = make_lr_schedule(project.config({f"train.{key}": v for key, v in changes.items()}).train, 10)
        return [round(schedule(step), 6) for step in range(10)]

    cold = {"warmup_ratio": 0.0}
    kinds = ("cosine", "linear", "constant", "constant_with_warmup")
    shapes = [factors(lr_scheduler_type=kind, **cold) for kind in kinds]
    assert shapes[1] == [round(1 - i / 10, 6) for i in range(10)]
    assert shapes[0] == [round((1 + math.cos(math.pi * i / 10)) / 2, 6) for i in range(10)]
    assert set(shapes[2]) == set(shapes[3]) == {1.0}
    assert factors(lr_scheduler_type="constant_with_warmup", warmup_ratio=0.3)[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors(lr_scheduler_type="constant_with_warmup", warmup_steps=3)[:4] == [0.25, 0.5, 0.75, 1.0]
    notices = project.config({"train.warmup_steps": 1, "train.lr_scheduler_type": "constant"}).notices
    assert any("constant has no warm-up" in notice for notice in notices)


@shows("train.per_device_train_batch_size", "train.gradient_accumulation_steps")
def test_a_step_is_cut_as_the_batch_sizes_say(project: Project) -> None:
    for per_device, accumulation in ((1, 2), (4, 3)):
        sizes = {
            "train.per_device_train_batch_size": per_device,
            "train.gradient_accumulation_steps": accumulation,
        }
        assert [len(batch) for batch in plan(project, sizes).step(0).micro_batches] == [per_device] * accumulation


@shows("train.num_train_epochs", "train.max_steps")
def test_the_length_of_the_run(project: Project) -> None:
    assert plan(project, {"train.max_steps": -1}).num_steps == 6
    assert plan(project, {"train.max_steps": -1, "train.num_train_epochs": 2.5}).num_steps == 15
    assert plan(project, {"train.max_steps": 3, "train.num_train_epochs": 2.5}).num_steps == 3


@shows("train.seed")
def test_the_seed_decides_order_and_start(project: Project) -> None:
    def start(seed: int) -> tuple[Any, torch.Tensor]:
        config = project.config({"train.seed": seed})
        model = load_model(config.model_id, config.model_entry, dtype="float32")
        adapted = attach_adapter(model, config.peft, config.peft.towers.model_dump(), seed=config.train.seed)
        first = next(parameter for name, parameter in adapted.named_parameters() if ".lora_A." in name)
        return plan(project, {"train.seed": seed}).step(0).micro_batches, first.detach()

    (order, weights), (same_order, same_weights), (other_order, other_weights) = start(1), start(1), start(2)
    assert order == same_order and torch.equal(weights, same_weights)
    assert order != other_order and not torch.equal(weights, other_weights)


@shows("train.group_by_length")
def test_neighbours_in_length_share_a_micro_batch(project: Project) -> None:
    def wasted(is_on: bool) -> int:
        changes = {"train.group_by_length": is_on, "train.max_steps": -1, "data.train": images}
        made = plan(project, changes)
        (source,) = project.sources(changes)
        spare = 0
        for step in range(made.num_steps):
            for batch in made.step(step).micro_batches:
                lengths = estimate_num_tokens(
                    source.facts(np.array([ref.index for ref in batch if ref], dtype=np.int64))
                )
                spare += int((lengths.max() - lengths).sum()) if len(lengths) else 0
        return spare

    images = [{"type": "tar", "path": "data/images", "columns": {"image": "png"}}]
    assert wasted(True) < 0.8 * wasted(False)


@shows("train.remove_unused_columns")
def test_columns_that_nothing_uses_are_not_read(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    num_bytes = 0
    read = OpenFiles.read

    def counting(self: OpenFiles, file: int, offset: int, size: int) -> bytes:
        nonlocal num_bytes
        num_bytes += size
        return read(self, file, offset, size)

    monkeypatch.setattr(OpenFiles, "read", counting)
    text = {"collator.data_processing": {"image_data": False, "video_data": False}}
    text["collator.message_format.training_messages"] = [  # type: ignore[assignment]
        {"role": "user", "content": [{"type": "text", "text": "{question_column}"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "{answer_column}"}]},
    ]
    found = {}
    for is_on in (False, True):
        num_bytes = 0
        fields = project.sources(text | {"train.remove_unused_columns": is_on})[0].read(0).fields
        found[is_on] = (set(fields), num_bytes)
    assert found[False][0] == {"image", "question", "answer", "video"}
    assert found[True][0] == {"question", "answer"}
    assert found[True][1] < found[False][1] / 2  # the picture stays on the disk
    with_image = project.sources({"train.remove_unused_columns": True})[0].read(0).fields
    assert set(with_image) == {"image", "question", "answer", "video"}


@shows("train.remove_unused_columns")
def test_unused_columns_of_records_and_of_data_sets_are_not_read_either(project: Project) -> None:
    import datasets

    row = {"image": project.picture("x.png", (1, 2, 3)), "question": "q", "answer": "a", "junk": "j"}
    datasets.Dataset.from_list([row]).save_to_disk(str(project.data / "saved"))
    root = {"media_root": str(project.data)}
    for settings in (
        project.rows(row)["data.train"][0],
        {"type": "hf", "path": str(project.data / "saved"), **root},
        {"type": "hf", "path": str(project.data / "saved"), **root, "columns": {"answer": "junk"}},
    ):
        changes = {"data.train": [settings], "train.remove_unused_columns": True}
        changes["collator.data_processing.video_data"] = False
        fields = project.sources(changes)[0].read(0).fields
        assert set(fields) == {"image", "question", "answer"} and isinstance(fields["image"], bytes)
        assert fields["answer"] == ("j" if "columns" in settings else "a")
        assert project.batch(changes).made.num_samples == 1


def small_batch(job: MicroBatchJob) -> MicroBatch:
    ids = torch.ones(1, 4, dtype=torch.int64)
    counts = dict.fromkeys(("num_samples", "num_target_tokens", "num_tokens", "num_computed_tokens"), 1)
    return MicroBatch(job=job, inputs={"input_ids": ids}, labels=ids.clone(), null_slots=[], origins=[], **counts)


@shows("train.dataloader_pin_memory")
def test_micro_batches_are_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine without a GPU there is no pinned memory; that each tensor is asked to be there is all we can see."""
    pinned: list[torch.Tensor] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor)
    job = MicroBatchJob(0, 0, ())
    for pin_memory, expected in ((False, 0), (True, 2)):
        pinned.clear()
        with WorkerPool(small_batch, 0, pin_memory=pin_memory) as pool:
            pool.submit(job).result()
        assert len(pinned) == expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_micro_batches_are_pinned_for_a_gpu() -> None:
    with WorkerPool(small_batch, 0, pin_memory=True) as pool:
        made = pool.submit(MicroBatchJob(0, 0, ())).result()
    assert made.labels.is_pinned() and made.inputs["input_ids"].is_pinned()


@shows("train.resume")
def test_resume_false_refuses_a_directory_with_checkpoints(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """That `auto` and a path continue is shown in a run; a path elsewhere would mix two runs."""
    from vlm_dist.checkpoint import Places
    from vlm_dist.errors import CheckpointError

    monkeypatch.setattr(continuation, "agree_on_failure", lambda ranks: _Nothing())
    monkeypatch.setattr(continuation, "find_places", lambda output_dir, ranks: Places(is_writer=True))
    ranks: Any = SimpleNamespace(is_main=True)
    run = project.data / "run"
    (run / "checkpoint-3").mkdir(parents=True)  # whole or not: somebody's work
    store = CheckpointStore(run)
    changes = {"train.output_dir": str(run)}
    with pytest.raises(CheckpointError, match=r"has checkpoints of an earlier run, and resume is false"):
        continuation.prepare_output_dir(project.config(changes), store, ranks)
    with pytest.raises(CheckpointError, match=r"run has checkpoints of another run than .*other/checkpoint-2"):
        other = {"train.resume": str(project.data / "other" / "checkpoint-2")}
        continuation.prepare_output_dir(project.config(changes | other), store, ranks)
    for resume in ("auto", str(run / "checkpoint-3")):
        continuation.prepare_output_dir(project.config(changes | {"train.resume": resume}), store, ranks)


class _Nothing:
    def __enter__(self) -> None:
        pass

    def __exit__(self, *exception: object) -> None:
        pass


def steps_kept(project: Project, tmp_path: Path, losses: Sequence[float], **changes: Any) -> list[int]:
    """Checkpoints that are left of one per step, out of eight steps, where each was evaluated with this loss."""
    settings = {"eval_steps": 1, "save_steps": 1, "save_total_limit": 1} | changes
    config = project.config({"train.output_dir": str(tmp_path)} | {f"train.{k}": v for k, v in settings.items()})
    store = CheckpointStore(tmp_path, build_saving.make_retention(config, 8))
    for step, loss in enumerate(losses, start=1):
        store.save(step, TrainableState(step, {}), AdapterExport({}, {}), RunFacts({}, 1))
        store.mark(step, {"images/loss": loss, "images/exact_match": loss, "clips/loss": 1.0})
    return sorted(int(path.name.rpartition("-")[2]) for path in tmp_path.glob("checkpoint-*"))


@shows("train.save_keep_steps")
@pytest.mark.parametrize(("given", "kept"), [(0, [8]), (3, [3, 6, 8]), (0.5, [4, 7, 8])])
def test_every_so_many_steps_one_stays(project: Project, tmp_path: Path, given: float, kept: list[int]) -> None:
    assert steps_kept(project, tmp_path, range(8), save_keep_steps=given) == kept


@shows("train.metric_for_best_model", "train.greater_is_better")
@pytest.mark.parametrize(
    ("metric", "greater", "kept"),
    [
        (None, None, [8]),
        ("eval_loss", None, [3, 8]),
        ("images/loss", None, [3, 8]),
        ("clips/loss", None, [1, 8]),
        ("eval_loss", True, [6, 8]),
        ("eval_exact_match", None, [6, 8]),
        ("eval_exact_match", False, [3, 8]),
    ],
)
def test_the_best_stays(
    project: Project, tmp_path: Path, metric: str | None, greater: bool | None, kept: list[int]
) -> None:
    changes = {"metric_for_best_model": metric, "greater_is_better": greater, "predict_with_generate": True}
    assert steps_kept(project, tmp_path, (4, 3, 1, 2, 5, 9, 7, 6), **changes) == kept


@shows("train.save_in_slices")
@pytest.mark.parametrize(
    ("given", "elements", "world_size", "hosts", "expected"),
    [
        ("auto", 10**6, 4, ("a",), False),
        ("auto", 10**9, 4, ("a",), True),
        ("auto", 10**9, 1, ("a",), False),
        ("auto", 10**9, 4, ("a", "b"), False),  # each node has a disk of its own
        (True, 10, 1, ("a",), True),
        (False, 10**12, 64, ("a",), False),
    ],
)
def test_large_states_are_written_by_all_ranks(
    project: Project, given: Any, elements: int, world_size: int, hosts: tuple[str, ...], expected: bool
) -> None:
    from vlm_dist.checkpoint import Places

    places = Places(tuple(range(len(hosts))), hosts)
    engine: Any = SimpleNamespace(num_trainable=elements, zero_stage=2)
    ranks: Any = SimpleNamespace(world_size=world_size)
    config = project.config({"train.save_in_slices": given})
    assert build_saving.is_sliced(config, engine, ranks, places) is expected


def test_slices_need_a_directory_that_all_nodes_see(project: Project) -> None:
    from vlm_dist.checkpoint import Places

    nothing: Any = SimpleNamespace()
    config = project.config({"train.save_in_slices": True})
    with pytest.raises(ConfigError, match="needs an output_dir that all nodes see"):
        build_saving.is_sliced(config, nothing, nothing, Places((0, 8), ("a", "b")))


@shows("train.run_name")
@pytest.mark.parametrize(("given", "expected"), [("first try", "first try"), (None, "vqa")])
def test_a_run_has_its_name_or_that_of_its_directory(
    project: Project, monkeypatch: pytest.MonkeyPatch, given: str | None, expected: str
) -> None:
    made: dict[str, Any] = {}
    monkeypatch.setattr(metering, "MetricLog", lambda *_, **arguments: made.update(arguments))
    config = project.config({"train.output_dir": "runs/vqa", "train.run_name": given})
    metering.make_log(config, SimpleNamespace(rank=0))  # type: ignore[arg-type]
    assert made["run_name"] == expected
