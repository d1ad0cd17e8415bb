"""Model code beside the weights, written as for an older transformers; and, where it is at hand, the published code."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tests.unit.model.original_internvl import ADDED, native_model, save_original
from tests.unit.model.original_internvl import ENTRY as INTERNVL
from tests.unit.model.original_phi3 import ENTRY as PHI
from tests.unit.model.original_phi3 import VARIABLE, save_phi3_vision
from vlm_dist.config.vlm_model import ModelClassEntry
from vlm_dist.errors import ModelError
from vlm_dist.model import load_model, load_processor

OLD_CODE = '''"""A tiny language model with code of its own, written the way of transformers 4; made by a test."""
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast


class OldConfig(PretrainedConfig):
    model_type = "old_of_ours"

    def __init__(self, hidden_size=16, vocab_size=20, **kwargs):
        self.hidden_size, self.vocab_size = hidden_size, vocab_size
        super().__init__(**kwargs)


class Rotary(nn.Module):
    def __init__(self, dim):
        super().__init__()
        frequencies = 1.0 / 10000 ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
        self.register_buffer("inv_freq", frequencies, persistent=False)


class OldModel(PreTrainedModel):
    config_class = OldConfig
    _tied_weights_keys = ["lm_head.weight"]

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.rotary = Rotary(config.hidden_size)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        {post_init}

    def get_input_embeddings(self):
        return self.embed

    def _init_weights(self, module):
        pass

    def prepare_inputs_for_generation(self, input_ids, **kwargs):
        return {{"input_ids": input_ids}}

    def forward(self, input_ids, **kwargs):
        angles = torch.arange(input_ids.shape[1])[:, None] * self.rotary.inv_freq
        return CausalLMOutputWithPast(
            logits=self.lm_head(self.embed(input_ids) * torch.cat((angles, angles), -1).cos())
        )
'''
OLD = ModelClassEntry(model_class="OldModel", processor_class="OldProcessor")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers.dynamic_module_utils

    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    monkeypatch.setenv("VLM_DIST_CACHE", str(tmp_path / "cache"))


def save_old(directory: Path, *, tie: bool, post_init: bool) -> dict[str, torch.Tensor]:
    directory.mkdir()
    (directory / "modeling_old.py").write_text(OLD_CODE.format(post_init="self.post_init()" if post_init else ""))
    config = {
        "architectures": ["OldModel"],
        "auto_map": {"AutoConfig": "modeling_old.OldConfig", "AutoModelForCausalLM": "modeling_old.OldModel"},
        "model_type": "old_of_ours",
        "tie_word_embeddings": tie,
    }
    (directory / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)
    weights = {"embed.weight": torch.randn(20, 16, generator=generator)}
    if not tie:
        weights["lm_head.weight"] = torch.randn(20, 16, generator=generator)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return weights


@pytest.mark.parametrize(("tie", "post_init"), [(False, True), (False, False), (True, True)])
@pytest.mark.parametrize("entry", [OLD, ModelClassEntry()])
def test_buffers_that_no_checkpoint_holds_are_right(
    tmp_path: Path, tie: bool, post_init: bool, entry: ModelClassEntry
) -> None:
    weights = save_old(tmp_path / "old", tie=tie, post_init=post_init)
    model: Any = load_model(str(tmp_path / "old"), entry, {"trust_remote_code": True}, dtype="float32")
    frequencies = 1.0 / 10000 ** (torch.arange(0, 16, 2) / 16)
    assert torch.equal(model.rotary.inv_freq, frequencies)  # they decide the loss, and nothing tells if they are wrong
    assert torch.equal(model.lm_head.weight, weights["embed.weight" if tie else "lm_head.weight"])
    assert (model.lm_head.weight is model.embed.weight) == tie
    ids = torch.arange(4)[None]
    angles = torch.arange(4)[:, None] * torch.cat((frequencies, frequencies))
    head = weights["embed.weight" if tie else "lm_head.weight"]
    torch.testing.assert_close(model(ids).logits[0], (weights["embed.weight"][:4] * angles.cos()) @ head.T)
    assert model.generate(ids, max_new_tokens=2, use_cache=False).shape == (1, 6)


def test_without_trust_none_of_it_runs(tmp_path: Path) -> None:
    save_old(tmp_path / "old", tie=False, post_init=True)
    (tmp_path / "old" / "modeling_old.py").write_text("raise SystemExit('it ran')")
    for entry in (OLD, ModelClassEntry()):
        with pytest.raises(ModelError, match="trust_remote_code: true"):
            load_model(str(tmp_path / "old"), entry)


OLD_PROCESSOR = '''"""A processor with a part of its own, written the way of transformers 4; made by a test."""
from transformers import CLIPImageProcessor, Qwen2VLProcessor
from transformers.processing_utils import ProcessorMixin


class PartOfOurs(CLIPImageProcessor):
    pass


class OldProcessor(ProcessorMixin):
    attributes = ["image_processor", "tokenizer"]
    image_processor_class = "PartOfOurs"
    tokenizer_class = "AutoTokenizer"

    def __init__(self, image_processor, tokenizer):
        self.image_processor, self.tokenizer = image_processor, tokenizer
'''


def test_a_processor_may_have_parts_of_its_own(tiny_dir: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(tiny_dir, tmp_path / "old"))
    (directory / "processing_old.py").write_text(OLD_PROCESSOR)
    settings = {"auto_map": {"AutoProcessor": "processing_old.OldProcessor"}, "size": {"shortest_edge": 30}}
    (directory / "processor_config.json").unlink()
    (directory / "preprocessor_config.json").write_text(json.dumps(settings))
    entry = ModelClassEntry(model_class="Qwen2VLForConditionalGeneration", processor_class="OldProcessor")
    processor = load_processor(str(directory), entry, {"trust_remote_code": True})
    assert type(processor.image_processor).__name__ == "PartOfOurs"


def published(variable: str) -> Path:
    """A directory with the published code of a model, which is not ours to ship."""
    if variable not in os.environ:
        pytest.skip(f"set {variable} to a directory with the model's own code")
    return Path(os.environ[variable])


@pytest.fixture
def phi(tmp_path: Path) -> Path:
    """Phi-3-vision with two layers in each tower."""
    return save_phi3_vision(published(VARIABLE), tmp_path / "phi")


@pytest.mark.filterwarnings("ignore")
def test_phi3_vision_trains_and_generates(phi: Path) -> None:
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    model: Any = load_model(str(phi), PHI, {"trust_remote_code": True}, dtype="float32")
    processor = load_processor(str(phi), PHI, {"trust_remote_code": True, "num_crops": 4})
    pictures = [Image.linear_gradient("L").convert("RGB").resize(size) for size in ((200, 90), (90, 400))]
    turn = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Both?"}]
    said = [{"type": "text", "text": "noise"}]
    text = processor.apply_chat_template([{"role": "user", "content": turn}, {"role": "assistant", "content": said}])
    assert text == "<|user|>\n<|image_1|>\n<|image_2|>\nBoth?<|end|>\n<|assistant|>\nnoise<|end|>\n"
    original_class = get_class_from_dynamic_module("processing_phi3_v.Phi3VProcessor", str(phi))
    expected = original_class(processor.image_processor, processor.tokenizer)(text, images=pictures)
    batch = processor(text=[text], images=[pictures], return_tensors="pt")
    assert {key: torch.equal(value, expected[key]) for key, value in batch.items()} == dict.fromkeys(expected, True)
    counts = processor._get_num_multimodal_tokens(image_sizes=[(90, 200), (400, 90)]).num_image_tokens
    assert counts == [int((batch["input_ids"] == -k).sum()) for k in (1, 2)]

    told = processor(
        text=[text],
        images=[pictures],
        text_kwargs={"return_offsets_mapping": True},
        return_text_replacement_offsets=True,
    )
    expanded = text
    for one in reversed(told["text_replacement_offsets"][0]):
        expanded = expanded[: one["span"][0]] + one["replacement"] + expanded[one["span"][1] :]
    noise = expanded.index("noise")
    inside = [i for i, (a, b) in enumerate(told["offset_mapping"][0]) if a >= noise and a < b <= noise + 5]
    assert processor.tokenizer.decode([told["input_ids"][0][i] for i in inside]) == "noise"

    ids = batch["input_ids"].clone()
    model.train()(**batch, labels=ids.clamp_min(0)).loss.backward()
    assert torch.equal(batch["input_ids"], ids)  # the code of the model would have changed it
    assert model.model.vision_embed_tokens.img_processor.encoder.layers[0].mlp.fc1.weight.grad.abs().sum() > 0
    assert model.eval().generate(**batch, max_new_tokens=2).shape[1] == ids.shape[1] + 2


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("select_layer", [-1, -2])
def test_internvl2_computes_what_its_own_code_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, select_layer: int
) -> None:
    source = published("VLM_DIST_INTERNVL2_REMOTE_CODE")
    package = tmp_path / "code" / "internvl2_published"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    for file in source.glob("*.py"):
        shutil.copy(file, package)
    monkeypatch.syspath_prepend(str(tmp_path / "code"))
    for name in ("timm", "timm.models", "timm.models.layers"):  # of which only DropPath is imported, never used
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["timm.models.layers"].DropPath = torch.nn.Identity  # type: ignore[attr-defined]
    configuration = importlib.import_module("internvl2_published.configuration_internvl_chat")
    modeling = importlib.import_module("internvl2_published.modeling_internvl_chat")
    monkeypatch.setattr(modeling.InternVLChatModel, "all_tied_weights_keys", {}, raising=False)
    monkeypatch.setattr(modeling.InternLM2ForCausalLM, "_tied_weights_keys", {})

    directory = save_original(tmp_path / "InternVL2-tiny", native_model(), select_layer=select_layer)
    original = modeling.InternVLChatModel(
        configuration.InternVLChatConfig(**json.loads((directory / "config.json").read_text())), use_flash_attn=False
    ).eval()
    for name, weight in original.named_parameters():
        torch.nn.init.normal_(weight, 1.0 if "norm" in name or ".ls" in name else 0.0, 0.3)
    weights = {name: value.contiguous() for name, value in original.state_dict().items()}
    save_file(weights, directory / "model.safetensors")
    model = load_model(str(directory), INTERNVL)
    processor = load_processor(str(directory), INTERNVL)

    conversation = importlib.import_module("internvl2_published.conversation").get_conv_template("internlm2-chat")
    conversation.append_message(conversation.roles[0], "<IMG_CONTEXT>\nwhat is it?")
    conversation.append_message(conversation.roles[1], "hello")
    turns = [("user", [{"type": "image"}, {"type": "text", "text": "what is it?"}]), ("assistant", "hello")]
    text = processor.apply_chat_template([{"role": role, "content": content} for role, content in turns])
    assert text == conversation.get_prompt()

    picture = Image.linear_gradient("L").convert("RGB").resize((150, 60))
    batch = processor(text=[text], images=[[picture]], return_tensors="pt")
    original.img_context_token_id = next(i for i, token in ADDED.items() if token == "<IMG_CONTEXT>")
    with torch.no_grad():
        flags = torch.ones(len(batch["pixel_values"]), 1, dtype=torch.long)
        expected = original(**batch, image_flags=flags, use_cache=False, return_dict=True).logits
        torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-4, atol=1e-4)
