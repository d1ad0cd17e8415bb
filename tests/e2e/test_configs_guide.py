"""configs/README.md and configs/README.ko.md: what they show is what the program takes, does and says."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import yaml

from tests.e2e.guide_faults import FAULTS, Workshop
from tests.e2e.guide_run import edit_files, make_guide_run, run_commands
from tests.e2e.guide_text import Block, blocks, pattern, without_comments
from tests.e2e.preloaded import Preloaded
from tests.e2e.test_bad_input import break_configs, break_data, break_models
from tests.tiny_run import TinyRun, make_tiny_run
from tests.unit.config.guide_tables import GUIDES
from vlm_dist.config import load_run

pytestmark = pytest.mark.e2e

SECTION_OF = {
    "vlm_model_config.yaml": "model",
    "vlm_collator_config.yaml": "collator",
    "train_config.yaml": "train",
    "peft_config.yaml": "peft",
    "data_config.yaml": "data",
}
BLOCKS = blocks("en")
MESSAGES = [block for block in BLOCKS if block.case is not None]
YAML = [block for block in BLOCKS if block.language == "yaml"]


@pytest.fixture(scope="module")
def guide(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    return make_guide_run(tmp_path_factory.mktemp("guide"))


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory, process: Preloaded) -> TinyRun:
    """A tiny run of two steps with its checkpoint, and all that is broken beside it."""
    directory = tmp_path_factory.mktemp("broken")
    made = make_tiny_run(directory)
    for breaking in (break_configs, break_models, break_data):
        breaking(directory)
    arguments = ["--config", "configs/tiny.yaml", "--set", "train.max_steps=2", "--set", "data.eval=[]"]
    ended = process.run("vlm_dist.train", arguments, directory)
    assert ended.exit_code == 0, ended.output
    return made


def test_both_languages_show_the_same_code() -> None:
    ours, theirs = (
        [(one.language, one.case, without_comments(one.text)) for one in blocks(language)] for language in ("en", "ko")
    )
    assert len(ours) == len(theirs)
    for english, korean in zip(ours, theirs, strict=True):
        assert english == korean


def test_links_lead_somewhere() -> None:
    for path in GUIDES.values():
        for target in re.findall(r"\]\(([^)#]+)", path.read_text(encoding="utf-8")):
            assert (path.parent / target).exists(), f"{path.name}: {target}"


def test_every_preset_is_named() -> None:
    for path in GUIDES.values():
        text = path.read_text(encoding="utf-8")
        named = set(re.findall(r"`presets/([\w.]+)`", text))
        assert named == {file.name for file in (path.parent / "presets").iterdir()}, path


@pytest.mark.parametrize("block", YAML, ids=lambda block: f"line-{block.line}")
def test_every_fragment_is_accepted(block: Block, guide: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(guide.directory)
    if block.file.startswith("configs/"):
        load_run(Path(block.file))
        return
    shipped = yaml.safe_load(Path("configs/run.yaml").read_text())
    run_file = Path("configs/fragment.yaml")
    run_file.write_text(yaml.safe_dump(shipped | {"overrides": {SECTION_OF[block.file]: yaml.safe_load(block.text)}}))
    load_run(run_file)


def test_every_python_block_runs(guide: TinyRun) -> None:
    code = "\n".join(block.text for block in BLOCKS if block.language == "python")
    ended = guide.command([sys.executable, "-c", code], timeout_seconds=120)
    assert ended.exit_code == 0, ended.output
    assert "['Qwen2VLForConditionalGeneration']" in ended.stdout
    assert ended.stdout.splitlines()[-1] == "['image_path', 'query', 'response', 'metadata']"


def test_the_quick_start(tmp_path: Path, process: Preloaded) -> None:
    """The three edits, then the commands; the scenarios' blocks are run by test_walkthroughs.py."""
    run = make_guide_run(tmp_path)
    edit_files(run, [block for block in YAML if block.heading == "Quick start"])
    for block in BLOCKS:
        if block.language == "bash" and not block.heading.startswith("Scenario"):
            run_commands(block, run, process)
    assert (tmp_path / "runs" / "default" / "adapter" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "preview.html").is_file()


@pytest.mark.parametrize("block", MESSAGES, ids=lambda block: block.case)
def test_every_message_is_what_the_program_says(
    block: Block,
    broken: TinyRun,
    process: Preloaded,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert block.case is not None
    said = FAULTS[block.case](Workshop(broken, process, monkeypatch, caplog))
    assert pattern(block.text).search(said), f"not in:\n{said}"


@pytest.mark.parametrize("language", GUIDES)
def test_every_symptom_has_a_message_and_a_fix(language: str) -> None:
    messages = [block for block in blocks(language) if block.case is not None]
    assert len(messages) >= 30
    assert len({block.heading for block in messages}) == len(messages)
    chapter = GUIDES[language].read_text(encoding="utf-8").rpartition("\n# ")[2]
    symptoms = chapter.split("\n### ")[1:]
    assert len(symptoms) == len(messages)
    for symptom in symptoms:
        fix = symptom.rpartition("```\n")[2].partition("\n## ")[0]
        assert len(fix.strip()) > 20, symptom
