from __future__ import annotations

import json
import shutil
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
            {"model_class": "Qwen2VLForConditionalGenerations"},
            ["model_class: Qwen2VLForConditionalGeneration", "import_path: transformers"],
        ),
        ({"import_path": "no_such_package"}, ["import_path 'no_such_package'", "No module named"]),
        (
            {"model_class": "Zzz", "import_path": "json"},
            ["json has no class 'Zzz'", "model_class: Qwen2VLForConditionalGeneration", "import_path: transformers"],
        ),
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


def test_a_class_that_neither_transformers_nor_the_checkpoint_knows(tiny_dir: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(tiny_dir, tmp_path / "copy"))
    (directory / "config.json").write_text(json.dumps({"model_type": "new", "architectures": ["Qwxzkj"]}))
    with pytest.raises(ModelError, match=r"no class 'Qwen2VLForConditionalGenerations'.*\n.*\n *model_class: Qwen2VL"):
        resolve_classes(entry(model_class="Qwen2VLForConditionalGenerations"), str(directory))
    with pytest.raises(ModelError, match=r"no class 'Qwxzkj'.* Take the class from `architectures`"):
        resolve_classes(ModelClassEntry(), str(directory))


def test_a_checkpoint_names_its_classes_itself_where_the_entry_does_not(tiny_dir: Path) -> None:
    classes = resolve_classes(ModelClassEntry(), str(tiny_dir))
    assert [classes.model.__name__, classes.processor.__name__] == [
        "Qwen2VLForConditionalGeneration",
        "Qwen2VLProcessor",
    ]


def test_an_entry_may_name_auto_classes(tiny_dir: Path) -> None:
    auto = entry(model_class="AutoModelForImageTextToText", processor_class="AutoProcessor")
    assert type(load_model(str(tiny_dir), auto)).__name__ == "Qwen2VLForConditionalGeneration"
    processor = load_processor(str(tiny_dir), auto, {"max_pixels": 56 * 56})
    assert type(processor).__name__ == "Qwen2VLProcessor"
    assert processor.image_processor.size["longest_edge"] == 56 * 56


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
