"""One truth for the loss: however a step is cut, and wherever the run goes on, the real command line trains the same.

ZeRO-2 on two ranks, ZeRO-3 on two ranks and plain Python on one are compared with each other and with two loops of
plain PyTorch, in float32 and without dropout. The data has pictures, clips, micro-batches without the one or the other
(which get dummy rows), and a last step with empty slots and an empty micro-batch.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Qwen2VLForConditionalGeneration

from tests.numerics.finished_runs import checkpoints, figures, masters, max_difference, train
from tests.tiny_run import TinyRun, make_tiny_run
from vlm_dist import cli
from vlm_dist.build import make_lengths, make_materialisers, make_plan, make_processor, open_sources_alone
from vlm_dist.config import RunConfig, load_run
from vlm_dist.config.arithmetic import resolve_batch
from vlm_dist.data.materialise import Materialiser
from vlm_dist.data.types import MicroBatch, MicroBatchJob
from vlm_dist.model import attach_adapter

pytestmark = [pytest.mark.numerics, pytest.mark.e2e]

NUM_STEPS = 6
GLOBAL_BATCH_SIZE = 8
LEARNING_RATE = 1e-3
WEIGHT_DECAY = 0.01
MAX_GRAD_NORM = 1.0
#: Large against rounding noise in gradients that are almost zero, which Adam would else blow up to whole steps.
ADAM_EPSILON = 1e-6
SETTINGS = (
    "peft.lora_dropout=0",
    "train.save_steps=3",
    f"train.max_steps={NUM_STEPS}",
    f"train.learning_rate={LEARNING_RATE}",
    f"train.weight_decay={WEIGHT_DECAY}",
    f"train.max_grad_norm={MAX_GRAD_NORM}",
    f"train.adam_epsilon={ADAM_EPSILON}",
)
ONE_RANK = ("train.gradient_accumulation_steps=4",)
ZERO3 = ("deepspeed=ds_configs/tiny3.json",)
FINAL = f"checkpoint-{NUM_STEPS}"

#: Relative difference of losses and gradient norms; seen: 1.2e-7, which is the rounding of float32.
LOSS_TOLERANCE = 1e-6
#: Absolute difference of a weight after six steps, which move weights by up to 3.5e-3; seen: 6e-7.
WEIGHT_TOLERANCE = 3e-6


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    return make_tiny_run(tmp_path_factory.mktemp("invariance"), num_images=37)


@pytest.fixture(scope="module")
def two_ranks(run: TinyRun) -> Path:
    """2 per device x 2 accumulation x 2 ranks, ZeRO-2."""
    train(run, "two_ranks", *SETTINGS, processes=2)
    return run.directory / "two_ranks"


@pytest.fixture(scope="module")
def zero3(run: TinyRun) -> Path:
    """The same under ZeRO-3, every adapter weight partitioned."""
    train(run, "zero3", *SETTINGS, *ZERO3, processes=2)
    return run.directory / "zero3"


@pytest.fixture(scope="module")
def one_rank(run: TinyRun) -> Path:
    """2 per device x 4 accumulation x 1 rank, plain Python."""
    train(run, "one_rank", *SETTINGS, *ONE_RANK)
    return run.directory / "one_rank"


class PlainLoop:
    """The same training in plain PyTorch: transformers, peft, torch's AdamW, and the loss as the page defines it."""

    def __init__(self, run: TinyRun, config: RunConfig) -> None:
        model = Qwen2VLForConditionalGeneration.from_pretrained(run.directory / "model", dtype=torch.float32)
        adapter = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
        self.model = get_peft_model(model, adapter)
        self.weights = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self._start_like(run, config)
        self.model.train()
        self.optimizer = torch.optim.AdamW(
            self.weights.values(), lr=LEARNING_RATE, eps=ADAM_EPSILON, weight_decay=WEIGHT_DECAY
        )
        self.start = {name: p.detach().clone() for name, p in self.weights.items()}
        self.losses: list[float] = []
        self.grad_norms: list[float] = []
        self.learning_rates: list[float] = []

    def _start_like(self, run: TinyRun, config: RunConfig) -> None:
        """The random start alone is the project's: a function of the seed and each layer's name."""
        base = Qwen2VLForConditionalGeneration.from_pretrained(run.directory / "model", dtype=torch.float32)
        theirs = attach_adapter(base, config.peft, config.peft.towers.model_dump(), seed=config.train.seed)
        start = {name: p for name, p in theirs.named_parameters() if p.requires_grad}
        assert self.weights.keys() == start.keys()
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.copy_(start[name])

    def step(self, micro_batches: Sequence[tuple[dict[str, Tensor], Tensor]]) -> None:
        index = len(self.losses)
        # one step of warm-up at half the rate, then a cosine that would reach 0 after the last step
        factor = 0.5 if index == 0 else 0.5 * (1 + math.cos(math.pi * (index - 1) / (NUM_STEPS - 1)))
        for group in self.optimizer.param_groups:
            group["lr"] = LEARNING_RATE * factor
        self.learning_rates.append(LEARNING_RATE * factor)
        num_targets = sum(int((labels[:, 1:] != -100).sum()) for _, labels in micro_batches)
        loss_sum = 0.0
        for inputs, labels in micro_batches:
            logits = self.model(**inputs).logits
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
            loss_sum += float(loss.detach())
            (loss / num_targets).backward()
        self.losses.append(loss_sum / num_targets)
        self.grad_norms.append(float(nn.utils.clip_grad_norm_(self.weights.values(), MAX_GRAD_NORM)))
        self.optimizer.step()
        self.optimizer.zero_grad()

    def final(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self.weights.items()}


class Project:
    """The project's own plan and materialiser, as the trainer builds them."""

    def __init__(self, run: TinyRun) -> None:
        self.config = load_run(run.config, SETTINGS)
        self.sources = open_sources_alone(self.config, "train")
        self.processor, self.family = make_processor(self.config)
        self.materialise = make_materialisers(self.config, self.sources, [], self.processor, self.family)
        lengths = make_lengths(self.config, self.sources, self.processor, self.family, self.materialise)
        batch = resolve_batch(self.config.train, 1, GLOBAL_BATCH_SIZE)
        self.plan = make_plan(self.config, self.sources, batch, lengths)

    def steps(self) -> Iterator[list[MicroBatch]]:
        """The trainer's micro-batches, with padding and dummy rows."""
        for step in self.plan.steps():
            yield [self.materialise(job) for job in step.for_rank(0, 1)]

    def single_samples(self) -> Iterator[list[MicroBatch]]:
        """The same samples one by one: nothing is padded, and there are no dummies."""
        config = self.config
        alone = Materialiser(self.sources, self.processor, self.family, config.collator, frozenset(), config.train.seed)
        for step in self.plan.steps():
            refs = [ref for job in step.for_rank(0, 1) for ref in job.refs if ref is not None]
            yield [alone(MicroBatchJob(step.step, index, (ref,))) for index, ref in enumerate(refs)]


@pytest.fixture(scope="module")
def loops(run: TinyRun) -> dict[str, tuple[PlainLoop, list[list[MicroBatch]]]]:
    """Plain loops over the trainer's micro-batches, and over single samples."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(run.directory)
        project = Project(run)
        assert project.plan.num_steps == NUM_STEPS
        loops = {}
        for name, steps in (
            ("micro-batches", list(project.steps())),
            ("single samples", list(project.single_samples())),
        ):
            loop = PlainLoop(run, project.config)
            for micro_batches in steps:
                loop.step([(batch.inputs, batch.labels) for batch in micro_batches])
            loops[name] = (loop, steps)
    return loops


def test_the_data_has_every_kind_of_micro_batch(loops: Any) -> None:
    steps = loops["micro-batches"][1]
    kinds = {tuple(sorted({origin.source for origin in batch.origins})) for step in steps for batch in step}
    assert kinds == {("images",), ("clips",), ("clips", "images"), ()}
    for batch in (batch for step in steps for batch in step):  # the same towers are called by all of them
        assert {"pixel_values", "pixel_values_videos"} <= batch.inputs.keys()
    assert [sum(batch.num_samples for batch in step) for step in steps] == [8, 8, 8, 8, 8, 5]
    alone = [batch for step in loops["single samples"][1] for batch in step]
    assert len(alone) == 45
    for batch in alone:
        assert batch.labels.shape[0] == 1
        assert batch.num_tokens == batch.num_computed_tokens
        assert ("pixel_values" in batch.inputs) != ("pixel_values_videos" in batch.inputs)


@pytest.mark.parametrize("loop_name", ["micro-batches", "single samples"])
@pytest.mark.parametrize("run_name", ["two_ranks", "zero3", "one_rank"])
def test_equals_a_plain_loop(
    run: TinyRun, loops: Any, run_name: str, loop_name: str, request: pytest.FixtureRequest
) -> None:
    directory = request.getfixturevalue(run_name)
    loop: PlainLoop = loops[loop_name][0]
    records = list(figures(run, run_name).values())
    assert len(records) == NUM_STEPS
    assert [record["loss"] for record in records] == pytest.approx(loop.losses, rel=LOSS_TOLERANCE)
    assert [record["grad_norm"] for record in records] == pytest.approx(loop.grad_norms, rel=LOSS_TOLERANCE)
    assert [record["learning_rate"] for record in records] == pytest.approx(loop.learning_rates, rel=1e-12)
    assert min(loop.grad_norms) > MAX_GRAD_NORM  # so that clipping is at work in every step
    trained = masters(directory / FINAL)
    moved = max_difference(trained, loop.start)
    difference = max_difference(trained, loop.final())
    assert moved > 1e-3
    assert difference <= WEIGHT_TOLERANCE


@pytest.mark.parametrize("name", ["zero3", "one_rank"])
def test_equals_two_ranks_under_zero2(run: TinyRun, two_ranks: Path, name: str, request: pytest.FixtureRequest) -> None:
    assert_equal_within_rounding(run, request.getfixturevalue(name), two_ranks, first_step=1)


def assert_equal_within_rounding(run: TinyRun, directory: Path, wanted: Path, first_step: int) -> None:
    """Compare all figures from a step on, and the weights at the end."""
    ours, theirs = run.metrics(directory.name), figures(run, wanted.name)
    assert [record["step"] for record in ours] == list(range(first_step, NUM_STEPS + 1))
    for record in ours:
        expected = theirs[record["step"]]
        for exact in ("epoch", "num_target_tokens", "null_slots/tail", "learning_rate"):
            assert record[exact] == expected[exact], (record["step"], exact)
        for figure in ("loss", "grad_norm"):
            assert record[figure] == pytest.approx(expected[figure], rel=LOSS_TOLERANCE), (record["step"], figure)
    difference = max_difference(masters(directory / FINAL), masters(wanted / FINAL))
    assert difference <= WEIGHT_TOLERANCE


def take_over(run: TinyRun, name: str, origin: Path) -> None:
    """Begin a directory with nothing but another run's third checkpoint: only it is known of the first steps."""
    assert checkpoints(run, origin.name) == ["checkpoint-3", FINAL]
    shutil.copytree(origin / "checkpoint-3", run.directory / name / "checkpoint-3")


@pytest.mark.parametrize(
    ("origin_name", "processes", "overrides", "told"),
    [
        ("two_ranks", 0, (), "global batch 8 = 2 per device x 4 accumulation x 1 ranks"),
        ("zero3", 0, (), "global batch 8 = 2 per device x 4 accumulation x 1 ranks"),
        ("one_rank", 3, ZERO3, "global batch 8 = 2 per device x 2 accumulation x 3 ranks (33% of it empty)"),
    ],
    ids=["2-to-1", "2-to-1-zero3-to-zero2", "1-to-3-zero2-to-zero3"],
)
def test_goes_on_with_other_ranks_and_stages(
    run: TinyRun,
    origin_name: str,
    processes: int,
    overrides: tuple[str, ...],
    told: str,
    request: pytest.FixtureRequest,
) -> None:
    """The global batch is the checkpoint's, so every step has the same samples as if nothing had changed."""
    origin = request.getfixturevalue(origin_name)
    name = request.node.callspec.id
    take_over(run, name, origin)
    ended = train(run, name, *SETTINGS, *overrides, "train.resume=auto", processes=processes)
    assert told in ended.output
    assert f"resumed from {name}/checkpoint-3 at step 3 of {NUM_STEPS}" in ended.output
    assert_equal_within_rounding(run, run.directory / name, origin, first_step=4)
    topology = json.loads((run.directory / name / FINAL / "training_state.json").read_text())["topology"]
    assert topology == {"world_size": max(1, processes), "zero_stage": 3 if overrides else 2}


def ledger(run: TinyRun, step: int, world_size: int, *overrides: str) -> list[dict[str, Any]]:
    """What `vlm-dist plan` says of a step, slot by slot."""
    output = io.StringIO()
    arguments = [str(run.config), "--step", str(step), "--world-size", str(world_size)]
    for override in (*SETTINGS, *overrides):
        arguments += ["--set", override]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(output):
        patch.chdir(run.directory)
        assert cli.main(["plan", *arguments]) == 0
    return [json.loads(line) for line in output.getvalue().splitlines()]


def samples(lines: list[dict[str, Any]]) -> list[tuple[int, str, str, str]]:
    """Micro-batch and origin of each slot that has a sample."""
    return sorted((line["micro_batch"], line["source"], line["shard"], line["key"]) for line in lines if "key" in line)


def test_the_ledger_is_the_same_on_any_number_of_ranks(run: TinyRun, two_ranks: Path, loops: Any) -> None:
    seen: list[tuple[str, str, str]] = []
    for step, micro_batches in enumerate(loops["micro-batches"][1]):
        wanted = [
            (index, origin.source, origin.shard, origin.key)
            for index, batch in enumerate(micro_batches)
            for origin in batch.origins
        ]
        for world_size, accumulation in ((1, 4), (2, 2), (4, 1)):
            lines = ledger(run, step, world_size, f"train.gradient_accumulation_steps={accumulation}")
            assert samples(lines) == sorted(wanted)
            assert {line["rank"] for line in lines} == set(range(world_size))
        # once there is a checkpoint, its global batch counts, as for the trainer
        assert samples(ledger(run, step, 1, "train.output_dir=two_ranks")) == sorted(wanted)
        assert samples(ledger(run, step, 3, "train.output_dir=two_ranks")) == sorted(wanted)
        seen += [(source, shard, key) for _, source, shard, key in wanted]
    assert len(seen) == len(set(seen)) == 45  # nothing lost, nothing repeated
    command = [sys.executable, "-m", "vlm_dist.cli", "plan", str(run.config), "--step", "0", "--world-size", "2"]
    assert len(run.command(command).stdout.splitlines()) == GLOBAL_BATCH_SIZE
