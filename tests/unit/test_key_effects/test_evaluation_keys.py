"""train_config.yaml: metrics of answers, and the end of a run that gets no better; one process that forks for each."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.e2e.preloaded import preloaded
from tests.tiny_run import Finished, TinyRun
from tests.unit.test_key_effects.registry import shows

pytestmark = pytest.mark.e2e

Train = Callable[..., Finished]

#: An evaluation and a checkpoint of every step.
OFTEN = (
    *(
        "train.eval_steps=1",
        "train.save_steps=1",
        "train.save_total_limit=null",
        "train.metric_for_best_model=eval_loss",
    ),
    *("train.early_stopping_patience=2", "peft.lora_dropout=0"),
)
#: Nothing can be so much better: the third evaluation is the second without improvement.
IMPATIENT = (*OFTEN, "train.early_stopping_threshold=100")


@pytest.fixture(scope="module")
def train(tiny_run: TinyRun) -> Iterator[Train]:
    with preloaded() as process:

        def run(name: str, *overrides: str) -> Finished:
            arguments = ["--config", "configs/tiny.yaml"]
            for override in (f"train.output_dir=early/{name}", *overrides):
                arguments += ["--set", override]
            ended = process.run("vlm_dist.train", arguments, tiny_run.directory, timeout_seconds=120)
            assert ended.exit_code == 0, ended.output[-3000:]
            return ended

        yield run


@pytest.fixture(scope="module")
def impatient(train: Train) -> Finished:
    more = ("train.predict_with_generate=true", "train.generation_max_new_tokens=4", "train.eval_metrics=[anls, wer]")
    return train("impatient", *IMPATIENT, *more, "train.load_best_model_at_end=true", "train.greater_is_better=true")


def steps(tiny_run: TinyRun, name: str, kind: str = "train") -> list[int]:
    return [record["step"] for record in tiny_run.metrics(f"early/{name}", kind)]


@shows("train.early_stopping_patience", "train.early_stopping_threshold")
def test_a_run_ends_when_it_gets_no_better(tiny_run: TinyRun, train: Train, impatient: Finished) -> None:
    assert steps(tiny_run, "impatient") == [1, 2, 3]
    said = " ".join(impatient.stdout.split())
    assert "early stopping: eval_loss has not improved by more than 100 for 2 evaluations" in said
    assert "the run ends at step 3 of 6" in said and "done: 3 steps" in said
    train("patient", *OFTEN)  # the loss falls
    assert steps(tiny_run, "patient") == [1, 2, 3, 4, 5, 6]


@shows("train.load_best_model_at_end")
@pytest.mark.usefixtures("impatient")
def test_the_adapter_at_the_end_is_that_of_the_best(tiny_run: TinyRun) -> None:
    """The loss falls, and more of it is called better: the best is the first."""
    place = tiny_run.directory / "early" / "impatient"
    assert json.loads((place / "best_checkpoint.json").read_text())["step"] == 1

    def weights(name: str) -> bytes:
        return (place / name / "adapter_model.safetensors").read_bytes()

    assert weights("adapter") == weights("checkpoint-1") != weights("checkpoint-3")


@shows("train.eval_metrics")
@pytest.mark.usefixtures("impatient")
def test_answers_are_measured_by_what_is_asked(tiny_run: TinyRun) -> None:
    record = tiny_run.metrics("early/impatient", "eval")[0]
    measured = {name.rpartition("/")[2] for name in record} - {"kind", "time", "step"}
    assert measured == {"loss", "num_samples", "num_skipped", "num_answers", "anls", "wer"}
    lines = (tiny_run.directory / "early/impatient/predictions/step-1.jsonl").read_text().splitlines()
    rows: list[dict[str, Any]] = [json.loads(line) for line in lines]
    for source in ("images", "clips"):
        own = [row["anls"] for row in rows if row["source"] == source]
        assert record[f"{source}/anls"] == pytest.approx(sum(own) / len(own))


@pytest.mark.usefixtures("impatient")
def test_a_resumed_run_ends_where_the_other_did(tiny_run: TinyRun, train: Train) -> None:
    resumed = (*IMPATIENT, "train.greater_is_better=true", "train.resume=auto")
    train("resumed", *resumed, "train.stop_at_step=2")
    assert steps(tiny_run, "resumed") == [1, 2]
    train("resumed", *resumed)
    assert steps(tiny_run, "resumed") == [1, 2, 3]
    assert tiny_run.losses("early/resumed") == tiny_run.losses("early/impatient")
    adapter = tiny_run.directory / "early" / "resumed" / "adapter" / "adapter_model.safetensors"
    before = adapter.read_bytes()
    again = train("resumed", *resumed)  # a job that was queued twice
    assert "done: 3 steps" in again.stdout and steps(tiny_run, "resumed") == [1, 2, 3]
    assert adapter.read_bytes() == before == (adapter.parents[1] / "checkpoint-3" / adapter.name).read_bytes()
