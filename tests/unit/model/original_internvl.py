"""A tiny InternVL2 checkpoint in the format of its own code, made from a native model by that code's equations."""

from __future__ import annotations

import json
import struct
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import InternVLConfig, InternVLForConditionalGeneration, InternVLVisionConfig, LlamaConfig

from tests.unit.families.zoo.parts import with_random_weights
from vlm_dist.config.vlm_model import ModelClassEntry

#: As the guide has them.
ENTRY = ModelClassEntry(
    model_class="InternVLChatModel", processor_class="InternVLChatProcessor", import_path="transformers"
)
SYSTEM = "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。"
_HEADS, _GROUPS, _DIM, _SIDE = 4, 2, 8, 56

_UNKNOWN, _CONTROL, _NORMAL, _USER_DEFINED, _BYTE = 2, 3, 1, 4, 6
_WORDS = ("he", "ll", "hell", "hello", "▁w", "or", "▁wor", "ld", "▁world", "is", "it", "▁it", "▁is", "wh", "at", "what")
#: Text, score, kind: of a vocabulary whose last entries are kept free for special tokens.
PIECES: list[tuple[str, float, int]] = [
    ("<unk>", 0.0, _UNKNOWN),
    ("<s>", 0.0, _CONTROL),
    ("</s>", 0.0, _CONTROL),
    *((f"<0x{byte:02X}>", 0.0, _BYTE) for byte in range(256)),
    *((word, -float(rank), _NORMAL) for rank, word in enumerate(_WORDS)),
    *((char, -100.0, _NORMAL) for char in "▁abcdefghijklmnopqrstuvwxyzNIVL?.|"),
    *((f"[UNUSED_TOKEN_{i}]", -200.0, _USER_DEFINED) for i in range(2)),
]
#: Two stand where pieces were kept free, the others follow on the vocabulary.
ADDED = {
    len(PIECES) - 2 + i: token
    for i, token in enumerate(("<|im_end|>", "<|im_start|>", "<img>", "</img>", "<IMG_CONTEXT>", "<box>"))
}
VOCABULARY = len(PIECES) + 4


def native_model(text_config: Any = None, tie: bool = False) -> Any:
    """The native model whose weights the checkpoint has.

    Args:
        text_config: of its language model; None: what InternLM2 becomes.
        tie: head and embedding are one.
    """
    config = InternVLConfig(
        text_config=text_config
        or LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=_HEADS * _DIM,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=_HEADS,
            num_key_value_heads=_GROUPS,
            max_position_embeddings=4096,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e6},
        ),
        vision_config=InternVLVisionConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=_SIDE,
            attention_bias=True,
        ),
        image_token_id=next(i for i, token in ADDED.items() if token == "<IMG_CONTEXT>"),
        image_seq_length=4,
        tie_word_embeddings=tie,
    )
    return with_random_weights(InternVLForConditionalGeneration(config))


def save_original(directory: Path, model: Any, num_shards: int = 1, **changes: Any) -> Path:
    """Write the weights of a native model as its predecessor had them, with config and tokenizer.

    Args:
        directory: to write into.
        model: native.
        num_shards: of the weights.
        **changes: to config.json.
    """
    directory.mkdir(parents=True, exist_ok=True)
    config = original_config() | changes
    is_internlm2 = config["llm_config"]["architectures"] == ["InternLM2ForCausalLM"]
    weights = {name: tensor.contiguous().clone() for name, tensor in original_weights(model, is_internlm2).items()}
    if num_shards == 1:
        save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    else:
        names = [f"model-{i + 1:05}-of-{num_shards:05}.safetensors" for i in range(num_shards)]
        homes = {key: names[i % num_shards] for i, key in enumerate(weights)}
        for name in names:
            save_file({k: v for k, v in weights.items() if homes[k] == name}, directory / name)
        (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": homes}))
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "tokenizer.model").write_bytes(sentencepiece_file())
    described = {"<s>": 1, "</s>": 2, "<unk>": 0} | {token: i for i, token in ADDED.items()}
    settings = {
        "added_tokens_decoder": {str(i): {"content": token, "special": True} for token, i in described.items()},
        "tokenizer_class": "InternLM2Tokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_internlm2.InternLM2Tokenizer", None]},
        "chat_template": "{{ messages }}, which is not what the model was trained with",
        "model_max_length": 4096,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "</s>",
        "unk_token": "<unk>",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    (directory / "added_tokens.json").write_text(
        json.dumps({token: i for i, token in ADDED.items() if i >= len(PIECES)})
    )
    return directory


def original_config() -> dict[str, Any]:
    """Content of config.json."""
    return {
        "architectures": ["InternVLChatModel"],
        "auto_map": {"AutoModel": "modeling_internvl_chat.InternVLChatModel"},
        "model_type": "internvl_chat",
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "force_image_size": _SIDE,
        "max_dynamic_patch": 6,
        "min_dynamic_patch": 1,
        "ps_version": "v2",
        "select_layer": -1,
        "template": "internlm2-chat",
        "torch_dtype": "float32",
        "use_thumbnail": True,
        "llm_config": {
            "architectures": ["InternLM2ForCausalLM"],
            "model_type": "internlm2",
            "bias": False,
            "vocab_size": VOCABULARY,
            "hidden_size": _HEADS * _DIM,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": _HEADS,
            "num_key_value_heads": _GROUPS,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "rope_scaling": {"factor": 2.0, "type": "dynamic"},
            "rope_theta": 1000000,
            "pad_token_id": 2,
            "tie_word_embeddings": False,
        },
        "vision_config": {
            "architectures": ["InternVisionModel"],
            "model_type": "intern_vit_6b",
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": _SIDE,
            "patch_size": 14,
            "norm_type": "layer_norm",
            "qk_normalization": False,
            "qkv_bias": True,
            "layer_norm_eps": 1e-6,
        },
    }


def original_weights(model: Any, is_internlm2: bool = True) -> dict[str, Tensor]:
    """The same weights under the old names: one projection for queries, keys and values in each attention."""
    new: dict[str, Tensor] = model.state_dict()
    old: dict[str, Tensor] = {
        "vision_model.embeddings.class_embedding": new["model.vision_tower.embeddings.cls_token"],
        "vision_model.embeddings.position_embedding": new["model.vision_tower.embeddings.position_embeddings"],
    }
    for kind in ("weight", "bias"):
        patches = f"model.vision_tower.embeddings.patch_embeddings.projection.{kind}"
        old[f"vision_model.embeddings.patch_embedding.{kind}"] = new[patches]
        for place, name in ((0, "layer_norm"), (1, "linear_1"), (3, "linear_2")):
            old[f"mlp1.{place}.{kind}"] = new[f"model.multi_modal_projector.{name}.{kind}"]
    for layer in range(2):
        to, of = f"vision_model.encoder.layers.{layer}.", f"model.vision_tower.encoder.layer.{layer}."
        for kind in ("weight", "bias"):
            # one Linear gives [query of all heads | key of all heads | value of all heads]
            old[f"{to}attn.qkv.{kind}"] = torch.cat([new[f"{of}attention.{x}_proj.{kind}"] for x in "qkv"])
            old[f"{to}attn.proj.{kind}"] = new[f"{of}attention.projection_layer.{kind}"]
            old[f"{to}norm1.{kind}"] = new[f"{of}layernorm_before.{kind}"]
            old[f"{to}norm2.{kind}"] = new[f"{of}layernorm_after.{kind}"]
            old[f"{to}mlp.fc1.{kind}"], old[f"{to}mlp.fc2.{kind}"] = (
                new[f"{of}mlp.{fc}.{kind}"] for fc in ("fc1", "fc2")
            )
        old[f"{to}ls1"], old[f"{to}ls2"] = new[f"{of}lambda_1"], new[f"{of}lambda_2"]
    return old | (internlm2_weights(new) if is_internlm2 else unchanged_weights(new))


def unchanged_weights(new: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of a language model that is not InternLM2: as transformers itself had them."""
    old = {"language_model.lm_head.weight": new["lm_head.weight"]}
    start = "model.language_model."
    return old | {f"language_model.model.{name[len(start) :]}": new[name] for name in new if name.startswith(start)}


def internlm2_weights(new: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of InternLM2, whose queries, keys and values are one projection."""
    old = {
        "language_model.model.tok_embeddings.weight": new["model.language_model.embed_tokens.weight"],
        "language_model.model.norm.weight": new["model.language_model.norm.weight"],
        "language_model.output.weight": new["lm_head.weight"],
    }
    for layer in range(2):
        to, of = f"language_model.model.layers.{layer}.", f"model.language_model.layers.{layer}."
        query, key, value = (new[f"{of}self_attn.{x}_proj.weight"] for x in "qkv")
        rows = []
        for group in range(_GROUPS):  # a key-value head and the queries that share it stand together
            per_group = _HEADS // _GROUPS
            rows += [query[head * _DIM :][:_DIM] for head in range(group * per_group, (group + 1) * per_group)]
            rows += [key[group * _DIM :][:_DIM], value[group * _DIM :][:_DIM]]
        old[f"{to}attention.wqkv.weight"] = torch.cat(rows)
        old[f"{to}attention.wo.weight"] = new[f"{of}self_attn.o_proj.weight"]
        for name, native in (("w1", "gate"), ("w2", "down"), ("w3", "up")):  # w2(silu(w1 x) * w3 x)
            old[f"{to}feed_forward.{name}.weight"] = new[f"{of}mlp.{native}_proj.weight"]
        old[f"{to}attention_norm.weight"] = new[f"{of}input_layernorm.weight"]
        old[f"{to}ffn_norm.weight"] = new[f"{of}post_attention_layernorm.weight"]
    return old


def sentencepiece_file() -> bytes:
    """`tokenizer.model` in the wire format of protobuf."""
    data = b""
    for text, score, kind in PIECES:
        encoded = text.encode()
        piece = b"\x0a" + _length(encoded) + encoded + b"\x15" + struct.pack("<f", score) + b"\x18" + bytes([kind])
        data += b"\x0a" + _length(piece) + piece
    trainer, normalizer = b"\x18\x02", b"\x18\x00"  # kind: BPE; no space is put before a text
    return data + b"\x12" + _length(trainer) + trainer + b"\x1a" + _length(normalizer) + normalizer


def expected_ids(text: str) -> list[int]:
    """Ids of a text without special tokens: the best-scored pair is joined first, what has no piece becomes bytes."""
    ids = {piece: i for i, (piece, _, _) in enumerate(PIECES)}
    scores = {piece: score for piece, score, kind in PIECES if kind == _NORMAL}
    symbols = list(text.replace(" ", "▁"))
    while True:
        pairs = [(scores.get(a + b), i) for i, (a, b) in enumerate(pairwise(symbols))]
        known = [(-score, i) for score, i in pairs if score is not None]
        if not known:
            break
        _, i = min(known)
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
    found = []
    for symbol in symbols:
        found += [ids[symbol]] if symbol in ids else [ids[f"<0x{byte:02X}>"] for byte in symbol.encode()]
    return found


def _length(data: bytes) -> bytes:
    length = len(data)
    return bytes([length]) if length < 128 else bytes([length & 127 | 128, length >> 7])
