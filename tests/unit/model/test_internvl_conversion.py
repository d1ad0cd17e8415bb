"""InternVLChatModel checkpoints: the guide's lines load them through the native class, converted once."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.unit.model.original_internvl import (
    ADDED,
    ENTRY,
    PIECES,
    SYSTEM,
    VOCABULARY,
    expected_ids,
    native_model,
    save_original,
)
from vlm_dist.config.vlm_model import ModelClassEntry
from vlm_dist.errors import ModelError
from vlm_dist.model import load_model, load_processor
from vlm_dist.model.conversion import cache, lease
from vlm_dist.model.conversion.tensor_files import TensorWriter, stored_tensors

NAMES = {token: i for i, token in ADDED.items()}


@pytest.fixture(scope="module")
def native() -> Any:
    return native_model()


@pytest.fixture
def original(native: Any, tmp_path: Path) -> Path:
    return save_original(tmp_path / "InternVL2-tiny", native)


@pytest.fixture(autouse=True)
def converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VLM_DIST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "converted"


def inputs(processor: Any, text: str) -> dict[str, torch.Tensor]:
    picture = Image.linear_gradient("L").convert("RGB").resize((150, 60))
    return dict(processor(text=[text], images=[[picture]], return_tensors="pt"))


def render(processor: Any, *messages: tuple[str, list[dict[str, str]]]) -> str:
    turns = [{"role": role, "content": content} for role, content in messages]
    return str(processor.apply_chat_template(turns, tokenize=False))


ASKED = [{"type": "image"}, {"type": "text", "text": "what is it?"}]
SAID = [{"type": "text", "text": "hello"}]


@pytest.mark.parametrize("num_shards", [1, 3])
def test_the_native_model_computes_the_same(native: Any, tmp_path: Path, num_shards: int) -> None:
    directory = save_original(tmp_path / "sharded", native, num_shards)
    processor = load_processor(str(directory), ENTRY)
    batch = inputs(processor, render(processor, ("user", ASKED), ("assistant", SAID)))
    assert batch["pixel_values"].shape == (4, 3, 56, 56)  # three tiles in a row and the thumbnail
    assert int((batch["input_ids"] == native.config.image_token_id).sum()) == 4 * 4
    model = load_model(str(directory), ENTRY)
    assert type(model) is type(native)
    assert model.dtype is torch.float32  # the checkpoint's own
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, native(**batch, use_cache=False).logits, rtol=1e-4, atol=1e-4)
    weights = native.state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())
    assert model.generation_config.eos_token_id == [NAMES["<|im_end|>"], 2]


TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "pad_token_id": 2,
}


@pytest.mark.parametrize(
    ("name", "rope", "tie"),
    [
        ("Llama", {"rope_theta": 5000000.0}, False),
        ("Qwen2", {"rope_theta": 1000000.0}, False),
        ("Qwen2", {"rope_theta": 1000000.0}, True),
        (
            "Phi3",
            {
                "rope_theta": 10000.0,
                "original_max_position_embeddings": 2048,
                "rope_scaling": {"type": "su", "long_factor": [2.0] * 4, "short_factor": [1.5] * 4},
            },
            False,
        ),
    ],
)
def test_other_language_models(tmp_path: Path, name: str, rope: dict[str, Any], tie: bool) -> None:
    import transformers

    # as transformers reads such a config.json itself
    given = TEXT | {"tie_word_embeddings": tie} | {key: rope[key] for key in rope if not key.startswith("rope")}
    parameters = {"rope_theta": rope["rope_theta"], "rope_type": "default"}
    if "rope_scaling" in rope:
        parameters |= {**rope["rope_scaling"], "rope_type": "longrope"}
        parameters.pop("type")
    native = native_model(getattr(transformers, f"{name}Config")(**given, rope_parameters=parameters), tie=tie)
    language = TEXT | rope | {"architectures": [f"{name}ForCausalLM"], "tie_word_embeddings": tie}
    directory = save_original(tmp_path / name, native, llm_config=language)
    model = load_model(str(directory), ENTRY)
    processor = load_processor(str(directory), ENTRY)
    batch = inputs(processor, render(processor, ("user", ASKED), ("assistant", SAID)))
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, native(**batch, use_cache=False).logits, rtol=1e-4, atol=1e-4)
    assert (model.lm_head.weight is model.model.language_model.embed_tokens.weight) == tie


def test_a_tokenizer_of_qwen2(native: Any, tmp_path: Path) -> None:
    from tokenizers import pre_tokenizers

    directory = save_original(tmp_path / "qwen", native, template="Hermes-2")
    (directory / "tokenizer.model").unlink()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    (directory / "vocab.json").write_text(json.dumps({char: i for i, char in enumerate([*alphabet, "he", "<unused>"])}))
    (directory / "merges.txt").write_text("#version: 0.2\nh e\n")
    tokens = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>")
    added = {token: 258 + i for i, token in enumerate(tokens)}
    (directory / "added_tokens.json").write_text(json.dumps(added))
    described = {str(i): {"content": token, "special": True} for token, i in added.items()}
    settings = {"added_tokens_decoder": described, "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings | {"tokenizer_class": "Qwen2Tokenizer"}))
    tokenizer = load_processor(str(directory), ENTRY).tokenizer
    assert tokenizer("<|im_start|>he</img><|im_end|>")["input_ids"] == [259, 256, 262, 260]  # and no <s>
    assert tokenizer.convert_tokens_to_ids(list(tokens)) == list(added.values())
    assert [tokenizer.eos_token_id, tokenizer.pad_token_id] == [258, 258]


def test_every_special_token_has_the_id_that_the_model_knows(original: Path) -> None:
    tokenizer = load_processor(str(original), ENTRY).tokenizer
    for text in ("hello world is it", "what  is", "héllo 中", "worldlet [UNUSED_TOKEN", "a|b"):
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == expected_ids(text)
        assert tokenizer.decode(expected_ids(text)) == text
    assert tokenizer("<|im_start|>hello<|im_end|><box>")["input_ids"] == [
        1,  # <s>, which the language model was trained with
        NAMES["<|im_start|>"],
        *expected_ids("hello"),
        NAMES["<|im_end|>"],
        NAMES["<box>"],
    ]
    assert {NAMES["<|im_end|>"], NAMES["<|im_start|>"]} == {len(PIECES) - 2, len(PIECES) - 1}
    assert {"<img>", "</img>", "<IMG_CONTEXT>"} <= set(tokenizer.all_special_tokens)


def test_the_prompt_is_that_of_the_template_that_config_json_names(native: Any, tmp_path: Path) -> None:
    expected = {
        "internlm2-chat": f"<|im_start|>system\n{SYSTEM}<|im_end|>"
        "<|im_start|>user\n<IMG_CONTEXT>\nwhat is it?<|im_end|><|im_start|>assistant\nhello<|im_end|>",
        "phi3-chat": f"<|system|>\n{SYSTEM}<|end|>"
        "<|user|>\n<IMG_CONTEXT>\nwhat is it?<|end|><|assistant|>\nhello<|end|>",
    }
    expected["Hermes-2"] = expected["internlm2-chat"]
    for template, text in expected.items():
        processor = load_processor(str(save_original(tmp_path / template, native, template=template)), ENTRY)
        assert render(processor, ("user", ASKED), ("assistant", SAID)) == text
    own = render(processor, ("system", [{"type": "text", "text": "Be brief."}]), ("user", SAID))
    assert own == "<|im_start|>system\nBe brief.<|im_end|><|im_start|>user\nhello<|im_end|>"


def test_it_is_converted_once_and_again_when_the_source_changes(original: Path, converted: Path) -> None:
    load_model(str(original), ENTRY)
    (made,) = converted.iterdir()
    assert made.name.startswith("InternVL2-tiny-")
    before = (made / "model.safetensors").stat().st_mtime_ns
    load_model(str(original), ENTRY)
    assert [(made / "model.safetensors").stat().st_mtime_ns] == [before]
    config = json.loads((original / "config.json").read_text())
    (original / "config.json").write_text(json.dumps(config | {"select_layer": -2}))
    assert load_model(str(original), ENTRY).config.vision_feature_layer == -2
    assert len(list(converted.iterdir())) == 2


@pytest.mark.parametrize(
    "entry",
    [
        ModelClassEntry(),
        ModelClassEntry(model_class="AutoModelForImageTextToText", processor_class="AutoProcessor"),
        ModelClassEntry(model_class="InternVLForConditionalGeneration", processor_class="InternVLProcessor"),
    ],
)
def test_other_lines_that_mean_the_same(original: Path, entry: ModelClassEntry) -> None:
    assert type(load_model(str(original), entry)).__name__ == "InternVLForConditionalGeneration"
    assert type(load_processor(str(original), entry, {"max_patches": 2})).__name__ == "InternVLProcessor"


def test_a_hub_cache_does_as_well_as_a_directory(
    native: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, converted: Path
) -> None:
    from huggingface_hub import constants

    repository = tmp_path / "hub" / "models--OpenGVLab--InternVL2-tiny"
    save_original(repository / "snapshots" / ("1" * 40), native)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("1" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    load_processor("OpenGVLab/InternVL2-tiny", ENTRY)
    load_model("OpenGVLab/InternVL2-tiny", ENTRY)
    assert sorted(path.name.split("-tiny-")[0] for path in converted.iterdir()) == ["OpenGVLab--InternVL2"] * 2


def convert_at_once(barrier: Any, made: Path, name: str) -> None:
    def make(target: Path, progress: Callable[[], None]) -> None:
        with made.open("a") as stream:
            stream.write(f"{os.getpid()}\n")
        for i in range(5):
            time.sleep(0.1)
            (target / f"part{i}").touch()
            progress()

    barrier.wait(timeout=30)
    assert len(list(cache.make_once(name, 0, make).iterdir())) == 5


def test_processes_that_start_at_once_convert_it_once(converted: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(4)
    processes = [context.Process(target=convert_at_once, args=(barrier, tmp_path / "made", "x")) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=60)
        process.kill()
    assert [process.exitcode for process in processes] == [0] * 4
    assert len((tmp_path / "made").read_text().splitlines()) == 1
    assert [path.name for path in converted.iterdir()] == ["x"]  # neither lease nor half a directory is left


def test_an_interrupted_conversion_leaves_nothing_that_counts(
    original: Path, converted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = TensorWriter.write
    written = []

    def interrupted(self: TensorWriter, name: str, tensor: torch.Tensor) -> None:
        written.append(name)
        if len(written) == 5:
            raise KeyboardInterrupt
        write(self, name, tensor)

    monkeypatch.setattr(TensorWriter, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load_model(str(original), ENTRY)
    assert list(converted.iterdir()) == []
    monkeypatch.undo()


def test_what_a_killed_process_left_is_cleared_away_at_once(original: Path, converted: Path) -> None:
    load_model(str(original), ENTRY)
    (made,) = converted.iterdir()
    ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    host, process = os.uname().nodename, int(ended.stdout)
    half = made.rename(converted / f".{made.name}.{host}.{process}.abcdef01.part")
    (half / "model.safetensors").unlink()
    (converted / f".{made.name}.lease").write_text(f"{host}:{process}:0123")
    start = time.monotonic()
    load_model(str(original), ENTRY)
    assert time.monotonic() - start < lease.STALE_SECONDS / 10
    assert [path.name for path in converted.iterdir()] == [made.name]


def test_a_dead_machine_is_not_waited_for_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "STALE_SECONDS", 0.5)
    (tmp_path / ".target.lease").write_text("another-host:1:0123")
    assert lease.Lease.acquire(tmp_path / "target", "converting it") is not None


def rename_weight(directory: Path) -> None:
    weights = load_file(directory / "model.safetensors")
    weights["language_model.model.layers.0.attention.wo.lora"] = weights.pop(
        "language_model.model.layers.0.attention.wo.weight"
    )
    save_file(weights, directory / "model.safetensors")


def change_config(**changes: Any) -> Any:
    def change(directory: Path) -> None:
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps(config | changes))

    return change


def pickle_weights(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (rename_weight, r"lacks 1 weights: model\.language_model\.layers\.0\.self_attn\.o_proj\.weight"),
        (change_config(llm_config={"architectures": ["GroqForCausalLM"]}), r"GroqForCausalLM has no equal .*-hf"),
        (change_config(ps_version="v1"), "ps_version is v1"),
        (change_config(template="vicuna"), r"'vicuna' is not known \(known are internlm2-chat"),
        (change_config(use_thumbnail=False), "without a thumbnail"),
        (pickle_weights, "as pickles"),
        (lambda d: (d / "tokenizer.model").write_bytes(b"\x0a\xff"), r"tokenizer\.model is not a SentencePiece model"),
        (lambda d: (d / "tokenizer.model").unlink(), r"has no tokenizer\.json"),
    ],
)
def test_what_cannot_be_converted_is_one_clear_error(
    original: Path, converted: Path, damage: Any, expected: str
) -> None:
    damage(original)
    with pytest.raises(ModelError, match=expected) as caught:
        load_model(str(original), ENTRY)
    assert str(original) in str(caught.value)
    assert not converted.exists() or list(converted.iterdir()) == []


def test_a_full_disk_is_said(original: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda path: SimpleNamespace(free=7))
    with pytest.raises(ModelError, match="VLM_DIST_CACHE"):
        load_model(str(original), ENTRY)


def memory_kib(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def test_a_conversion_takes_the_memory_of_one_tensor(tmp_path: Path) -> None:
    source, target = tmp_path / "model.safetensors", tmp_path / "copy.safetensors"
    with TensorWriter(source, [(f"weight.{i:02}", "F32", (4, 1 << 19)) for i in range(64)]) as writer:
        for i in range(64):  # 8 MiB each
            writer.write(f"weight.{i:02}", torch.full((4, 1 << 19), float(i)))
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak
    before = memory_kib("VmRSS")
    stored = stored_tensors(source)
    with TensorWriter(target, [(tensor.name, tensor.dtype, tensor.shape) for tensor in stored]) as writer:
        for tensor in stored:
            writer.write(tensor.name, tensor.read())
    assert memory_kib("VmHWM") - before < 40 << 10  # a few tensors, of 512 MiB
    assert source.read_bytes() == target.read_bytes()
