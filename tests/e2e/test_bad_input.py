"""Bad input, as a user gives it: the right exit code, and one short message that says what, where and how to mend it.

Most commands run in a fork of a process that has the imports already (`preloaded`); some as the real process, plain and
under `deepspeed`, whose own exit code must be ours.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import yaml

from tests.e2e.bad_cases import CASES, Case, changed
from tests.e2e.preloaded import Preloaded
from tests.tiny_run import Finished, TinyRun, make_tiny_run
from vlm_dist.distributed.group import free_port
from vlm_dist.errors import ExitCode

pytestmark = pytest.mark.e2e

MAX_LINES = 6


def assert_clear(ended: Finished, case: Case, *, launcher: bool = False) -> None:
    """The exit code, and one message of a few lines."""
    shown = f"{case.name}:\n{ended.output}"
    assert ended.exit_code == case.code, shown
    assert "Traceback" not in ended.output, shown
    told = list(re.finditer(r"^error(?: \(rank \d+\))?: ", ended.stderr, re.MULTILINE))
    assert len(told) == 1, f"told {len(told)} times: {shown}"
    message = ended.stderr[told[0].start() :]
    if launcher:  # what the launcher says after it is its own
        message = re.split(r"\n\[20\d\d-", message)[0]
    assert len(message.strip().splitlines()) <= MAX_LINES, shown
    for text in case.says:
        assert text in message, f"{text!r} is not in: {shown}"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, process: Preloaded) -> TinyRun:
    """A tiny run of two steps with its checkpoint, and all that is broken beside it."""
    directory = tmp_path_factory.mktemp("bad")
    made = make_tiny_run(directory)
    break_configs(directory)
    break_models(directory)
    break_data(directory)
    ended = process.run("vlm_dist.train", changed("train.max_steps=2", "data.eval=[]"), directory)
    assert ended.exit_code == 0, ended.output
    return made


def break_configs(directory: Path) -> None:
    configs = directory / "configs"
    (configs / "syntax.yaml").write_text("model: model\noverrides:\n  train: {a: 1\n b: 2\n")
    (configs / "binary.yaml").write_bytes(b"\xff\xfe\x00model")
    (configs / "tab.yaml").write_text("model: model\noverrides:\n\ttrain: 1\n")
    (configs / "list.yaml").write_text("- model\n")
    (configs / "empty.yaml").write_text("")
    tiny = (configs / "tiny.yaml").read_text()
    (configs / "nofile.yaml").write_text(yaml.safe_dump(yaml.safe_load(tiny) | {"configs": {"train": "nope.yaml"}}))
    (configs / "variable.yaml").write_text(tiny.replace("{question_column}", "{quesiton_column}"))
    preset = json.loads((directory / "ds_configs" / "tiny2.json").read_text())
    zero = preset["zero_optimization"]
    broken = {
        "typo": preset | {"zero_optimisation": {}},
        "auto": preset | {"zero_optimization": zero | {"reduce_bucket_size": "auto"}},
        "owned": preset | {"train_micro_batch_size_per_gpu": 4},
        "text": preset | {"zero_optimization": {"stage": "2"}},
        "four": preset | {"zero_optimization": {"stage": 4}},
    }
    for name, content in broken.items():
        (directory / "ds_configs" / f"{name}.json").write_text(json.dumps(content))
    (directory / "ds_configs" / "syntax.json").write_text('{"zero_optimization": {')


def break_models(directory: Path) -> None:
    (directory / "nothing").mkdir()
    for name in ("noweights", "badweights", "noprocessor"):
        shutil.copytree(directory / "model", directory / name)
    (directory / "noweights" / "model.safetensors").unlink()
    weights = directory / "badweights" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    for name in ("processor_config.json", "tokenizer.json", "tokenizer_config.json"):
        (directory / "noprocessor" / name).unlink()


def break_data(directory: Path) -> None:
    (directory / "afile").write_text("not a directory")
    shard = (directory / "data" / "images" / "images-000000.tar").read_bytes()
    for name, content in (("cut", shard[: len(shard) // 2 + 100]), ("junk", b"hello world" * 1000)):
        (directory / "data" / name).mkdir()
        (directory / "data" / name / "a.tar").write_bytes(content)
    for name, image in (("nomedia", "{}.png"), ("urls", "https://x.org/{}.png")):
        records = [{"image": image.format(i), "question": "q", "answer": "a"} for i in range(4)]
        (directory / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)))
    (directory / "nojson.jsonl").write_text("hello\n" * 4)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bad_input_has_its_exit_code_and_one_clear_message(case: Case, run: TinyRun, process: Preloaded) -> None:
    ended = process.run(
        "vlm_dist.train", case.arguments, run.directory, case.environment, timeout_seconds=case.timeout_seconds
    )
    assert_clear(ended, case)


def test_no_run_file_at_all(run: TinyRun, process: Preloaded) -> None:
    ended = process.run("vlm_dist.train", [], run.directory / "nothing")
    case = Case("", [], ExitCode.CONFIG, ("configs/run.yaml: no such file (looked in", "nothing)"))
    assert_clear(ended, case)


@pytest.mark.parametrize("arguments", [["--cofnig", "x"], ["--set"], ["run.yaml"]], ids=" ".join)
def test_a_wrong_command_line_shows_the_usage(arguments: list[str], run: TinyRun, process: Preloaded) -> None:
    ended = process.run("vlm_dist.train", arguments, run.directory)
    assert ended.exit_code == ExitCode.CONFIG
    assert ended.stderr.startswith("usage: python -m vlm_dist.train [-h] [--config RUN.yaml]")
    assert "Traceback" not in ended.stderr


def test_another_learning_rate_on_resume_is_told(run: TinyRun, process: Preloaded) -> None:
    """It is legal, but nobody should wonder about the bend in the curve."""
    shutil.copytree(run.directory / "run", run.directory / "bend")
    arguments = changed("train.output_dir=bend", "train.resume=auto", "train.max_steps=3", "train.learning_rate=7e-4")
    ended = process.run("vlm_dist.train", [*arguments, "--set", "data.eval=[]"], run.directory)
    assert ended.exit_code == 0, ended.output
    assert "notice: train.learning_rate: 0.001 in the checkpoint, now 0.0007" in ended.output
    assert "notice: train.max_steps: 2 in the checkpoint, now 3" in ended.output


def test_a_silent_hub_is_not_waited_for_without_end(run: TinyRun, process: Preloaded) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as silent:
        environment = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": f"http://127.0.0.1:{silent.getsockname()[1]}"}
        environment |= {"HF_HUB_ETAG_TIMEOUT": "1", "HF_HUB_DOWNLOAD_TIMEOUT": "1"}
        arguments = changed("model_id=Qwen/Qwen2-VL-2B-Instruct", "train.output_dir=runs/silent")
        ended = process.run("vlm_dist.train", arguments, run.directory, environment, timeout_seconds=60)
    assert_clear(ended, Case("silent hub", [], ExitCode.MODEL, ("the hub cannot be reached",)))


def by_name(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


REAL = ["no run file", "not YAML", "unknown key", "unknown model", "wrong type", "no JSON file"]
REAL_LATE = ["model without weights", "truncated tar", "RANK alone"]


@pytest.mark.parametrize("name", REAL + REAL_LATE)
def test_the_real_process(name: str, run: TinyRun) -> None:
    case = by_name(name)
    variables = [f"{key}={value}" for key, value in case.environment.items()]
    command = ["env", *variables, sys.executable, "-m", "vlm_dist.train", *case.arguments]
    ended = run.command(command, timeout_seconds=30 if case.before_torch else 60)
    assert_clear(ended, case)
    if case.before_torch:
        assert ended.stderr.startswith("error: ")  # nothing before it: torch and DeepSpeed were not even imported


@pytest.mark.parametrize("name", ["unknown key", "wrong column", "model without weights", "earlier run"])
def test_deepspeed_with_two_processes(name: str, run: TinyRun) -> None:
    """Told once for both, and DeepSpeed's own exit code is ours."""
    case = by_name(name)
    launcher = [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", "2", "--master_port", str(free_port())]
    ended = run.command([*launcher, "-m", "vlm_dist.train", *case.arguments], timeout_seconds=90)
    assert_clear(ended, case, launcher=True)


TOOLS: list[tuple[list[str], ExitCode, str]] = [
    (["config", "configs/nope.yaml"], ExitCode.CONFIG, "configs/nope.yaml: no such file"),
    (["config", "configs/tiny.yaml", "--set", "train.sed=1"], ExitCode.CONFIG, "did you mean seed?"),
    (["plan", "configs/nope.yaml", "--step", "0"], ExitCode.CONFIG, "configs/nope.yaml: no such file"),
    (["plan", "configs/tiny.yaml", "--step", "6"], ExitCode.CONFIG, "the run has steps 0 to 5"),
    (["plan", "configs/tiny.yaml", "--step", "-1"], ExitCode.CONFIG, "the run has steps 0 to 5"),
    (
        ["plan", "configs/tiny.yaml", "--step", "0", "--rank", "2", "--world-size", "2"],
        ExitCode.CONFIG,
        "expected a rank from 0 to 1",
    ),
    (["plan", "configs/tiny.yaml", "--step", "0", "--world-size", "0"], ExitCode.CONFIG, "--world-size 0"),
    (
        ["plan", "configs/tiny.yaml", "--step", "0", "--set", 'data.train=[{"type": "tar", "path": "nothing"}]'],
        ExitCode.DATA,
        "no .tar files found",
    ),
    (["plan", "configs/tiny.yaml"], ExitCode.CONFIG, "name a step (--step 0)"),
]


@pytest.mark.parametrize(("arguments", "code", "says"), TOOLS, ids=lambda value: str(value)[:40])
def test_bad_input_of_the_tools(
    arguments: list[str], code: ExitCode, says: str, run: TinyRun, process: Preloaded
) -> None:
    assert_clear(process.run("vlm_dist.cli", arguments, run.directory), Case(" ".join(arguments), [], code, (says,)))


def test_tools_without_a_command_or_with_a_wrong_one(run: TinyRun, process: Preloaded) -> None:
    for arguments in ([], ["paln"], ["plan", "configs/tiny.yaml", "--step", "one"]):
        ended = process.run("vlm_dist.cli", arguments, run.directory)
        assert ended.exit_code == ExitCode.CONFIG
        assert "usage: vlm-dist" in ended.stderr
        assert "Traceback" not in ended.stderr


def test_the_tools_work(run: TinyRun) -> None:
    tool = str(Path(sys.executable).parent / "vlm-dist")
    resolved = run.command([tool, "config", "configs/tiny.yaml"])
    assert resolved.exit_code == 0, resolved.output
    (run.directory / "resolved.yaml").write_text(resolved.stdout)
    again = run.command([tool, "config", "resolved.yaml"])
    assert again.stdout == resolved.stdout  # a resolved configuration is a run file too
    # the checkpoint's global batch on two ranks, and that of a new run on two ranks
    for output_dir, num_samples in (("run", 4), ("runs/new", 8)):
        arguments = ["plan", "configs/tiny.yaml", "--step", "1", "--world-size", "2"]
        plan = run.command([tool, *arguments, "--set", f"train.output_dir={output_dir}"])
        assert plan.exit_code == 0, plan.output
        slots = [json.loads(line) for line in plan.stdout.splitlines()]
        assert len(slots) == num_samples
        assert {slot["rank"] for slot in slots} == {0, 1}
        assert all(slot["shard"].endswith(".tar") and slot["key"] for slot in slots)
    doctor = run.command([tool, "doctor"])
    assert doctor.exit_code == 0, doctor.output
    assert re.search(r"^ok +torch +\d", doctor.stdout, re.MULTILINE)
    assert "Traceback" not in doctor.output + plan.output
