"""Laws of the model: class, precision, placement, compilation, towers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from vlm_dist.config.laws.finding import Draft, Finding
from vlm_dist.config.peft import PeftConfig
from vlm_dist.config.train import TrainConfig
from vlm_dist.config.yaml_document import KeyPath
from vlm_dist.errors import ConfigError


def check_known_model(draft: Draft) -> Iterator[Finding]:
    """The model has an entry in model_classes."""
    if draft.model_id is None:
        return
    try:
        draft.model.entry(draft.model_id)
    except ConfigError as error:
        yield Finding(("model_id",), str(error), also=(("model", "model_classes"),))


def check_precision(draft: Draft) -> Iterator[Finding]:
    """One precision, which fits the type that the base is loaded in."""
    bf16, fp16 = ("train", "bf16"), ("train", "fp16")
    dtype_path: KeyPath = ("model", "loading_params", "torch_dtype")
    if draft.train.bf16 and draft.train.fp16:
        yield Finding(fp16, "got true beside bf16: true, expected at most one of them", also=(bf16,))
        return
    dtype = draft.model.loading_params.dtype_name
    try:
        own = draft.model.loading_for(draft.model_id) if draft.model_id else None
    except ConfigError:  # the unknown model is a finding of its own
        own = None
    if own is not None and own.dtype_name != dtype:
        dtype, dtype_path = own.dtype_name, ("model", "model_classes", str(draft.model_id), *dtype_path[1:])
    precision = draft.train.precision
    if dtype == precision:
        return
    if dtype == "float32":
        message = f"float32 has no effect: the model is loaded in {precision}, in which training computes"
        yield Finding(dtype_path, message, also=(bf16, fp16), is_notice=True)
        return
    switches = f"train.bf16: {_yaml(draft.train.bf16)}, train.fp16: {_yaml(draft.train.fp16)}"
    fix = {"bfloat16": "train.bf16: true", "float16": "train.bf16: false and train.fp16: true"}[dtype]
    message = f"got {dtype}, expected torch.{precision} beside {switches}; or set {fix}"
    yield Finding(dtype_path, message, also=(bf16, fp16))


def check_placement(draft: Draft) -> Iterator[Finding]:
    """Loading parameters without effect: the common ones, and those of this run's model."""
    common: KeyPath = ("model", "loading_params")
    model_id = draft.model_id
    places = [(common, draft.model.loading_params)]
    own = draft.model.model_classes.get(model_id) if model_id is not None else None
    if own is not None and own.loading_params is not None:
        places.append((("model", "model_classes", str(model_id), "loading_params"), own.loading_params))
    for path, loading in places:
        given = loading.model_fields_set
        if loading.device_map is not None and (path == common or "device_map" in given):
            message = (
                f"{loading.device_map} has no effect: under DeepSpeed the engine places the model, one rank per device"
            )
            yield Finding((*path, "device_map"), message, is_notice=True)
        if loading.revision is not None and model_id is not None and Path(model_id).expanduser().is_dir():
            message = f"has no effect: {model_id} is a local directory, which has no revisions"
            yield Finding((*path, "revision"), message, also=(("model_id",),), is_notice=True)


def check_attention(draft: Draft) -> Iterator[Finding]:
    """Attention for packs, where nothing is packed."""
    try:
        loading = draft.model.loading_for(draft.model_id) if draft.model_id else draft.model.loading_params
    except ConfigError:  # the unknown model is a finding of its own
        return
    if loading.attn_implementation == "varlen" and not draft.train.packing:
        path: KeyPath = ("model", "loading_params", "attn_implementation")
        message = (
            "varlen is for packs, and packing is false: padded rows are computed as with sdpa, only a vision tower "
            "that is told where its pictures end has it"
        )
        yield Finding(path, message, also=(("train", "packing"),), is_notice=True)


def check_compilation(draft: Draft) -> Iterator[Finding]:
    """What a block that is to be one graph cannot have in it. ZeRO's stage is in another file."""
    compiled: KeyPath = ("train", "torch_compile")
    if not draft.train.torch_compile:
        if draft.train.torch_compile_backend != TrainConfig.model_fields["torch_compile_backend"].default:
            message = "has no effect: torch_compile is false"
            yield Finding(("train", "torch_compile_backend"), message, also=(compiled,), is_notice=True)
        return
    try:
        loading = draft.model.loading_for(draft.model_id) if draft.model_id else draft.model.loading_params
    except ConfigError:  # the unknown model is a finding of its own
        return
    attention = loading.attn_implementation
    if attention not in (None, "sdpa", "eager", "varlen"):
        message = (
            f"got true beside attn_implementation: {attention}, with which no block has been shown to be one graph "
            "(flash attention looks at the mask to find the padding); set attn_implementation to sdpa or varlen, or "
            "this to false"
        )
        yield Finding(compiled, message, also=(("model", "loading_params", "attn_implementation"),))


def check_towers(peft: PeftConfig) -> Iterator[Finding]:
    """What is trained of each tower, and how fast."""
    policies = peft.towers.model_dump()
    whole: KeyPath = ("peft", "modules_to_save")
    if set(policies.values()) == {"freeze"} and not peft.modules_to_save:
        message = "every tower is frozen: nothing to train; set one of them to lora or full"
        yield Finding(("peft", "towers"), message, also=(whole,))
    elif "lora" not in policies.values():
        message = (
            "no tower is lora, so there is no adapter: r, target_modules, lora_alpha, lora_dropout, bias, use_rslora "
            "and use_dora have no effect"
        )
        yield Finding(("peft", "towers"), message, also=(whole,), is_notice=True)
    full = [tower for tower, policy in policies.items() if policy == "full"]
    if peft.quantization != "none" and full:
        message = f"got {peft.quantization}, expected none: a tower that is packed in 4 bits cannot be trained in full"
        yield Finding(("peft", "quantization"), message, also=tuple(("peft", "towers", tower) for tower in full))
    for tower, rate in peft.towers_learning_rate.model_dump().items():
        if rate is not None and policies[tower] == "freeze" and not peft.modules_to_save:
            message = f"{rate:g} has no effect: peft.towers.{tower} is freeze"
            also: tuple[KeyPath, ...] = (("peft", "towers", tower), whole)
            yield Finding(("peft", "towers_learning_rate", tower), message, also=also, is_notice=True)


def _yaml(value: bool) -> str:
    return "true" if value else "false"
