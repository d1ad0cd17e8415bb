"""vlm_model_config.yaml: each key changes which model and processor are loaded, or how."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.unit.test_key_effects.conftest import Project
from tests.unit.test_key_effects.registry import shows
from vlm_dist.build import find_family
from vlm_dist.errors import ConfigError, ModelError
from vlm_dist.model import load_model

ENTRY = {
    "model_class": "Qwen2VLForConditionalGeneration",
    "processor_class": "Qwen2VLProcessor",
    "import_path": "transformers",
}
ANSWERS = """
from transformers import {base}

class {name}({base}):
    came_from_the_repository = True
"""


def entry(**changes: Any) -> dict[str, Any]:
    """Changes that give the tiny model a row of its own."""
    return {"model.model_classes.model": ENTRY | changes}


def load(project: Project, changes: dict[str, Any] | None = None, **overrides: Any) -> Any:
    """The model as the composition root loads it."""
    config = project.config(changes)
    loading = config.model.loading_for(config.model_id)
    return load_model(config.model_id, config.model_entry, loading, **({"dtype": config.train.precision} | overrides))


@shows("model.model_classes.*.model_class", "model.model_classes.*.processor_class")
def test_classes_are_those_of_the_entry(project: Project) -> None:
    assert type(load(project, entry())).__name__ == "Qwen2VLForConditionalGeneration"
    with pytest.raises(ModelError, match="is a 'qwen2_vl', but model_class LlavaForConditionalGeneration"):
        load(project, entry(model_class="LlavaForConditionalGeneration"))
    assert type(project.processor(entry())).__name__ == "Qwen2VLProcessor"
    with pytest.raises(ModelError, match="processor_class Qwen2Tokenizer gives a Qwen2Tokenizer"):
        project.processor(entry(processor_class="Qwen2Tokenizer"))
    unnamed = entry(model_class=None, processor_class=None)
    assert type(load(project, unnamed)).__name__ == "Qwen2VLForConditionalGeneration"
    assert type(project.processor(unnamed)).__name__ == "Qwen2VLProcessor"


@shows("model.model_classes.*.family")
def test_what_the_data_side_knows_of_a_model_can_be_told(project: Project) -> None:
    assert find_family(project.config(entry())).name == "qwen2_vl"
    assert find_family(project.config(entry(family="llava"))).name == "llava"
    own = find_family(project.config(entry(family={"min_frames": 4})))
    assert (own.min_frames, own.packing) == (4, "mrope")
    with pytest.raises(ConfigError, match=r"\.family: there is no family 'lava'; did you mean 'llava'"):
        find_family(project.config(entry(family="lava")))


@shows("model.model_classes.*.import_path")
def test_classes_come_from_the_module_of_the_entry(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    (project.data / "own_classes.py").write_text(
        "from transformers import Qwen2VLForConditionalGeneration as MyModel, Qwen2VLProcessor\n"
        "class MyProcessor(Qwen2VLProcessor):\n    is_mine = True\n"
    )
    monkeypatch.syspath_prepend(str(project.data))
    mine = entry(model_class="MyModel", processor_class="MyProcessor", import_path="own_classes")
    assert type(load(project, mine)).__name__ == "Qwen2VLForConditionalGeneration"
    assert project.processor(mine).is_mine


@shows(
    "model.loading_params.torch_dtype",
    "model.model_classes.*.loading_params.torch_dtype",
    "train.bf16",
    "train.fp16",
)
@pytest.mark.parametrize("where", ["model.loading_params", "model.model_classes.model.loading_params"])
def test_the_dtype_is_that_of_the_precision_and_torch_dtype_must_agree(project: Project, where: str) -> None:
    base = entry() if "classes" in where else {}
    for dtype, switches in (
        ("bfloat16", {"train.bf16": True}),
        ("torch.float16", {"train.fp16": True}),
        ("torch.float32", {}),
    ):
        assert str(load(project, base | switches | {f"{where}.torch_dtype": dtype}).dtype).endswith(dtype[-8:])
    with pytest.raises(ConfigError, match=r"got bfloat16, expected torch.float32 .*; or set train.bf16: true"):
        project.config(base | {f"{where}.torch_dtype": "bfloat16"})
    config = project.config(base | {f"{where}.torch_dtype": "float32"})
    loading = config.model.loading_for(config.model_id)
    assert load_model(config.model_id, config.model_entry, loading).dtype is torch.float32  # where nobody overrides it


@shows("model.loading_params.device_map")
def test_a_device_map_is_said_to_have_no_effect(project: Project) -> None:
    notices = "\n".join(project.config({"model.loading_params.device_map": "auto"}).notices)
    assert "auto has no effect: under DeepSpeed the engine places the model" in notices
    assert not hasattr(load(project, {"model.loading_params.device_map": "auto"}), "hf_device_map")
    assert "has no effect: under DeepSpeed" not in "\n".join(project.config().notices)


@shows("model.model_classes.*.loading_params.device_map")
def test_a_device_map_of_one_model_is_said_to_have_no_effect_too(project: Project) -> None:
    notices = "\n".join(project.config(entry(loading_params={"device_map": "cpu"})).notices)
    assert "cpu has no effect: under DeepSpeed the engine places the model" in notices


@shows("model.loading_params.attn_implementation", "model.model_classes.*.loading_params.attn_implementation")
def test_attention_is_the_one_that_is_named(project: Project) -> None:
    key = "model.loading_params.attn_implementation"
    for name in ("eager", "sdpa"):
        assert load(project, {key: name}).config._attn_implementation == name
    own = entry(loading_params={"attn_implementation": "eager"}) | {key: "sdpa"}
    assert load(project, own).config._attn_implementation == "eager"
    assert load(project, {key: "varlen"}).config.get_text_config()._attn_implementation == "varlen"
    assert "varlen is for packs, and packing is false" in "\n".join(project.config({key: "varlen"}).notices)


@pytest.fixture
def hub(project: Project, monkeypatch: pytest.MonkeyPatch) -> str:
    """A hub cache with one model of two revisions, told apart by a marker in their files."""
    from huggingface_hub import constants

    cache = project.data / "hub"
    repository = cache / "models--someone--tiny"
    for number, (revision, marker) in enumerate({"main": "plain", "v2": "revised"}.items()):
        commit = str(number) * 40
        snapshot = repository / "snapshots" / commit
        shutil.copytree(project.run.directory / "model", snapshot)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / revision).write_text(commit)
        for name in ("config.json", "tokenizer_config.json"):
            content = json.loads((snapshot / name).read_text())
            (snapshot / name).write_text(json.dumps(content | {"marker": marker}))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return "someone/tiny"


@shows("model.loading_params.revision", "model.model_classes.*.loading_params.revision")
def test_model_and_processor_are_of_the_revision(project: Project, hub: str) -> None:
    def markers(changes: dict[str, Any]) -> list[str]:
        given = {"model_id": hub, f'model.model_classes."{hub}"': ENTRY} | changes
        return [load(project, given).config.marker, project.processor(given).tokenizer.init_kwargs["marker"]]

    assert markers({}) == ["plain", "plain"]
    assert markers({"model.loading_params.revision": "v2"}) == ["revised", "revised"]
    assert markers({f'model.model_classes."{hub}".loading_params': {"revision": "v2"}}) == ["revised", "revised"]


@shows("model.loading_params.revision")
def test_a_revision_of_a_local_directory_is_said_to_have_no_effect(project: Project) -> None:
    notices = "\n".join(project.config({"model.loading_params.revision": "v2"}).notices)
    assert "revision: has no effect: model is a local directory" in notices


@pytest.fixture
def remote(project: Project, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny model with classes of its own beside its weights; the user's cache of such code is left alone."""
    import transformers.dynamic_module_utils

    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(project.data / "modules"))
    monkeypatch.syspath_prepend(str(project.data / "modules"))
    directory = project.data / "remote"
    shutil.copytree(project.run.directory / "model", directory)
    for base, name, file, module in (
        ("Qwen2VLForConditionalGeneration", "RemoteModel", "config.json", "modeling_remote"),
        ("Qwen2VLProcessor", "RemoteProcessor", "processor_config.json", "processing_remote"),
    ):
        (directory / f"{module}.py").write_text(ANSWERS.format(base=base, name=name))
        content = json.loads((directory / file).read_text())
        auto = "AutoModelForImageTextToText" if "Model" in name else "AutoProcessor"
        (directory / file).write_text(json.dumps(content | {"auto_map": {auto: f"{module}.{name}"}}))
    return directory


@shows(
    "model.loading_params.trust_remote_code",
    "model.processor_params.trust_remote_code",
    "model.model_classes.*.loading_params.trust_remote_code",
    "model.model_classes.*.processor_params.trust_remote_code",
)
@pytest.mark.parametrize("own", [False, True])
def test_code_of_the_repository_runs_only_where_it_is_trusted(project: Project, remote: Path, own: bool) -> None:
    row = ENTRY | {"model_class": "RemoteModel", "processor_class": "RemoteProcessor"}
    changes: dict[str, Any] = {"model_id": str(remote), f'model.model_classes."{remote}"': row}
    with pytest.raises(ModelError, match="trust_remote_code: true"):
        load(project, changes, dtype="float32")
    with pytest.raises(ModelError, match="trust_remote_code: true"):
        project.processor(changes)
    place = f'model.model_classes."{remote}"' if own else "model"
    trusted = changes | {f"{place}.{part}.trust_remote_code": True for part in ("loading_params", "processor_params")}
    # weights under the names of transformers' own class are translated for that class alone
    config = project.config(trusted)
    assert config.model.loading_for(config.model_id).trust_remote_code
    assert project.processor(trusted).came_from_the_repository
    with pytest.raises(ModelError, match=r"lacks .* weights of RemoteModel"):
        load(project, trusted)


@shows("model.processor_params.*", "model.model_classes.*.processor_params.*")
def test_arguments_reach_the_processor(project: Project) -> None:
    assert project.batch().sizes() != project.batch({"model.processor_params.max_pixels": 28 * 28}).sizes()
    small = entry(processor_params={"max_pixels": 28 * 28})
    assert project.batch(small).sizes() == [(28, 28)]
    with pytest.raises(ModelError, match="did you mean 'max_pixels'"):
        project.processor({"model.processor_params.max_pixel": 784})


@shows("model.model_classes.*.processor_params.new_special_tokens")
def test_new_tokens_of_one_model_are_whole(project: Project) -> None:
    told = entry(processor_params={"new_special_tokens": ["<digit>"]})
    tokenizer = project.processor(told).tokenizer
    assert len(tokenizer("<digit>")["input_ids"]) == 1 < len(project.processor().tokenizer("<digit>")["input_ids"])
