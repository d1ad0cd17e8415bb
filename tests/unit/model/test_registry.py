from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import save_file

from tests.unit.model.conftest import ENTRY
from vlm_dist.config.vlm_model import ModelClassEntry
from vlm_dist.errors import ModelError
from vlm_dist.model import load_model, load_processor, resolve_classes


def entry(**changes: str) -> ModelClassEntry:
    return ModelClassEntry(**{**ENTRY.model_dump(), **changes})


def test_names_become_the_attributes_of_import_path(tiny_dir: Path) -> None:
    import transformers

    classes = resolve_classes(ENTRY, str(tiny_dir))
    assert classes.model is transformers.Qwen2VLForConditionalGeneration
    assert classes.processor is transformers.Qwen2VLProcessor


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"model_class": "InternVLChatModel", "processor_class": "InternVLChatProcessor"},
            [
                "'InternVLChatModel'",
                "model_class: InternVLForConditionalGeneration",
                "processor_class: InternVLProcessor",
            ],
        ),
        (
            {"model_class": "Qwen2VLForConditionalGenerations"},
            ["model_class: Qwen2VLForConditionalGeneration", "import_path: transformers"],
        ),
        ({"import_path": "no_such_package"}, ["import_path 'no_such_package'", "No module named"]),
        ({"model_class": "Zzz"}, ["no class 'Zzz'", "architectures"]),
    ],
)
def test_an_unknown_class_names_the_lines_to_write(
    tiny_dir: Path, changes: dict[str, str], expected: list[str]
) -> None:
    with pytest.raises(ModelError) as caught:
        resolve_classes(entry(**changes), str(tiny_dir))
    assert [part for part in expected if part not in str(caught.value)] == []


def test_an_unknown_processor_class_keeps_the_model_class_in_the_proposal(tiny_dir: Path) -> None:
    with pytest.raises(ModelError, match="processor_class: Qwen2VLProcessor") as caught:
        resolve_classes(entry(processor_class="Qwen2VlProcesor"), str(tiny_dir))
    assert "model_class: Qwen2VLForConditionalGeneration" in str(caught.value)


REMOTE_MODEL = '''"""A model whose code lives beside its weights; it exists to test that mechanism."""
from transformers import Qwen2VLForConditionalGeneration

class RemoteTestModel(Qwen2VLForConditionalGeneration):
    came_from_the_repository = True
'''
REMOTE_PROCESSOR = '''"""A processor whose code lives beside its files; it exists to test that mechanism."""
from transformers import Qwen2VLProcessor

class RemoteTestProcessor(Qwen2VLProcessor):
    came_from_the_repository = True
'''


@pytest.fixture
def remote_dir(tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny model as a repository with code of its own."""
    import shutil

    import transformers.dynamic_module_utils

    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    directory = tmp_path / "remote_model"
    shutil.copytree(tiny_dir, directory)
    # transformers saves Qwen2-VL under older names, which it translates back for its own class only
    weights = {name: weight.clone() for name, weight in load_model(str(tiny_dir), ENTRY).state_dict().items()}
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "modeling_remote.py").write_text(REMOTE_MODEL)
    (directory / "processing_remote.py").write_text(REMOTE_PROCESSOR)
    for name, auto, reference in (
        ("config.json", "AutoModelForImageTextToText", "modeling_remote.RemoteTestModel"),
        ("processor_config.json", "AutoProcessor", "processing_remote.RemoteTestProcessor"),
    ):
        content = json.loads((directory / name).read_text())
        content["auto_map"] = {auto: reference}
        (directory / name).write_text(json.dumps(content))
    return directory


REMOTE = entry(model_class="RemoteTestModel", processor_class="RemoteTestProcessor")


def test_remote_code_runs_only_where_it_is_trusted(remote_dir: Path) -> None:
    with pytest.raises(ModelError, match="trust_remote_code: true"):
        load_model(str(remote_dir), REMOTE)
    with pytest.raises(ModelError, match="trust_remote_code: true"):
        load_processor(str(remote_dir), REMOTE)
    model = load_model(str(remote_dir), REMOTE, {"trust_remote_code": True})
    processor = load_processor(str(remote_dir), REMOTE, {"trust_remote_code": True})
    assert model.came_from_the_repository and processor.came_from_the_repository
