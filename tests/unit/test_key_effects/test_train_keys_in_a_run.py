"""train_config.yaml: keys whose effect shows in a run; three processes in all, each asked about many keys."""

from __future__ import annotations

import itertools
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_run import Finished, TinyRun
from tests.unit.test_key_effects.registry import shows
from vlm_dist.data.ledger import read_ledger

pytestmark = pytest.mark.e2e

#: Large epsilon: Adam then feels the size of a gradient, which clipping changes.
SHORT = {
    "train.max_steps": 2,
    "train.lr_scheduler_type": "constant",
    "train.adam_epsilon": 0.01,
    "train.gradient_checkpointing": False,
    "peft.lora_dropout": 0.0,
}

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rate": {"train.learning_rate": 1e-4},
    "clipped": {"train.max_grad_norm": 1e-4},
    "unclipped": {"train.max_grad_norm": 0},
    "wide": {"train.max_grad_norm": 1e9},
    "checkpointing": {"train.gradient_checkpointing": True},
    "one_block": {
        "train.gradient_checkpointing": True,
        "train.gradient_checkpointing_policy.language": 1,
        "train.gradient_checkpointing_policy.vision": "none",
    },
    "vision_alone": {
        "train.gradient_checkpointing": True,
        "train.gradient_checkpointing_policy.language": "none",
    },
    "compiled": {"train.torch_compile": True, "train.torch_compile_backend": "aot_eager"},
    "traced": {"train.torch_compile": True, "train.torch_compile_backend": "eager"},
    "bf16": {"train.bf16": True, "model.loading_params.torch_dtype": "bfloat16"},
    "one_worker": {
        "train.dataloader_num_workers": 1,
        "train.dataloader_prefetch_factor": 1,
        "train.max_steps": 6,
        "train.gc_steps": 2,
    },
    "two_workers": {
        "train.dataloader_num_workers": 2,
        "train.dataloader_prefetch_factor": 4,
        "train.max_steps": 6,
        "train.gc_steps": 0,
    },
    "eval_by_two": {"train.per_device_eval_batch_size": 2, "train.eval_steps": 2},
    "eval_by_five": {"train.per_device_eval_batch_size": 5, "train.eval_steps": 2},
    "other_label": {"collator.label_masking.ignore_index": -7, "train.eval_steps": 2},
    "brief": {"train.eval_on_start": True, "train.predict_with_generate": True, "train.generation_max_new_tokens": 2},
    "verbose": {"train.eval_on_start": True, "train.predict_with_generate": True, "train.generation_max_new_tokens": 8},
}


@pytest.fixture(scope="module")
def seen(tiny_run: TinyRun) -> dict[str, Any]:
    """What the probe saw of each variant."""
    variants = tiny_run.directory / "variants.json"
    variants.write_text(json.dumps({name: SHORT | changes for name, changes in VARIANTS.items()}))
    ended = tiny_run.command([sys.executable, "-m", "tests.unit.test_key_effects.probe", str(variants)])
    assert ended.exit_code == 0, ended.output[-3000:]
    line = next(line for line in ended.stdout.splitlines() if line.startswith("PROBE "))
    return json.loads(line.removeprefix("PROBE "))


@shows("train.learning_rate")
def test_the_rate_reaches_the_engine(seen: dict[str, Any]) -> None:
    assert {rate for rate, _ in seen["plain"]["outcomes"]} == {1e-3}
    assert seen["rate"]["moved"] == pytest.approx(seen["plain"]["moved"] / 10, rel=0.05)


@shows("train.max_grad_norm")
def test_gradients_are_clipped_and_0_leaves_them_alone(seen: dict[str, Any]) -> None:
    assert seen["clipped"]["moved"] < seen["unclipped"]["moved"] / 10
    assert seen["unclipped"]["checksum"] == seen["wide"]["checksum"]
    assert seen["clipped"]["outcomes"][0][1] == pytest.approx(seen["unclipped"]["outcomes"][0][1])  # before clipping


@shows("collator.label_masking.ignore_index")
def test_the_label_of_masked_tokens_changes_no_loss(seen: dict[str, Any], tiny_run: TinyRun) -> None:
    assert seen["other_label"]["checksum"] == seen["plain"]["checksum"]
    evaluated = [tiny_run.metrics(f"probe-{name}", "eval")[0] for name in ("other_label", "eval_by_two")]
    assert evaluated[0]["images/loss"] == pytest.approx(evaluated[1]["images/loss"], rel=1e-5)


@shows("train.gradient_checkpointing")
def test_checkpointing_is_switched_on_and_changes_nothing(seen: dict[str, Any]) -> None:
    assert seen["plain"]["num_checkpointing"] == 0
    assert seen["checkpointing"]["num_checkpointing"] > 0
    assert seen["checkpointing"]["checksum"] == pytest.approx(seen["plain"]["checksum"], rel=1e-4)


@shows("train.gradient_checkpointing_policy.language", "train.gradient_checkpointing_policy.vision")
def test_checkpointing_is_for_the_blocks_that_are_named(seen: dict[str, Any]) -> None:
    """Two blocks of the language model and one of the vision tower, which has LoRA too."""
    counts = {name: seen[name]["num_checkpointing"] for name in ("checkpointing", "one_block", "vision_alone")}
    assert counts["checkpointing"] - counts["one_block"] == 2
    assert counts["checkpointing"] - counts["vision_alone"] == 2
    for name in counts:
        assert seen[name]["checksum"] == pytest.approx(seen["plain"]["checksum"], rel=1e-4)


@shows("train.torch_compile", "train.torch_compile_backend")
def test_blocks_are_compiled_by_what_is_named(seen: dict[str, Any]) -> None:
    """The two blocks of the language model; `eager` runs the traced graph as it is, `aot_eager` makes its backward."""
    for name, num_compiled in (("plain", 0), ("compiled", 2), ("traced", 2)):
        assert seen[name]["num_compiled"] == num_compiled
        assert (seen[name]["num_traced"] > 0) is (num_compiled > 0)
        assert seen[name]["checksum"] == pytest.approx(seen["plain"]["checksum"], rel=1e-4)
    assert seen["compiled"]["num_differentiated"] > 0 == seen["traced"]["num_differentiated"]


@shows("train.bf16")
def test_bf16_is_what_is_computed_in(seen: dict[str, Any]) -> None:
    assert (seen["plain"]["dtype"], seen["bf16"]["dtype"]) == ("torch.float32", "torch.bfloat16")


@shows("train.dataloader_num_workers", "train.dataloader_prefetch_factor")
def test_workers_are_as_many_and_as_far_ahead_as_asked(seen: dict[str, Any]) -> None:
    assert seen["plain"]["num_processes"] == 0
    assert seen["two_workers"]["num_processes"] == seen["one_worker"]["num_processes"] + 1 > 1
    assert (seen["one_worker"]["furthest_step"], seen["two_workers"]["furthest_step"]) == (1, 4)
    assert seen["plain"]["furthest_step"] == 0


@shows("train.per_device_eval_batch_size")
def test_evaluation_takes_so_many_samples_at_a_time(seen: dict[str, Any]) -> None:
    for name, size in (("eval_by_two", 2), ("eval_by_five", 5)):
        assert {count for purpose, _, count in seen[name]["jobs"] if purpose == "eval"} == {size}


@shows("train.generation_max_new_tokens", "train.predict_with_generate")
@pytest.mark.usefixtures("seen")
def test_answers_end_where_they_are_to(tiny_run: TinyRun) -> None:
    """The same model generates in both: a brief answer is the beginning of the verbose one."""

    def answers(name: str) -> list[str]:
        lines = (tiny_run.directory / f"probe-{name}" / "predictions" / "step-0.jsonl").read_text().splitlines()
        return [json.loads(line)["prediction"].rstrip("\ufffd") for line in lines]  # half a character at the end

    pairs = list(zip(answers("brief"), answers("verbose"), strict=True))
    assert len(pairs) == 8
    assert all(verbose.startswith(brief) for brief, verbose in pairs)
    assert sum(len(brief) < len(verbose) for brief, verbose in pairs) > 4
    assert not (tiny_run.directory / "probe-eval_by_two" / "predictions").exists()


@shows("train.gc_steps")
def test_python_collects_garbage_every_so_many_steps_and_with_0_as_it_likes(seen: dict[str, Any]) -> None:
    every_two = seen["one_worker"]
    between = [after - before for before, after in itertools.pairwise(every_two["full_collections"])]
    assert [count > 0 for count in between] == [False, True, False, True, False]
    assert set(every_two["collects"]) == {False}
    assert set(seen["two_workers"]["collects"]) == {True}


@pytest.fixture(scope="module")
def stopped(tiny_run: TinyRun) -> Finished:
    """Four of six steps, with all that happens between them."""
    return tiny_run.train(
        "train.output_dir=own/place",
        "train.max_steps=6",
        "train.stop_at_step=4",
        "train.logging_steps=2",
        "train.eval_steps=0.5",
        "train.eval_on_start=true",
        "train.save_steps=2",
        "train.save_total_limit=1",
        "train.predict_with_generate=true",
        "train.generation_max_new_tokens=3",
        "train.report_to=[wandb,tensorboard]",
        "train.wandb_project=our-project",
        "train.wandb_entity=our-team",
        "train.wandb_group=our-group",
        "train.wandb_tags=[our-tag]",
        "train.wandb_notes=our-notes",
        "train.wandb_artifacts=all",
        "train.device_peak_tflops=0.5",
        "train.profile.start_step=1",
        "train.profile.num_steps=2",
        "train.profile.memory=true",
        "train.run_name=our-run",
        "train.dataloader_pin_memory=true",
        "train.sample_ledger=true",
    )


@pytest.fixture
def place(tiny_run: TinyRun, stopped: Finished) -> Path:
    assert stopped.exit_code == 0, stopped.output[-3000:]
    return tiny_run.directory / "own" / "place"


def steps(tiny_run: TinyRun, kind: str) -> list[int]:
    return [record["step"] for record in tiny_run.metrics("own/place", kind)]


@shows("train.output_dir", "train.save_steps", "train.save_total_limit", "train.stop_at_step")
def test_checkpoints_are_where_and_as_many_as_asked(stopped: Finished, place: Path) -> None:
    written = re.findall(r"checkpoint written: \S*own/place/checkpoint-(\d+)", stopped.stdout)
    assert written == ["2", "4"]
    assert sorted(path.name for path in place.glob("checkpoint-*")) == ["checkpoint-4"]
    assert re.search(r"stop_at_step.* at step 4 of 6", " ".join(stopped.stdout.split()))


@shows("train.logging_steps", "train.eval_steps", "train.eval_on_start")
@pytest.mark.usefixtures("place")
def test_figures_come_as_often_as_asked(tiny_run: TinyRun) -> None:
    assert steps(tiny_run, "train") == [2, 4]
    assert steps(tiny_run, "eval") == [0, 3]


@shows("train.predict_with_generate")
def test_answers_are_generated_and_counted(tiny_run: TinyRun, place: Path) -> None:
    assert {path.name for path in (place / "predictions").iterdir()} == {"step-0.jsonl", "step-3.jsonl"}
    assert "images/exact_match" in tiny_run.metrics("own/place", "eval")[0]


@shows(
    *("train.report_to", "train.run_name", "train.wandb_project"),
    *("train.wandb_entity", "train.wandb_group", "train.wandb_tags", "train.wandb_notes", "train.wandb_artifacts"),
)
def test_the_run_is_in_wandb_under_its_names(place: Path) -> None:
    """The names stand in the arguments and the configuration too, so that only wandb's own fields for them count."""
    from wandb.proto.wandb_internal_pb2 import RunRecord

    (file,) = (place / "wandb").glob("offline-run-*/run-*.wandb")
    recorded = file.read_bytes()
    assert RunRecord(display_name="our-run").SerializeToString() in recorded
    assert RunRecord(project="our-project").SerializeToString() in recorded
    for field in ({"entity": "our-team"}, {"run_group": "our-group"}, {"notes": "our-notes"}, {"tags": ["our-tag"]}):
        assert RunRecord(**field).SerializeToString() in recorded
    assert b"our-run-adapter" in recorded


@shows("train.report_to")
def test_the_run_is_in_tensorboard(place: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(place / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [2, 4]


@shows("train.device_peak_tflops")
@pytest.mark.usefixtures("place")
def test_mfu_is_a_share_of_the_peak_that_is_given(tiny_run: TinyRun) -> None:
    for record in tiny_run.metrics("own/place"):
        assert record["mfu"] == pytest.approx(record["tflops_per_device"] / 0.5)


@shows("train.profile.start_step", "train.profile.num_steps", "train.profile.ranks", "train.profile.memory")
def test_steps_are_traced_as_asked(place: Path) -> None:
    """The resumed run below asks for rank 1, which it has not."""
    assert {path.name for path in (place / "profile").iterdir()} == {"steps-2-3-rank-0.json.gz", "steps-2-3-rank-0.txt"}
    assert "operators by their own memory" in (place / "profile" / "steps-2-3-rank-0.txt").read_text()


@shows("train.sample_ledger")
def test_the_ledger_names_the_samples_of_each_step(tiny_run: TinyRun, place: Path) -> None:
    ledger = read_ledger(place)
    assert list(ledger) == [0, 1, 2, 3]
    assert {len(set(step.samples)) for step in ledger.values()} == {4}
    assert len({sample for step in ledger.values() for sample in step.samples}) == 16
    assert not list(tiny_run.directory.glob("probe-*/ledger"))


@shows("train.dataloader_pin_memory")
@pytest.mark.usefixtures("place")
def test_pinning_without_a_gpu_is_said_to_have_no_effect(stopped: Finished) -> None:
    import torch

    said = "dataloader_pin_memory: true has no effect without a GPU" in stopped.stdout
    assert said is not torch.cuda.is_available()


@shows("train.resume", "train.report_to", "train.predict_with_generate", "train.stop_at_step")
def test_resume_continues_where_it_stopped(tiny_run: TinyRun, place: Path) -> None:
    """From the checkpoint that is named; without wandb, without answers and to the end."""
    ended = tiny_run.train(
        "train.output_dir=own/place",
        "train.resume=own/place/checkpoint-4",
        "train.profile={start_step: 1, num_steps: 1, ranks: [1]}",
        "train.max_steps=6",
        "train.logging_steps=1",
        "train.seed=42",
    )
    assert ended.exit_code == 0, ended.output[-3000:]
    assert re.search(r"resumed from \S*checkpoint-4 at step 4 of 6", ended.stdout)
    assert steps(tiny_run, "train") == [2, 4, 5, 6]
    assert "wandb:" not in ended.stdout
    assert len(list((place / "profile").iterdir())) == 2
    assert "train.profile.ranks: [1] are not there; the run has 1" in ended.stdout
    assert "done: 6 steps" in ended.stdout and (place / "adapter" / "adapter_config.json").is_file()
