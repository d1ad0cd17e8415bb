"""`peft.adapter`: adapters that PEFT made itself are told apart from those that this run cannot continue."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from tests.unit.model.conftest import ALL_LORA, lora
from tests.unit.model.zoo import kind, move, trained
from vlm_dist.checkpoint import StartingPoint
from vlm_dist.checkpoint.earlier_tokens import check_new_tokens
from vlm_dist.errors import CheckpointError, ConfigError
from vlm_dist.model import attach_adapter, load_processor, make_room_for_tokens

pytestmark = pytest.mark.filterwarnings("ignore")

LANGUAGE = {"vision": "freeze", "projector": "freeze", "language": "lora"}
#: As a user of PEFT writes it: q_proj and v_proj are in no vision tower of Qwen2-VL.
THEIRS: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
OURS = {"target_modules": ["q_proj", "v_proj"]}


def made_by_peft(directory: Path, **changes: Any) -> Any:
    model = get_peft_model(kind("qwen2_vl").load(), LoraConfig(**(THEIRS | changes)), autocast_adapter_dtype=False)
    move(model)
    model.save_pretrained(directory)
    return model


@pytest.mark.parametrize(
    ("theirs", "ours", "policy"),
    [
        ({}, {}, LANGUAGE),
        ({}, {}, LANGUAGE | {"projector": "full"}),  # more may be trained in full
        ({"use_dora": True, "use_rslora": True}, {"use_dora": True, "use_rslora": True}, LANGUAGE),
        ({"bias": "all"}, {"bias": "all"}, LANGUAGE),
        (
            {"modules_to_save": ["lm_head", "merger"]},
            {"modules_to_save": ["lm_head"]},
            LANGUAGE | {"projector": "full"},
        ),
    ],
)
def test_an_adapter_made_by_peft_is_taken(
    tmp_path: Path, theirs: dict[str, Any], ours: dict[str, Any], policy: dict[str, str]
) -> None:
    source = made_by_peft(tmp_path, **theirs)
    settings = lora(**OURS, **ours)
    if theirs.get("bias") == "all":
        policy = ALL_LORA  # PEFT trains every bias there is
        settings = lora(target_modules=r".*language_model.*\.(q_proj|v_proj)", bias="all")
        policy = dict(policy)
    model = attach_adapter(kind("qwen2_vl").load(), settings, policy)
    point = StartingPoint.open(tmp_path)
    point.check_settings(settings)
    names, tensors = point.parameter_names(model), point.read()
    with torch.no_grad():
        for key, name in names.items():
            model.get_parameter(name).copy_(tensors[key])
        wanted = kind("qwen2_vl").logits(source.eval())
        assert torch.equal(kind("qwen2_vl").logits(model.eval()), wanted)
    assert {name for name in trained(model) if "lora_" in name} <= set(names.values())


@pytest.mark.parametrize(
    ("theirs", "ours", "policy", "expected"),
    [
        ({"r": 8}, {}, LANGUAGE, r"r: 8 there, 4 here\. To start from it, set peft: \{r: 8\}"),
        ({"lora_alpha": 3, "use_dora": True}, {}, LANGUAGE, r"set peft: \{lora_alpha: 3, use_dora: true\}"),
        ({"rank_pattern": {"q_proj": 2}}, {}, LANGUAGE, "rank_pattern, which is not yet supported"),
        ({"init_lora_weights": "olora"}, {}, LANGUAGE, "'olora', which changes the base"),
        ({}, {"target_modules": ["q_proj"]}, LANGUAGE, r"holds 4 of 8 weights that this run does not train, e\.g\. "),
        ({}, {"target_modules": ["q_proj", "v_proj", "o_proj"]}, LANGUAGE, "lacks 4 LoRA weights of this run"),
        ({"modules_to_save": ["lm_head"]}, {}, LANGUAGE, r"e\.g\. base_model\.model\.lm_head\.weight"),
    ],
)
def test_an_adapter_of_another_form_is_refused(
    tmp_path: Path, theirs: dict[str, Any], ours: dict[str, Any], policy: dict[str, str], expected: str
) -> None:
    made_by_peft(tmp_path, **theirs)
    settings = lora(**(OURS | ours))
    point = StartingPoint.open(tmp_path)
    with pytest.raises(ConfigError, match=expected):
        point.check_settings(settings)
        point.parameter_names(attach_adapter(kind("qwen2_vl").load(), settings, policy))


def test_what_is_no_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is no directory with"):
        StartingPoint.open(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    (tmp_path / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(CheckpointError, match="a pickle, which is not read"):
        StartingPoint.open(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"cut")
    with pytest.raises(CheckpointError, match="cannot be read"):
        StartingPoint.open(tmp_path)
    for content in ("[]", '"text"', "{"):
        (tmp_path / "adapter_config.json").write_text(content)
        with pytest.raises(CheckpointError, match=r"cannot be read|holds a (list|str), expected a mapping"):
            StartingPoint.open(tmp_path)


def test_values_that_are_no_numbers_are_told(tmp_path: Path) -> None:
    made_by_peft(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    tensors[min(tensors)][0, 0] = torch.nan
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=f"holds NaN or infinity in 1 of 8 weights, e.g. {min(tensors)}"):
        StartingPoint.open(tmp_path).read()


def test_an_adapter_of_another_model_says_so_first(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made_by_peft(tmp_path)
    other = attach_adapter(kind("llava").load(), lora(target_modules=["fc1"]), ALL_LORA)
    with pytest.raises(ConfigError, match=r"adapter: it was trained on .*qwen2_vl, but this run's model is .*llava"):
        StartingPoint.open(tmp_path).parameter_names(other)

    same = attach_adapter(kind("qwen2_vl").load(), lora(**OURS), LANGUAGE)
    StartingPoint.open(tmp_path).parameter_names(same)
    assert not caplog.messages
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "Qwen/Another"}))
    StartingPoint.open(tmp_path).parameter_names(same)
    assert "it was trained on Qwen/Another" in caplog.text


def processor_with(*tokens: str) -> Any:
    one = kind("qwen2_vl")
    return load_processor(str(one.directory), one.entry, {"new_special_tokens": list(tokens)})


@pytest.mark.parametrize("place", ["adapter", "checkpoint-3"])
def test_new_tokens_must_be_those_of_the_earlier_run(tmp_path: Path, place: str) -> None:
    made_by_peft(tmp_path / place)
    processor_with("<a>", "<b>").save_pretrained(tmp_path / "processor")
    point = StartingPoint.open(tmp_path / place)
    check_new_tokens(point, processor_with("<a>", "<b>"))
    check_new_tokens(point, processor_with("<a>", "<b>", "<c>"))  # behind those of the earlier run
    for tokens in (["<b>", "<a>"], ["<a>"], [], ["<c>", "<a>", "<b>"]):
        with pytest.raises(ConfigError, match=r'new_special_tokens: \["<a>", "<b>"\]'):
            check_new_tokens(point, processor_with(*tokens))


def test_rows_of_the_vocabulary_that_nobody_explains_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made_by_peft(tmp_path / "adapter", modules_to_save=["lm_head"])
    point = StartingPoint.open(tmp_path / "adapter")
    check_new_tokens(point, processor_with())
    assert not caplog.messages
    check_new_tokens(point, processor_with("<a>"))
    assert "no processor/ stands beside it" in caplog.text

    model = kind("qwen2_vl").load()
    make_room_for_tokens(model, [model.get_input_embeddings().weight.shape[0]])
    model = attach_adapter(model, lora(**OURS, modules_to_save=["lm_head"]), LANGUAGE)
    with pytest.raises(ConfigError, match="new_special_tokens must list the tokens of the run that made it"):
        point.parameter_names(model)
