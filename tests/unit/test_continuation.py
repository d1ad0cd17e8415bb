"""What may differ between a checkpoint's configuration and the run that continues it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from tests.tiny_run import make_tiny_run
from vlm_dist.build.continuation import check_config, is_own
from vlm_dist.checkpoint import Checkpoint
from vlm_dist.config import RunConfig, load_run
from vlm_dist.errors import CheckpointError


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_run(tmp_path_factory.mktemp("continued"), num_images=2, num_clips=1).config


def continued(run_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> list[str]:
    monkeypatch.chdir(run_file.parent.parent)
    load_run(run_file).write(tmp_path / "resolved_config.yaml")
    saved = (tmp_path / "resolved_config.yaml").read_text()
    return check_config(load_run(run_file, overrides), Checkpoint(tmp_path, 3, {}, saved))


def test_the_same_configuration_has_no_notice(run_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places = (
        "train.output_dir=elsewhere",
        "train.resume=auto",
        "train.stop_at_step=4",
        "deepspeed=ds_configs/tiny3.json",
    )
    assert continued(run_file, tmp_path, monkeypatch, *places) == []


def test_what_may_change_is_told(run_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changed = ("train.learning_rate=0.5", "collator.label_masking.mask_input_tokens=false", "peft.lora_dropout=0.2")
    assert continued(run_file, tmp_path, monkeypatch, *changed) == [
        "collator.label_masking.mask_input_tokens: True in the checkpoint, now False",
        "peft.lora_dropout: 0.05 in the checkpoint, now 0.2",
        "train.learning_rate: 0.001 in the checkpoint, now 0.5",
    ]


def test_another_adapter_is_refused_with_all_that_differs(
    run_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CheckpointError) as error:
        continued(run_file, tmp_path, monkeypatch, "peft.lora_alpha=32", "peft.towers.vision=freeze")
    assert "peft.lora_alpha: 16 in the checkpoint, now 32" in str(error.value)
    assert "peft.towers.vision: 'lora' in the checkpoint, now 'freeze'" in str(error.value)


def test_another_model_or_other_new_tokens_are_refused(
    run_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = "model.model_classes={model: {processor_params: {new_special_tokens: ['<a>']}}}"
    for override in ("model.processor_params.new_special_tokens=['<a>']", own):
        with pytest.raises(CheckpointError, match=r"processor_params\.new_special_tokens: .*now \['<a>'\]"):
            continued(run_file, tmp_path, monkeypatch, override)
    (notice,) = continued(run_file, tmp_path, monkeypatch, "model.processor_params.max_pixels=50176")
    assert notice == "model.processor_params.max_pixels: None in the checkpoint, now 50176"


@pytest.mark.parametrize(
    ("path", "wanted"),
    [
        ("run/checkpoint-3", True),
        ("other/checkpoint-3", False),
        ("run/superseded-1-checkpoint-3", False),  # resume=auto does not look at it
    ],
)
def test_what_an_automatic_resume_would_find(path: str, wanted: bool, tmp_path: Path) -> None:
    config: Any = SimpleNamespace(train=SimpleNamespace(output_dir=tmp_path / "run"))
    ranks: Any = SimpleNamespace(gather_objects=lambda value: [value])
    assert is_own(config, Checkpoint(tmp_path / path, 3, {}), ranks) is wanted


def test_another_revision_is_another_model(run_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run_file.parent.parent)
    common, own = "model.loading_params.revision=", "model.model_classes={model: {loading_params: {revision: aa}}}"
    for before, after in ((f"{common}aa", f"{common}bb"), (f"{common}aa", f"{common}null"), (own, "train.seed=42")):
        checkpoint = Checkpoint(tmp_path, 3, {}, load_run(run_file, [before]).to_yaml())
        with pytest.raises(CheckpointError, match=r"of another model or adapter:\n.*revision: 'aa' in the checkpoint"):
            check_config(load_run(run_file, [after]), checkpoint)
    (notice,) = continued(run_file, tmp_path, monkeypatch, f"{common}aa")
    assert notice == "model.loading_params.revision: None in the checkpoint, now 'aa'"


def test_what_is_said_of_accumulation_is_true(run_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (notice,) = continued(run_file, tmp_path, monkeypatch, "train.gradient_accumulation_steps=4")
    assert notice.endswith("; but the samples per step belong to the run, and accumulation follows from them")


def test_a_signature_made_anew_is_no_difference_and_no_secret_is_told(
    run_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run_file.parent.parent)

    def load(url: str) -> RunConfig:
        return load_run(run_file, [f"data.train=[{{type: tar, path: '{url}'}}]"])

    saved = load("https://host/a.tar?sig=old-secret&n=1")
    saved.write(tmp_path / "resolved_config.yaml")
    checkpoint = Checkpoint(tmp_path, 3, {}, (tmp_path / "resolved_config.yaml").read_text())
    assert check_config(load("https://host/a.tar?sig=new-secret&n=1"), checkpoint) == []
    # of a version that wrote secrets
    checkpoint = Checkpoint(tmp_path, 3, {}, yaml.safe_dump(saved.model_dump(mode="json")))
    assert check_config(load("https://host/a.tar?sig=new-secret&n=1"), checkpoint) == []
    (notice,) = check_config(load("https://host/b.tar?sig=new-secret&n=1"), checkpoint)
    assert "a.tar" in notice and "b.tar" in notice and "secret" not in notice
