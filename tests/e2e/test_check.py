"""`vlm-dist check` through the real command line: a sound run, and faults of several stages at once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.tiny_run import Finished, TinyRun, make_tiny_run

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    return make_tiny_run(tmp_path_factory.mktemp("check"))


def check(run: TinyRun, *arguments: str) -> Finished:
    return run.command(["vlm-dist", "check", str(run.config), *arguments])


def levels(finished: Finished) -> dict[str, list[str]]:
    """Level -> what was found at it, with its name."""
    found: dict[str, list[str]] = {"PROBLEM": [], "WARNING": [], "ok": []}
    for line in finished.stdout.splitlines():
        level, _, rest = line.partition(" ")
        if level in found:
            found[level].append(" ".join(rest.split()))
    return found


def test_a_sound_run(run: TinyRun) -> None:
    sizes = ["--set", "train.per_device_train_batch_size=3", "--set", "train.max_steps=-1", "--world-size", "2"]
    every_stage = [word for name in ("data", "processor", "batch", "model", "step") for word in ("--stage", name)]
    finished = check(run, *sizes, *every_stage)
    assert finished.exit_code == 0, finished.output
    told = levels(finished)
    assert not told["PROBLEM"], finished.stdout
    assert "vlm-dist check" in finished.stdout.splitlines()[0] and "0 problems" in finished.stdout.splitlines()[0]
    said = "\n".join(told["ok"])
    # 48 samples: 4 steps of 12
    assert "batch global batch 12 = 3 per device x 2 accumulation x 2 ranks" in said
    assert "48 samples an epoch, 4 steps an epoch, 4 steps in all" in said
    assert "data.train[0] images 40 samples in 3 shards; 8 read (8 pictures)" in said
    assert "data.train[1] clips 8 samples; 8 read (8 clips)" in said
    assert "loss 0% of it on tokens of the prompt, 100% on answers" in said
    assert "in 20 layers with LoRA" in said
    assert "GiB are free" in said
    assert "step loss " in said and "gradients all " in said
    # tables: what the model gets, and what is trained
    assert "pixel_values_videos" in finished.stdout
    assert "model.language_model.layers.*.self_attn.q_proj lora     2" in finished.stdout
    # nothing is left behind
    assert not (run.directory / "run").exists()


def test_faults_of_several_stages_are_all_told(run: TinyRun) -> None:
    faults = [
        "train.sedd=3",
        "data.eval.0.path=nowhere",
        "collator.dataset_columns.question_column=quesiton",
        "model.model_classes.model.processor_class=Qwen2VLProcesor",
    ]
    entry = "model.model_classes.model={model_class: Qwen2VLForConditionalGeneration, import_path: transformers}"
    finished = check(run, *(word for fault in [entry, *faults] for word in ("--set", fault)))
    assert finished.exit_code == 2, finished.output
    problems = "\n".join(levels(finished)["PROBLEM"])
    assert "train.sedd: got an unknown key; did you mean seed?" in problems
    assert "nowhere" in problems
    assert "has no column 'quesiton'; it has: " in problems
    assert "Qwen2VLProcesor" in problems and "Qwen2VLProcessor" in problems.replace("Qwen2VLProcesor", "")
    assert finished.stdout.count("Traceback") == 0
    warnings = "\n".join(levels(finished)["WARNING"])
    assert "batch not looked at: the configuration has a problem" in warnings


def test_json_and_single_stages(run: TinyRun) -> None:
    finished = check(run, "--stage", "model", "--set", "peft.target_modules=[q_prj]", "--json")
    record = json.loads(finished.stdout)
    assert finished.exit_code == record["exit_code"] == 4
    assert [*record["stages"]] == ["config", "model"]
    problems = [one for one in record["stages"]["model"] if one["level"] == "problem"]
    assert len(problems) == 1 and "q_proj" in problems[0]["found"]

    wrong = check(run, "--world-size", "0")
    assert wrong.exit_code == 2 and "--world-size 0: expected 1 or more" in wrong.stderr


def test_a_base_that_gives_no_finite_loss(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    run = make_tiny_run(tmp_path, num_images=8, num_clips=2)
    weights = run.directory / "model" / "model.safetensors"
    tensors = load_file(weights)
    name = next(name for name in tensors if name.endswith("q_proj.weight"))
    tensors[name][0, 0] = float("nan")
    save_file(tensors, weights, metadata={"format": "pt"})
    finished = check(run, "--stage", "step")
    assert finished.exit_code == 7, finished.output
    assert "not finite" in "\n".join(levels(finished)["PROBLEM"]), finished.stdout
