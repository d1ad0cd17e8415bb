from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.unit.model.conftest import ENTRY
from vlm_dist.config.vlm_model import LoadingParams, ModelClassEntry
from vlm_dist.errors import ConfigError, ModelError
from vlm_dist.model import load_model, load_processor, parse_dtype, prepare_checkpoint


@pytest.fixture
def copy(tiny_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_dir, tmp_path / "copy"))


def test_the_dtype_is_the_one_asked_for(tiny_dir: Path) -> None:
    assert load_model(str(tiny_dir), ENTRY, LoadingParams()).dtype is torch.bfloat16  # the config's default
    assert load_model(str(tiny_dir), ENTRY, LoadingParams(), dtype="fp32").dtype is torch.float32
    assert load_model(str(tiny_dir), ENTRY).dtype is torch.float32  # the checkpoint's own
    with pytest.raises(ConfigError, match=r"torch\.bfloat16"):
        parse_dtype("torch.bfloat61")


def test_device_map_is_left_to_the_engine(tiny_dir: Path) -> None:
    model = load_model(str(tiny_dir), ENTRY, {"device_map": "auto"})
    assert not hasattr(model, "hf_device_map")


def test_attn_implementation_takes_effect(tiny_dir: Path) -> None:
    model = load_model(str(tiny_dir), ENTRY, {"attn_implementation": "eager"})
    assert model.config._attn_implementation == "eager"
    with pytest.raises(ModelError, match="flush_attention"):
        load_model(str(tiny_dir), ENTRY, {"attn_implementation": "flush_attention"})
    with pytest.raises(ModelError, match=r"FlashAttention3 .* Set loading_params\.attn_implementation"):
        load_model(str(tiny_dir), ENTRY, {"attn_implementation": "flash_attention_3"})


def test_the_cache_is_off_in_training(tiny_model: Any, inputs: dict[str, torch.Tensor]) -> None:
    assert tiny_model(**inputs).past_key_values is None


def remove_weight(directory: Path) -> None:
    weights = load_file(directory / "model.safetensors")
    name = next(name for name in weights if "down_proj" in name)
    del weights[name]
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


def truncate(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def change_shape(directory: Path) -> None:
    weights = load_file(directory / "model.safetensors")
    name = next(name for name in weights if "down_proj" in name)
    weights[name] = weights[name][:-1].clone()
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


def index_without_shard(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (remove_weight, "lacks 1 weights of Qwen2VLForConditionalGeneration.*down_proj"),
        (truncate, "could not load"),
        (change_shape, r"1 weights .*down_proj\.weight is \[31, 48\], expected \[32, 48\]"),
        (index_without_shard, r"lacks model-00002-of-00002\.safetensors"),
        (lambda d: (d / "model.safetensors").unlink(), r"lacks the weights \(model\.safetensors"),
        (lambda d: (d / "config.json").unlink(), r"lacks config\.json"),
        (lambda d: (d / "config.json").write_text("{"), "could not"),
    ],
)
def test_a_damaged_checkpoint_is_one_clear_error(copy: Path, damage: Callable[[Path], Any], expected: str) -> None:
    damage(copy)
    with pytest.raises(ModelError, match=expected) as caught:
        load_model(str(copy), ENTRY)
    assert str(copy) in str(caught.value)


def test_a_damaged_processor_is_one_clear_error(copy: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "processor_config.json"):
        (copy / name).unlink()
    with pytest.raises(ModelError, match=r"the tokenizer .* the processor"):
        load_processor(str(copy), ENTRY)


def test_tied_weights_are_not_missing(copy: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lm_head\.weight"):
        load_model(str(copy), ENTRY)
    config = json.loads((copy / "config.json").read_text())
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = True
    (copy / "config.json").write_text(json.dumps(config))
    model = load_model(str(copy), ENTRY)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_a_checkpoint_of_another_family_is_refused(tiny_dir: Path) -> None:
    llava = ModelClassEntry(
        model_class="LlavaForConditionalGeneration", processor_class="LlavaProcessor", import_path="transformers"
    )
    with pytest.raises(ModelError, match=r"is a 'qwen2_vl'.*Its class is Qwen2VLForConditionalGeneration"):
        load_model(str(tiny_dir), llava)


@pytest.mark.parametrize("load", [load_model, load_processor])
def test_a_directory_that_is_not_there(load: Callable[..., Any]) -> None:
    with pytest.raises(ModelError, match=r"\./models/nowhere: there is no such directory"):
        load("./models/nowhere", ENTRY)


@pytest.mark.parametrize("load", [load_model, load_processor])
def test_a_hub_model_without_network(load: Callable[..., Any]) -> None:
    with pytest.raises(ModelError, match=r"cannot be reached.*hf download some/model"):
        load("some/model", ENTRY)


@pytest.mark.parametrize(
    ("error", "status", "expected"),
    [
        ("GatedRepoError", 403, "gated. Ask for access at https://huggingface.co/some/model.*hf auth login"),
        ("RepositoryNotFoundError", 404, "no such repository on the hub, or a private one"),
        ("RevisionNotFoundError", 404, "no revision 'v9'"),
    ],
)
def test_what_the_hub_says_is_told(monkeypatch: pytest.MonkeyPatch, error: str, status: int, expected: str) -> None:
    import httpx
    import huggingface_hub

    response = httpx.Response(status, request=httpx.Request("GET", "https://huggingface.co/some/model"))

    def answer(*args: Any, **kwargs: Any) -> None:
        raise getattr(huggingface_hub.errors, error)("says the hub", response=response)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", answer)
    with pytest.raises(ModelError, match=expected):
        load_model("some/model", ENTRY, {"revision": "v9"})


def test_a_hub_model_is_fetched_whole_before_it_is_loaded(
    tiny_model: Any, tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers.utils.hub
    from huggingface_hub import constants

    snapshot = tmp_path / "models--someone--tiny" / "snapshots" / ("0" * 40)
    shutil.copytree(tiny_dir, snapshot, ignore=shutil.ignore_patterns("*.safetensors"))
    tiny_model.save_pretrained(snapshot, max_shard_size="20KB")
    (tmp_path / "models--someone--tiny" / "refs").mkdir()
    (tmp_path / "models--someone--tiny" / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(transformers.utils.hub.constants, "HF_HUB_CACHE", str(tmp_path))
    prepare_checkpoint("someone/tiny", ENTRY)
    shard = sorted(snapshot.glob("model-0000*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ModelError, match=rf"fetch the weights of someone/tiny.*{shard.name}"):
        prepare_checkpoint("someone/tiny", ENTRY)


def test_a_processor_class_of_another_model_is_told_with_the_right_one(copy: Path) -> None:
    for name in ("video_preprocessor_config.json", "preprocessor_config.json", "processor_config.json"):
        if (copy / name).is_file():
            content = json.loads((copy / name).read_text())
            for key in ("video_processor", "image_processor", "image_processor_type"):
                content.pop(key, None)
            (copy / name).write_text(json.dumps(content))
    entry = ModelClassEntry(
        model_class="Qwen2VLForConditionalGeneration",
        processor_class="LlavaOnevisionProcessor",
        import_path="transformers",
    )
    with pytest.raises(ModelError, match=r"belongs to Qwen2VLProcessor, but .*set processor_class: Qwen2VLProcessor"):
        load_processor(str(copy), entry)
