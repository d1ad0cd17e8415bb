"""`vlm-dist eval`, `python -m vlm_dist.eval` on two ranks, and `vlm-dist generate`, after a short run."""

from __future__ import annotations

import hashlib
import json
import os
import pty
import select
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.preloaded import Preloaded
from tests.tiny_run import Finished, TinyRun, make_tiny_run
from vlm_dist.distributed.group import free_port

pytestmark = pytest.mark.e2e

Command = Callable[..., Finished]

ANSWERS = ("train.predict_with_generate=true", "train.generation_max_new_tokens=6", "train.eval_metrics=[anls, wer]")
QUESTION = "Which digit is this?"


@pytest.fixture(scope="module")
def run(process: Preloaded, tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """Two steps, with an evaluation and a checkpoint of each; the first is called the best."""
    made = make_tiny_run(tmp_path_factory.mktemp("trained"), num_images=8, num_clips=4)
    settings = [
        "train.max_steps=2",
        "train.eval_steps=1",
        "train.save_steps=1",
        "train.metric_for_best_model=eval_loss",
    ]
    arguments = ["--config", "configs/tiny.yaml"]
    for override in (*settings, *ANSWERS, "train.greater_is_better=true", "train.learning_rate=0.01"):
        arguments += ["--set", override]
    ended = process.run("vlm_dist.train", arguments, made.directory, timeout_seconds=120)
    assert ended.exit_code == 0, ended.output[-3000:]
    with tarfile.open(next((made.directory / "data" / "images-heldout").glob("*.tar"))) as tar:
        for name, member in (("first.png", "000000.png"), ("second.png", "000001.png")):
            (made.directory / name).write_bytes(tar.extractfile(member).read())  # type: ignore[union-attr]
    with tarfile.open(next((made.directory / "data" / "clips-heldout").glob("*.tar"))) as tar:
        (made.directory / "clip.mp4").write_bytes(tar.extractfile("000000.mp4").read())  # type: ignore[union-attr]
    return made


@pytest.fixture
def vlm_dist(process: Preloaded, run: TinyRun) -> Command:
    """The command line, which leaves everything alone but its own folder."""

    def command(*arguments: str, ok: bool = True, directory: Path | None = None) -> Finished:
        before = digests(run.directory)
        ended = process.run("vlm_dist.cli", list(arguments), directory or run.directory, timeout_seconds=120)
        assert (ended.exit_code == 0) is ok, ended.output[-3000:]
        assert digests(run.directory) == before
        return ended

    return command


def digests(directory: Path) -> dict[str, str]:
    files = [
        path for path in directory.rglob("*") if path.is_file() and "eval" not in path.parts and path.suffix != ".out"
    ]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def report(run: TinyRun, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run.directory / "run" / "eval" / name / "metrics.json").read_text())
    return found


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def evaluate(vlm_dist: Command, *arguments: str, ok: bool = True) -> Finished:
    return vlm_dist("eval", "configs/tiny.yaml", "--set", "train.generation_max_new_tokens=6", *arguments, ok=ok)


def figures_of(record: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if "/" in name}


def test_the_figures_are_those_of_training(run: TinyRun, vlm_dist: Command) -> None:
    ended = evaluate(vlm_dist, "--checkpoint", "best", "--metrics", "anls,wer")
    found = report(run, "checkpoint-1-eval")
    assert found["figures"] == figures_of(run.metrics("run", "eval")[0])
    told = found["evaluated"]
    weights = run.directory / "run" / "checkpoint-1" / "adapter_model.safetensors"
    assert told["adapter_sha256"]["adapter_model.safetensors"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert [(one["name"], one["num_samples"]) for one in told["sources"]] == [("images", 5), ("clips", 3)]
    assert all(one["manifest_hash"] for one in told["sources"]) and told["base_model"] == "model"
    answers = run.directory / "run" / "eval" / "checkpoint-1-eval" / "predictions.jsonl"
    assert lines(answers) == lines(run.directory / "run" / "predictions" / "step-1.jsonl")
    header, *rows = ended.stdout.splitlines()
    assert header.split()[:3] == ["loss", "num_samples", "num_skipped"] and "anls" in header
    assert [row.split()[0] for row in rows[:3]] == ["images", "clips", "overall"]


def test_two_ranks_under_zero_3_find_the_same(run: TinyRun) -> None:
    """From another directory than the run's, by its resolved configuration, and into files of one's own."""
    launcher = [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", "2", "--master_port", str(free_port())]
    options = ["--checkpoint", "latest", "--metrics", "anls,wer", "-o", "mine/answers.jsonl"]
    command = [*launcher, "-m", "vlm_dist.eval", "--config", "run/resolved_config.yaml", *options]
    ended = run.command([*command, "--set", "deepspeed=ds_configs/tiny3.json"])
    assert ended.exit_code == 0, ended.output[-3000:]
    found = json.loads((run.directory / "mine" / "answers.metrics.json").read_text())
    assert found["figures"] == pytest.approx(figures_of(run.metrics("run", "eval")[1]), rel=1e-4)
    assert (found["evaluated"]["world_size"], found["evaluated"]["zero_stage"]) == (2, 3)
    assert lines(run.directory / "mine" / "answers.jsonl") == lines(
        run.directory / "run" / "predictions" / "step-2.jsonl"
    )
    assert ended.stdout.count("overall") == 1


def test_the_base_the_training_samples_and_the_loss_alone(run: TinyRun, vlm_dist: Command) -> None:
    evaluate(vlm_dist, "--metrics", "loss")  # by itself the adapter of the end
    end = report(run, "adapter-eval")
    assert end["figures"] == {name: value for name, value in end["figures"].items() if "anls" not in name}
    assert end["evaluated"]["generation"] is None
    assert not (run.directory / "run" / "eval" / "adapter-eval" / "predictions.jsonl").exists()
    evaluate(vlm_dist, "--base", "--metrics", "loss")
    base = report(run, "base-eval")
    assert base["evaluated"]["adapter"] is None
    assert base["figures"]["images/loss"] != end["figures"]["images/loss"]
    evaluate(vlm_dist, "--split", "train", "--max-samples", "3", "--metrics", "loss")
    train = report(run, "adapter-train")
    assert (train["figures"]["images/num_samples"], train["figures"]["clips/num_samples"]) == (3, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--metrics", "f1"], "--metrics: got f1, expected loss"),
        (["--max-samples", "0"], "--max-samples: got 0, expected 1 or more"),
        (["--adapter", "elsewhere"], "elsewhere is no directory with adapter_config.json"),
        (["--set", "peft.r=4"], "r: 8 there, 4 here"),
        (["--set", "train.output_dir=other"], "other has no adapter/: the run is not done"),
        (["--set", "train.output_dir=other", "--checkpoint", "best"], "other has no best checkpoint"),
        (["--set", "train.output_dir=other", "--checkpoint", "latest"], "other has no complete checkpoint"),
        (["--set", "data.eval=[]"], "data.eval is empty"),
    ],
)
def test_what_cannot_be_evaluated_is_said(vlm_dist: Command, arguments: list[str], message: str) -> None:
    ended = evaluate(vlm_dist, *arguments, ok=False)
    assert message in ended.stderr and "Traceback" not in ended.stderr


def test_generate_answers_as_evaluation_does(run: TinyRun, vlm_dist: Command) -> None:
    """Only the answer is printed, since nobody looks; from any directory, where it is told of the base model."""
    wanted = lines(run.directory / "run" / "predictions" / "step-2.jsonl")
    limit = ("--max-new-tokens", "6")
    ended = vlm_dist("generate", "--adapter", "run/adapter", "--image", "first.png", *limit, QUESTION)
    assert ended.stdout == wanted[0]["prediction"] + "\n"
    away = ("--adapter", f"{run.directory}/run/checkpoint-2", "--base-model", f"{run.directory}/model")
    clip = ("--video", f"{run.directory}/clip.mp4")
    elsewhere = run.directory.parent
    ended = vlm_dist("generate", *away, *clip, *limit, "Which digits are shown?", directory=elsewhere)
    assert ended.stdout == wanted[5]["prediction"] + "\n"


def test_generate_asks_on(run: TinyRun) -> None:
    """Several pictures; each line of the input is a question."""
    command = "vlm-dist generate configs/tiny.yaml --image first.png --image second.png --max-new-tokens 3"
    asked = run.command(["bash", "-c", f"printf 'one?\\n\\ntwo?\\n' | {command} --temperature 0.5"])
    assert asked.exit_code == 0, asked.output[-2000:]
    assert asked.stdout.count("\n") >= 2


def test_generate_talks_on_a_terminal(run: TinyRun) -> None:
    """Tokens come as they are made, behind a prompt; Ctrl-D ends."""
    screen, terminal = pty.openpty()
    command = ["vlm-dist", "generate", "--adapter", "run/adapter", "--image", "first.png", "--max-new-tokens", "4"]
    talking = subprocess.Popen(
        command,
        cwd=run.directory,
        env=run.environment() | {"TERM": "dumb"},
        stdin=terminal,
        stdout=terminal,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    os.close(terminal)

    def read_until(text: bytes) -> str:
        """What is typed before the prompt is there would not be seen as typed."""
        said, deadline = b"", time.monotonic() + 60
        while not said.endswith(text):
            readable, _, _ = select.select([screen], [], [], max(0.0, deadline - time.monotonic()))
            assert readable, said
            said += os.read(screen, 4096)
        return said.decode(errors="replace")

    try:
        read_until(b"> ")
        os.write(screen, f"{QUESTION}\n".encode())
        answered = read_until(b"> ")
        os.write(screen, b"\x04")
        assert talking.wait(30) == 0
    finally:
        talking.kill()
        os.close(screen)
    answer = lines(run.directory / "run" / "predictions" / "step-2.jsonl")[0]["prediction"].strip("\ufffd")[:1]
    assert answer in answered.partition(QUESTION)[2]


def test_the_prompt_is_that_of_training(run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """Token by token, and pixel by pixel: what training has before the answer."""
    import torch

    from vlm_dist.build import make_materialisers, make_processor, open_sources_alone
    from vlm_dist.build.answering import Prompts, load_answering_config, read_media
    from vlm_dist.data.types import MicroBatchJob, SampleRef

    monkeypatch.chdir(run.directory)
    (run.directory / "ds_configs" / "tiny2.json").rename(run.directory / "moved.out")  # nobody needs it
    config = load_answering_config(Path("run/resolved_config.yaml"), [], None)
    (run.directory / "moved.out").rename(run.directory / "ds_configs" / "tiny2.json")
    processor, family = make_processor(config)
    held_out = open_sources_alone(config, "eval")
    trained = make_materialisers(config, held_out, held_out, processor, family).materialisers["train"]
    prompts = Prompts(config, processor, family)
    for source, question, images, videos in (
        (0, QUESTION, read_media([Path("first.png")]), []),
        (1, "Which digits are shown?", [], read_media([Path("clip.mp4")])),
    ):
        sample = trained(MicroBatchJob(0, 0, (SampleRef(source, 0),)))
        asked = prompts.prompt(question, images, videos)
        num_prompt = int((sample.labels[0] != -100).nonzero()[0])
        assert asked.inputs["input_ids"][0].tolist() == sample.inputs["input_ids"][0, :num_prompt].tolist()
        pixels = "pixel_values_videos" if videos else "pixel_values"
        shape = asked.inputs[pixels].shape[0]
        assert torch.equal(asked.inputs[pixels], sample.inputs[pixels][:shape])
    im_end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert prompts.ends(frozenset([im_end]), QUESTION) == {im_end}


def test_other_variables_and_conversations(run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    from vlm_dist.build import make_processor
    from vlm_dist.build.answering import Prompts, load_answering_config
    from vlm_dist.errors import ConfigError

    monkeypatch.chdir(run.directory)

    def prompts(*overrides: str) -> tuple[Prompts, Any]:
        config = load_answering_config(Path("configs/tiny.yaml"), overrides, None)
        processor, family = make_processor(config)
        return Prompts(config, processor, family), processor

    texts = {"type": "text", "text": "{question_column} {hint}"}, {"type": "text", "text": "{answer_column}"}
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "video"}, texts[0]]},
        {"role": "assistant", "content": [texts[1]]},
    ]
    made, processor = prompts(
        f"collator.message_format.training_messages={json.dumps(messages)}", "collator.dataset_columns.hint=hint"
    )
    with pytest.raises(ConfigError, match="other variables, too: give them with --field hint=TEXT"):
        made.prompt("which?")
    with pytest.raises(ConfigError, match="no variable clue, only hint, question_column"):
        made.prompt("which?", values={"clue": "x"})
    asked = made.prompt("which?", values={"hint": "a digit"})
    assert "which? a digit<|im_end|>" in processor.tokenizer.decode(asked.inputs["input_ids"][0])
    made, processor = prompts("collator.dataset_columns.messages_column=messages")
    text = processor.tokenizer.decode(made.prompt("which?").inputs["input_ids"][0])
    assert text.endswith("<|im_start|>user\nwhich?<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--adapter", "nowhere", "why?"], "--adapter: no such directory: nowhere"),
        (["--adapter", "model", "why?"], "nobody knows the prompt that it was trained with"),
        (["--adapter", "run/adapter", "--image", "none.png", "why?"], "none.png cannot be read: No such file"),
        (["--adapter", "run/adapter", "--image", "configs/tiny.yaml", "why?"], "configs/tiny.yaml"),
        (["--adapter", "run/adapter", "two", "questions"], "got 2 questions; put the words of one between quotes"),
        (["why?"], "name an adapter (--adapter DIR), or a run file"),
        (["--adapter", "run/adapter", "--base-model", "gone/model", "why?"], "gone/model"),
        (
            [
                "--adapter",
                "run/adapter",
                "--set",
                "collator.data_processing.video_data=false",
                "--video",
                "clip.mp4",
                "?",
            ],
            "the run was trained without videos (data_processing.video_data is false)",
        ),
        (["--adapter", "run/adapter", "--field", "hint", "why?"], "--field: got 'hint', expected VARIABLE=TEXT"),
    ],
)
def test_what_cannot_be_asked_is_said(vlm_dist: Command, arguments: list[str], message: str) -> None:
    ended = vlm_dist("generate", *arguments, ok=False)
    assert message in ended.stderr and "Traceback" not in ended.stderr and ended.stdout == ""
