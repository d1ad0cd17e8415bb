"""From files and --set to one RunConfig, or to everything that is wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.unit.config.conftest import Project
from vlm_dist.config import load_run
from vlm_dist.errors import ConfigError, ExitCode


def test_the_shipped_run_loads(project: Project) -> None:
    config = project.load()
    assert config.model_id == "Qwen/Qwen2-VL-2B-Instruct"
    assert config.deepspeed == Path("ds_configs/zero2.json")


def test_an_error_has_file_line_key_value_expectation_and_suggestion(project: Project) -> None:
    mode = project.replace("vlm_collator_config.yaml", 'resize_mode: "keep_aspect"', 'resize_mode: "kep_aspect"')
    assert project.problems() == [
        f"configs/vlm_collator_config.yaml:{mode}: collator.image_processing.resize_mode: "
        "got 'kep_aspect' (text), expected keep_aspect, crop or stretch; did you mean keep_aspect?"
    ]


def test_all_problems_of_all_files_at_once_in_the_order_of_the_files(project: Project) -> None:
    model = project.replace("vlm_model_config.yaml", 'device_map: "auto"', 'device_map: "gpu"')
    text = project.replace("vlm_collator_config.yaml", '"{question_column}"', '"{question}"')
    length = project.replace("vlm_collator_config.yaml", "max_length: 2048", 'max_length: "2048"')
    rate = project.replace("train_config.yaml", "learning_rate: 1.0e-05", "learning_rte: 1.0e-05")
    fp16 = project.replace("train_config.yaml", "fp16: false", "fp16: true")
    again = project.replace("peft_config.yaml", "lora_alpha: 16", "r: 16")
    project.write("data_config.yaml", "train: [\n")
    problems = project.problems("train.seed=x")
    assert [problem.split(": ")[0] for problem in problems] == [
        f"configs/vlm_model_config.yaml:{model}",
        f"configs/vlm_collator_config.yaml:{text}",
        f"configs/vlm_collator_config.yaml:{length}",
        f"configs/train_config.yaml:{rate}",
        f"configs/train_config.yaml:{fp16}",
        f"configs/peft_config.yaml:{again}",
        "configs/data_config.yaml:2",
        "--set train.seed=x",
    ]
    assert "did you mean learning_rate?" in problems[3]
    assert "remove the quotes" in problems[2]


def test_a_broken_value_does_not_hide_laws_about_others_nor_cause_false_ones(project: Project) -> None:
    problems = project.problems("train.bf16=maybe", "train.fp16=true", "collator.text_processing.padding=false")
    assert len(problems) == 2
    assert "train.bf16: got 'maybe'" in problems[0]
    assert "collator.text_processing.padding" in problems[1]


def test_overrides_of_the_run_file_win_over_files_and_set_over_both(project: Project) -> None:
    project.replace("run.yaml", "overrides: {}", "overrides: {train: {seed: 1, learning_rate: 2e-3}, peft: {r: 8}}")
    config = project.load("train.seed=2", "train.seed=3")
    assert (config.train.seed, config.train.learning_rate, config.peft.r) == (3, 2e-3, 8)
    assert config.train.num_train_epochs == 1.0
    assert config.peft.lora_alpha == 16


def test_a_wrong_override_is_reported_where_it_stands(project: Project) -> None:
    line = project.replace("run.yaml", "overrides: {}", "overrides:\n  train:\n    seed: x\n  tran: {seed: 1}")
    problems = project.problems()
    assert problems[0].startswith(f"configs/run.yaml:{line + 2}: train.seed: got 'x'")
    assert problems[1] == (f"configs/run.yaml:{line + 3}: overrides.tran: got an unknown section; did you mean train?")


def test_a_heading_without_keys_has_its_defaults(project: Project) -> None:
    project.write("train_config.yaml", "# all default\n")
    project.write("vlm_collator_config.yaml", "image_processing:\n  # max_size: 5\ntext_processing:\n")
    assert project.load().collator.text_processing.max_length == 2048


@pytest.mark.parametrize("name", ["train_config.yaml", "data_config.yaml", "vlm_model_config.yaml"])
def test_a_missing_file_is_one_line(project: Project, name: str) -> None:
    (project.root / "configs" / name).unlink()
    problems = project.problems()
    assert len(problems) == 1
    assert problems[0].endswith(f": no such file: configs/{name}")
    assert problems[0].startswith("configs/run.yaml:")


def test_a_missing_run_file_is_one_line(project: Project) -> None:
    with pytest.raises(ConfigError) as error:
        load_run(Path("configs/none.yaml"))
    assert str(error.value).startswith("configs/none.yaml: no such file (looked in ")
    assert error.value.exit_code == ExitCode.CONFIG


def test_a_missing_deepspeed_json_is_one_line(project: Project) -> None:
    line = project.replace("run.yaml", "zero2.json", "zero9.json")
    assert project.problems() == [f"configs/run.yaml:{line}: deepspeed: no such file: ds_configs/zero9.json"]


def test_files_are_relative_to_the_run_file_and_set_to_the_working_directory(project: Project) -> None:
    (project.root / "elsewhere").mkdir()
    (project.root / "configs" / "peft_config.yaml").rename(project.root / "elsewhere" / "small.yaml")
    project.replace("run.yaml", '"peft_config.yaml"', "../elsewhere/small.yaml")
    (project.root / "own.json").write_text("{}")
    assert project.load("deepspeed=own.json").deepspeed == Path("own.json")


def test_files_beside_the_run_file_need_not_be_named(project: Project) -> None:
    project.write("short.yaml", "model: Qwen/Qwen2-VL-2B-Instruct\n")
    assert load_run("configs/short.yaml").train.seed == 42


def test_a_run_file_without_a_model(project: Project) -> None:
    project.write("run.yaml", "configs: {train: nowhere.yaml}\n")
    assert project.problems("train.seed=1") == [
        "configs/run.yaml: model: is missing, expected a hub id or a directory",
        "configs/run.yaml:1: configs.train: no such file: configs/nowhere.yaml",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n", "got a list of 1, expected keys: model"),
        ("model: x\nmodle: y\n", "modle: got an unknown key; did you mean model?"),
        ("model: x\nconfig: {}\n", "config: got an unknown key; did you mean configs?"),
        ("model: 5\n", "model: got 5, expected text"),
        ("model: x\nconfigs: {trian: a}\n", "configs.trian: got an unknown key; did you mean train?"),
        ("model: x\noverrides: []\n", "overrides: got an empty list, expected a mapping"),
        ("model: x: y\n", "not valid YAML"),
    ],
)
def test_a_wrong_run_file(project: Project, text: str, message: str) -> None:
    project.write("run.yaml", text)
    assert any(message in problem for problem in project.problems())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.seed", "expected section.key=value, such as train.learning_rate=1e-4"),
        ("train.output_dir=s3://bucket/run", "got a URL, expected a directory"),
        ("train.output_dir=/", "expected a directory of the run's own"),
        ("train.hang_timeout_minutes=1e300", "got 1e+300, expected a number of at most 10080"),
        ("=3", "expected section.key=value"),
        ("train..seed=3", "expected section.key=value"),
        ("seed=3", "seed: got an unknown section; did you mean train.seed?"),
        ("learning_rte=3", "got an unknown section; did you mean train.learning_rate?"),
        ("trian.seed=3", "did you mean train?"),
        ("model=Qwen/x", "did you mean model_id?"),
        (
            "train.max_length=3",
            "train.max_length: got an unknown key; did you mean collator.text_processing.max_length?",
        ),
        ("collator.max_length=3", "did you mean collator.text_processing.max_length?"),
        ("train.optim=sgd", "train.optim: got a key that does not exist here: AdamW"),
        ("train.seed.x=3", "train.seed: got a mapping, expected a whole number"),
        ("train=[a", "not valid YAML"),
        ("train={seed: 1, seed: 2}", "seed: given twice"),
        ("train=5", "train: got 5, expected a mapping"),
        ("data.train[1].path=x", "data.train is a list of 1, expected an index from 0 on, got 1"),
        ("model_id=[a]", "model_id: got a list of 1, expected text"),
        ("deepspeed=", "deepspeed: got null, expected text"),
        ("train.fp16=yes please", "got 'yes please' (text), expected true or false"),
        ("train.bf16='true'", "expected true or false; remove the quotes"),
    ],
)
def test_a_wrong_set_names_itself(only_problem: Callable[..., str], override: str, message: str) -> None:
    problem = only_problem(override)
    assert problem.startswith(f"--set {override}: ")
    assert message in problem


def test_set_reads_yaml(project: Project) -> None:
    config = project.load(
        "train.learning_rate=1e-4",
        "train.report_to=[]",
        "train.run_name=a=b",
        "data.train=[{type: jsonl, path: a.jsonl}, {type: hf, name: org/set, split: train}]",
        "data.train[0].repeat=2",
        "peft.towers={vision: freeze}",
    )
    assert config.train.learning_rate == 1e-4
    assert config.train.run_name == "a=b"
    assert [source.repeat for source in config.data.train] == [2, 1]
    assert (config.peft.towers.vision, config.peft.towers.language) == ("freeze", "lora")


def test_a_resolved_configuration_gives_the_same_run(project: Project) -> None:
    config = project.load(
        "train.run_name='1e5'",
        "train.stop_at_step=5",
        "collator.dataset_columns.질문=q",
        "model.processor_params.min_pixels=3136",
        "model_id=microsoft/Phi-3-vision-128k-instruct",
    )
    config.write(project.root / "resolved.yaml")
    again = load_run(project.root / "resolved.yaml")
    assert again.dump() == config.dump()
    assert again.model_copy(update={"notices": ()}) == config.model_copy(update={"notices": ()})
    assert load_run("resolved.yaml", ["train.seed=1"]).train.seed == 1


def test_a_damaged_resolved_configuration_is_refused(project: Project) -> None:
    (project.root / "resolved.yaml").write_text("model_id: Qwen/Qwen2-VL-2B-Instruct\ntrian: {}\n")
    with pytest.raises(ConfigError) as error:
        load_run("resolved.yaml")
    lines = str(error.value).splitlines()
    assert "resolved.yaml: deepspeed: is missing, expected text" in lines
    assert any(line.startswith("resolved.yaml:2: trian: got an unknown key") for line in lines)


def test_home_is_expanded(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(project.root))
    assert project.load("train.output_dir=~/out").train.output_dir == project.root / "out"
