"""Classes, directories and sizes that do not fit the checkpoint end in one message that names what does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.unit.data.samples import MemorySource, collator
from tests.unit.model.zoo import kind
from vlm_dist.config.vlm_model import ModelClassEntry
from vlm_dist.data.materialise import Materialiser
from vlm_dist.errors import ModelError
from vlm_dist.families import family_for
from vlm_dist.model import load_model, load_processor
from vlm_dist.model.class_checks import naming_what_belongs


def edit(directory: Path, file: str, **changes: Any) -> None:
    content = json.loads((directory / file).read_text())
    (directory / file).write_text(json.dumps(content | changes))


@pytest.fixture
def llava(tmp_path: Path) -> Path:
    return Path(shutil.copytree(kind("llava").directory, tmp_path / "llava"))


@pytest.mark.parametrize(
    ("name", "lacks"),
    [
        ("AutoTokenizer", "no image_processor"),
        ("LlamaTokenizer", "no image_processor"),
        ("CLIPImageProcessor", "no tokenizer and no image_processor"),
        ("AutoImageProcessor", "no tokenizer and no image_processor"),
    ],
)
def test_a_part_of_a_processor_is_refused_in_its_place(llava: Path, name: str, lacks: str) -> None:
    with pytest.raises(ModelError, match=rf"{name} .*{lacks}.* belongs to LlavaProcessor; set processor_class: Llava"):
        load_processor(str(llava), ModelClassEntry(processor_class=name))


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("LlavaModel", "LlavaModel is a model without a language head"),
        ("AutoModel", "LlavaModel is a model without a language head"),
        ("LlavaConfig", "LlavaConfig is no model"),
        ("LlavaProcessor", "LlavaProcessor is no model"),
    ],
)
def test_a_class_that_cannot_be_trained_is_refused(llava: Path, name: str, wrong: str) -> None:
    with pytest.raises(ModelError, match=f"{wrong}.*set model_class: LlavaForConditionalGeneration"):
        load_model(str(llava), ModelClassEntry(model_class=name))


def test_an_adapter_beside_the_weights_is_refused(llava: Path) -> None:
    (llava / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "some/base"}))
    with pytest.raises(ModelError, match=r"some/base, it says.*as model_id, and the adapter.* as peft\.adapter"):
        load_model(str(llava), ModelClassEntry())


def test_a_misspelt_model_type_is_named(llava: Path) -> None:
    edit(llava, "config.json", model_type="lava")
    for load in (load_processor, load_model):
        with pytest.raises(ModelError, match=r"model_type 'lava', which .* did you mean 'llava'.*`family:`"):
            load(str(llava), kind("llava").entry)


@pytest.mark.parametrize(
    ("name", "params", "wanted"),
    [
        ("qwen2_vl", {"patch_size": 7}, r"patch_size: got 7, but the model .* has 14"),
        ("qwen2_vl", {"patch_size": 0}, r"patch_size: got 0, but"),
        ("qwen2_vl", {"images_kwargs": {"temporal_patch_size": 1}}, r"temporal_patch_size: got 1, but .* has 2"),
        ("qwen2_vl", {"merge_size": 4}, r"vision_config\.spatial_merge_size"),
        ("llava", {"patch_size": 7}, r"patch_size: got 7, but"),
        ("qwen2_vl", {"min_pixels": "lots"}, r"needs numbers of pixels, got 'lots'"),
        ("qwen2_vl", {"max_pixels": "lots"}, r"needs numbers of pixels, got 'lots'"),
        ("qwen2_vl", {"rescale_factor": "x"}, r"cannot process an image"),
        ("llava", {"size": {"height": 0, "width": 0}}, r"cannot process an image"),
    ],
)
def test_sizes_that_cannot_be_are_refused(name: str, params: dict[str, Any], wanted: str) -> None:
    one = kind(name)
    with pytest.raises(ModelError, match=wanted):
        load_processor(str(one.directory), one.entry, params)


@pytest.mark.parametrize("damage", ["{", "[1, 2"])
def test_a_damaged_tokenizer_is_named(llava: Path, damage: str) -> None:
    whole = (llava / "tokenizer.json").read_text()
    for content in (damage, whole[: len(whole) // 2]):
        (llava / "tokenizer.json").write_text(content)
        with pytest.raises(ModelError, match=r"llava/tokenizer\.json, which is not valid JSON"):
            load_processor(str(llava), kind("llava").entry)


@pytest.mark.parametrize("name", ["LlavaNextProcessor", "PixtralProcessor"])
def test_a_processor_of_another_model_is_named_with_the_right_one(llava: Path, name: str) -> None:
    entry = ModelClassEntry(processor_class=name)
    processor = load_processor(str(llava), entry)
    family = family_for("llava", name)
    source = MemorySource([{}], "qa", ("image", "query"))
    config = collator(
        dataset_columns={"question_column": "query", "answer_column": "query", "context_column": None},
    )
    with (
        pytest.raises(ModelError, match=f"belongs to LlavaProcessor, but model_classes names processor_class: {name}"),
        naming_what_belongs(processor, entry, family.name, str(llava), None),
    ):
        Materialiser([source], processor, family, config, frozenset(["image"]), 0)
