"""200 steps of text, pictures, albums and clips on four ranks, with damaged samples: no rank waits for another.

One sample is one micro-batch of one rank, so that the ranks never do the same, and a damaged one leaves a rank with
nothing but dummies. Weights stay where they are, and every step's gradient is compared with the sum of the gradients of
its samples, each computed alone in a plain loop.
"""

from __future__ import annotations

from collections import Counter
from contextlib import chdir
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tests.numerics.in_process import Seen, run_here
from tests.numerics.mixed_data import SOURCES, write_rows
from tests.numerics.table import MAX_GRADIENT_DIFFERENCE, NUM_SAMPLES, make_table_run, plain_model
from tests.ranks import Ranks, run_ranks
from tests.tiny_run import TinyRun
from vlm_dist.build import make_lengths, make_materialisers, make_plan, make_processor, open_sources_alone
from vlm_dist.config import load_run
from vlm_dist.config.arithmetic import resolve_batch
from vlm_dist.data.materialise import Materialiser
from vlm_dist.data.types import MicroBatchJob

pytestmark = [pytest.mark.numerics, pytest.mark.engine]

NUM_STEPS = 200
WORLD_SIZE = 4
NUM_DAMAGED = 6
FROZEN = ("peft.towers.vision=freeze", "peft.towers.projector=freeze")
LANGUAGE = r"model\.language_model\..*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
CASES = {
    "zero2, tower trained": (2, ()),
    "zero3, tower trained": (3, ()),
    "zero2, tower frozen": (2, FROZEN),
    "zero3, tower frozen": (3, FROZEN),
}
DAMAGED = ', {"name": "damaged", "type": "jsonl", "path": "data/damaged.jsonl"}]'


def overrides(name: str) -> tuple[str, ...]:
    stage, towers = CASES[name]
    return (
        f"data.train={SOURCES[:-1]}{DAMAGED}",
        "data.eval=[]",
        "data.max_bad_share=1",
        *towers,
        "peft.lora_dropout=0",
        "train.learning_rate=1e-30",
        "train.max_grad_norm=0",
        "train.lr_scheduler_type=constant",
        "train.group_by_length=false",
        "train.gradient_checkpointing=false",
        "train.per_device_train_batch_size=1",
        "train.gradient_accumulation_steps=1",
        f"train.max_steps={NUM_STEPS}",
        f"deepspeed=ds_configs/z{stage}.json",
        f"train.output_dir={name.replace(', ', '-').replace(' ', '-')}",
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    made = make_table_run(tmp_path_factory.mktemp("long"))
    (made.directory / "data" / "damaged.png").write_bytes(b"no picture at all")
    row = {"image": "damaged.png", "question": "what?", "answer": "nothing", "video": None}
    write_rows(made.directory / "data" / "damaged.jsonl", [row] * NUM_DAMAGED)
    return made


def expected(run: TinyRun, name: str) -> tuple[list[dict[str, np.ndarray]], list[Counter[str]]]:
    """Each step's gradient from its samples' own, and the sources of its samples."""
    with chdir(run.directory):
        config = load_run(run.config, overrides(name))
        sources = open_sources_alone(config, "train")
        processor, family = make_processor(config)
        materialise = make_materialisers(config, sources, [], processor, family)
        lengths = make_lengths(config, sources, processor, family, materialise)
        plan = make_plan(config, sources, resolve_batch(config.train, WORLD_SIZE), lengths)
        alone = Materialiser(sources, processor, family, config.collator, frozenset(), config.train.seed)
        model = plain_model(run, LANGUAGE if CASES[name][1] else "all-linear")
        weights = {key: p for key, p in model.named_parameters() if p.requires_grad}
        known: dict[Any, tuple[int, dict[str, np.ndarray]]] = {}
        steps, kinds = [], []
        for step in plan.steps():
            refs = [ref for job in step.for_rank(0, 1) for ref in job.refs if ref is not None]
            for ref in refs:
                if (ref.source, ref.index) not in known:
                    batch = alone(MicroBatchJob(0, 0, (ref,)))
                    known[ref.source, ref.index] = _sum_of_one(model, weights, batch)
            found = [known[ref.source, ref.index] for ref in refs]
            total = sum(count for count, _ in found)
            kinds.append(Counter(sources[ref.source].name for ref in refs))
            steps.append({key: sum(gradient[key] for _, gradient in found) / max(total, 1) for key in weights})
    return steps, kinds


def _sum_of_one(model: Any, weights: dict[str, Any], batch: Any) -> tuple[int, dict[str, np.ndarray]]:
    if not batch.num_target_tokens:
        return 0, {key: np.zeros(p.shape) for key, p in weights.items()}
    logits = model(**batch.inputs).logits
    F.cross_entropy(logits[0, :-1], batch.labels[0, 1:], reduction="sum").backward()
    gradient = {
        key: np.zeros(p.shape) if p.grad is None else p.grad.double().numpy().copy() for key, p in weights.items()
    }
    model.zero_grad()
    return batch.num_target_tokens, gradient


@pytest.mark.parametrize("name", list(CASES))
def test_no_hang_and_every_gradient_is_the_plain_one(run: TinyRun, name: str) -> None:
    steps, kinds = expected(run, name)
    assert len(kinds) == NUM_STEPS
    assert set().union(*kinds) == {*NUM_SAMPLES, "damaged"}
    assert any(kind["damaged"] >= 2 for kind in kinds)  # half of the ranks have nothing
    assert any(kind["texts"] and kind["clips"] for kind in kinds)

    def train(ranks: Ranks) -> Seen:
        torch.set_num_threads(1)
        return run_here(ranks, run, overrides(name), gradients=True, anywhere=True)

    seen = run_ranks(train, WORLD_SIZE, timeout_seconds=400)[0]
    assert seen.error is None
    worst = 0.0
    trained = [step for step, targets in enumerate(seen.targets) if targets]
    assert len(seen.targets) == NUM_STEPS
    assert len(trained) == len(seen.gradients)
    for step, gradient in zip(trained, seen.gradients, strict=True):
        assert gradient.keys() == steps[step].keys()
        for key, ours in gradient.items():
            theirs = steps[step][key]
            norm = float(np.linalg.norm(theirs))
            difference = float(np.linalg.norm(ours - theirs))
            if norm == 0:
                assert difference == 0, (step, key)  # nothing to learn from, and nothing left over of another step
            else:
                worst = max(worst, difference / norm)
    print(f"{name}: {len(trained)} steps, largest difference {worst:.1e}")
    assert worst <= MAX_GRADIENT_DIFFERENCE
    output_dir = run.directory / name.replace(", ", "-").replace(" ", "-")
    assert len(list((output_dir / "quarantine").glob("rank-*.jsonl"))) == WORLD_SIZE  # every rank met some
