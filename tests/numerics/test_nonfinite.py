"""A step whose gradient is not finite changes nothing but the position, says who was to blame, and is found by all.

The poison is real: the frozen embedding of one character is NaN, and one sample has that character.
"""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from tests.numerics.in_process import Seen, run_here
from tests.numerics.mixed_data import write_rows
from tests.ranks import Ranks, run_ranks
from tests.tiny_run import TinyRun, make_tiny_run
from vlm_dist.build import RunParts

pytestmark = [pytest.mark.numerics, pytest.mark.engine]

POISON = "~"
ROWS = [
    {
        "question": "how many " * (number % 3 + 1),
        "answer": f"{number} " * (number % 5 + 1),
        "image": None,
        "video": None,
    }
    for number in range(16)
]
TEXTS = '[{"name": "texts", "type": "jsonl", "path": "data/texts.jsonl"}]'
POISONED = '[{"name": "texts", "type": "jsonl", "path": "data/poisoned.jsonl"}]'
SETTINGS = (
    "data.eval=[]",
    "collator.data_processing.image_data=false",
    "collator.data_processing.video_data=false",
    'collator.message_format.training_messages=[{role: user, content: [{type: text, text: "{question_column}"}]}, '
    '{role: assistant, content: [{type: text, text: "{answer_column}"}]}]',
    "peft.lora_dropout=0",
    "train.group_by_length=false",
    "train.num_train_epochs=1",
    "train.max_steps=-1",
    "train.lr_scheduler_type=constant",
)
#: 16 texts in steps of 4: four steps.
BATCH = ("train.per_device_train_batch_size=2", "train.gradient_accumulation_steps=1")
BF16 = ("train.bf16=true", "model.loading_params.torch_dtype=bfloat16")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    made = make_tiny_run(tmp_path_factory.mktemp("poison"), num_images=4, num_clips=4)
    write_rows(made.directory / "data" / "texts.jsonl", ROWS)
    poisoned = [dict(row) for row in ROWS]
    poisoned[5]["question"] += POISON
    write_rows(made.directory / "data" / "poisoned.jsonl", poisoned)
    for stage in (0, 1, 2, 3):
        zero: dict[str, Any] = {"stage": stage}
        if stage == 3:
            zero["stage3_param_persistence_threshold"] = 0
        (made.directory / "ds_configs" / f"z{stage}.json").write_text(json.dumps({"zero_optimization": zero}))
    tokenizer = AutoTokenizer.from_pretrained(made.directory / "model")
    ids = tokenizer(f"how many {POISON}", add_special_tokens=False)["input_ids"]
    others = {i for row in ROWS for i in tokenizer(row["question"] + row["answer"])["input_ids"]}
    (token,) = set(ids) - others
    path = made.directory / "model" / "model.safetensors"
    weights = load_file(path)
    (name,) = [name for name in weights if name.endswith("embed_tokens.weight")]
    weights[name][token] = torch.nan
    save_file(weights, path, metadata={"format": "pt"})
    return made


def overrides(name: str, *more: str) -> tuple[str, ...]:
    return (*SETTINGS, *BATCH, f"data.train={POISONED}", f"train.output_dir=out-{name}", *more)


def without_step(parts: RunParts, step: int) -> None:
    """The run would not have that step at all."""
    parts.trainer.feed = (one for one in parts.trainer.feed if one.plan.step != step)  # type: ignore[assignment]


def train(ranks: Ranks, run: TinyRun) -> dict[str, Any]:
    """All cases, one after the other, on the same ranks."""
    seen: dict[str, Any] = {}
    for stage, precision in CASES:
        name = f"zero{stage}{precision}"
        common = (f"deepspeed=ds_configs/z{stage}.json", *(BF16 if precision else ()))
        skipped = run_here(ranks, run, overrides(name, *common))
        bad = skipped.applied.index(False)
        expected = run_here(ranks, run, overrides(f"{name}-without", *common), prepare=partial(without_step, step=bad))
        seen[name] = (skipped, expected)
    seen["fail"] = run_here(ranks, run, overrides("fail", "train.nonfinite_steps=fail"))
    seen["all"] = run_here(
        ranks,
        run,
        overrides("all", "train.max_nonfinite_steps=2", "train.num_train_epochs=2"),
        prepare=lambda parts: break_losses(parts, first=1),
    )
    return seen


def break_losses(parts: RunParts, first: int) -> None:
    """From a step on rank 1 meets a loss of inf, whose gradient is finite."""
    loss, rank = parts.trainer.engine.loss, parts.trainer.ranks.rank

    def broken(*args: Any) -> torch.Tensor:
        value = loss(*args)
        is_broken = rank == 1 and parts.trainer.position >= first
        return value + torch.inf if is_broken else value

    parts.trainer.engine.loss = broken  # type: ignore[method-assign]


CASES = [(0, ""), (1, ""), (2, ""), (3, ""), (0, "-bf16"), (1, "-bf16"), (2, "-bf16")]


@pytest.fixture(scope="module")
def seen(run: TinyRun) -> list[dict[str, Any]]:
    return run_ranks(train, 2, run, timeout_seconds=240)


@pytest.mark.parametrize("name", [f"zero{stage}{precision}" for stage, precision in CASES])
def test_a_poisoned_step_is_as_if_it_were_not_in_the_plan(run: TinyRun, seen: Any, name: str) -> None:
    skipped, expected = (seen[0][name][i] for i in range(2))
    assert skipped.applied.count(False) == 1
    assert [rank[name][0].applied for rank in seen] == [skipped.applied] * 2  # all ranks alike
    assert expected.applied == [True] * 3
    assert skipped.state.keys() == expected.state.keys()
    assert skipped.state["step"] == expected.state["step"] == 3
    for key, parts in skipped.state.items():
        for part, values in parts.items() if key != "step" else ():
            assert np.array_equal(values, expected.state[key][part]), (key, part)
    bad = skipped.applied.index(False) + 1
    records = {record["step"]: record for record in run.metrics(f"out-{name}")}
    assert [records[step]["num_nonfinite_steps"] for step in (1, 2, 3, 4)] == [
        int(step == bad) for step in (1, 2, 3, 4)
    ]
    assert (records[bad]["loss"], records[bad]["grad_norm"]) == (None, None)
    (told,) = [text for text in skipped.messages if f"step {bad}: the gradient" in text]
    assert "of 28 parameters (language 28; e.g. base_model.model.model.language_model.layers.0." in told
    assert "has the loss nan (" in told
    assert "texts/poisoned.jsonl:6" in told
    assert "nothing was updated (1 in a row, 1 since the start)" in told


def test_fail_ends_all_ranks_with_the_state_before(run: TinyRun, seen: Any) -> None:
    bad = seen[0]["zero2"][0].applied.index(False)
    for rank in seen:
        ended: Seen = rank["fail"]
        assert ended.applied == [True] * bad + [False]
        assert ended.error is not None
        assert ended.error.startswith(f"DivergedError: step {bad + 1}: the gradient of ")
        assert "train.nonfinite_steps is fail" in ended.error
    assert bad > 0
    assert [path.name for path in (run.directory / "out-fail").glob("checkpoint-*")] == [f"checkpoint-{bad}"]


def test_a_run_that_meets_nothing_else_ends(run: TinyRun, seen: Any) -> None:
    """An infinite loss counts though its gradient is finite, and a good step would begin the count anew."""
    for rank in seen:
        ended: Seen = rank["all"]
        assert ended.applied == [True, False, False]
        assert ended.error is not None
        assert "step 3: the gradient of" in ended.error
        assert "it is the 2nd step in a row, and train.max_nonfinite_steps is 2" in ended.error
        assert "rank 1: micro-batch" in ended.error
        (told,) = [text for text in ended.messages if "step 2: the gradient of" in text]
        assert "rank 1: micro-batch 1 has the loss inf (texts/poisoned.jsonl:" in told
    assert sorted(path.name for path in (run.directory / "out-all").glob("checkpoint-*")) == ["checkpoint-2"]
