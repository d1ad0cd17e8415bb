from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.unit.config.conftest import Project
from vlm_dist.config import ModelClassEntry
from vlm_dist.errors import ConfigError

PRESETS = {
    "Qwen/Qwen2-VL-2B-Instruct": ("Qwen2VLForConditionalGeneration", "Qwen2VLProcessor"),
    "llava-hf/llava-1.5-7b-hf": ("LlavaForConditionalGeneration", "LlavaProcessor"),
    "OpenGVLab/InternVL2-2B": ("InternVLChatModel", "InternVLChatProcessor"),
    "google/paligemma-3b-pt-448": ("PaliGemmaForConditionalGeneration", "PaliGemmaProcessor"),
    "microsoft/Phi-3-vision-128k-instruct": ("Phi3VForCausalLM", "Phi3VProcessor"),
}


def local_model(directory: Path, **files: object) -> str:
    directory.mkdir(parents=True)
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content))
    return str(directory)


@pytest.mark.parametrize("model_id", PRESETS)
def test_presets(project: Project, model_id: str) -> None:
    config = project.load(f"model_id={model_id}")
    entry = config.model_entry
    assert (entry.model_class, entry.processor_class) == PRESETS[model_id]
    assert entry.import_path == "transformers"
    trusted = model_id.startswith("microsoft/Phi-3")
    assert config.model.loading_for(model_id).trust_remote_code is trusted
    assert config.model.processor_for(model_id).trust_remote_code is trusted


def test_an_unknown_model_gets_the_lines_to_add(project: Project) -> None:
    line = project.replace("run.yaml", "Qwen/Qwen2-VL-2B-Instruct", "org/new-vlm")
    problems = project.problems()
    assert problems[0].startswith(f"configs/run.yaml:{line}: model_id: model org/new-vlm is not in model_classes; add")
    lines = "\n".join(problems[1:])
    path = project.root / "configs" / "vlm_model_config.yaml"
    path.write_text(path.read_text().replace("model_classes:\n", lines + "\n", 1))
    assert project.load().model_entry.model_class == "YourModelClass"


def test_a_local_directory_is_known_by_its_architecture(project: Project) -> None:
    model = local_model(project.root / "copy", config={"architectures": ["Qwen2VLForConditionalGeneration"]})
    assert project.load(f"model_id={model}").model_entry.processor_class == "Qwen2VLProcessor"
    assert project.load("model_id=./copy").model_entry.processor_class == "Qwen2VLProcessor"


def test_a_misspelt_directory_is_told_with_the_near_one(project: Project) -> None:
    local_model(project.root / "models" / "llava", config={"architectures": ["Qwen2VLForConditionalGeneration"]})
    problems = "\n".join(project.problems("model_id=models/lava"))
    assert "there is no directory models/lava; did you mean models/llava?\nmodel models/lava is not in" in problems
    assert "directory" not in "\n".join(project.problems("model_id=org/lava"))


def test_an_unknown_architecture_fills_the_lines_in(project: Project) -> None:
    model = local_model(
        project.root / "copy", config={"architectures": ["NewVLM"]}, preprocessor_config={"processor_class": "NewProc"}
    )
    text = "\n".join(project.problems(f"model_id={model}"))
    assert f'"{model}":' in text
    assert 'model_class: "NewVLM"' in text
    assert 'processor_class: "NewProc"' in text


def test_an_entry_wins_over_the_architecture(project: Project) -> None:
    local_model(project.root / "copy", config={"architectures": ["Qwen2VLForConditionalGeneration"]})
    entry = "{model_class: A, processor_class: B, import_path: my.module}"
    config = project.load("model_id=./copy/", f'model.model_classes."./copy"={entry}')
    assert config.model_entry == ModelClassEntry(model_class="A", processor_class="B", import_path="my.module")


@pytest.mark.parametrize("content", [None, {}, {"architectures": []}])
def test_a_directory_that_is_no_model(project: Project, content: object) -> None:
    files = {} if content is None else {"config": content}
    local_model(project.root / "empty", **files)
    assert "not a model directory" in project.problems("model_id=./empty")[0]


def test_a_directory_that_does_not_exist(project: Project) -> None:
    assert project.problems("model_id=./nowhere") == [
        "--set model_id=./nowhere: model_id: no such model directory: ./nowhere"
    ]


def test_own_params_override_only_what_they_name(project: Project) -> None:
    own = "{revision: abc, trust_remote_code: true}"
    key = 'model.model_classes."Qwen/Qwen2-VL-2B-Instruct"'
    config = project.load(
        "model.loading_params.attn_implementation=eager",
        "model.processor_params.min_pixels=1",
        f"{key}.loading_params={own}",
        f"{key}.processor_params={{max_pixels: 2}}",
    )
    params = config.model.loading_for(config.model_id)
    assert (params.revision, params.trust_remote_code, params.attn_implementation) == ("abc", True, "eager")
    assert config.model.processor_for(config.model_id).arguments == {"min_pixels": 1, "max_pixels": 2}
    assert config.model.loading_params.revision is None


@pytest.mark.parametrize("path", ["my-module", "a..b", "os; rm"])
def test_import_path_is_a_module(project: Project, path: str) -> None:
    problem = project.problems(f'model.model_classes."a/b".import_path="{path}"')
    assert any("expected transformers, or another module" in line for line in problem)


def test_the_table_itself_raises_for_other_callers(project: Project) -> None:
    with pytest.raises(ConfigError, match="model_classes"):
        project.load().model.entry("org/other")
