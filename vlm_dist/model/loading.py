"""Loading of processors and models, from local directories and from the hub alike.

`device_map` is never passed on: under DeepSpeed the engine places the model (ZeRO-3 even before the weights are read),
and a model that accelerate has already spread over devices cannot be partitioned.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from vlm_dist.errors import ConfigError, ModelError
from vlm_dist.model.attention.borders import install
from vlm_dist.model.attention.choice import use_varlen
from vlm_dist.model.attention.names import VARLEN
from vlm_dist.model.checkpoint_files import check_json_files, fetch_weights, native_class_name, read_json
from vlm_dist.model.class_checks import (
    check_is_model,
    check_is_processor,
    check_model_type,
    check_no_adapter,
    check_sizes_fit,
    check_type_is_known,
)
from vlm_dist.model.conversion import converter_of, native_directory
from vlm_dist.model.loading_errors import check_present, is_local, translated
from vlm_dist.model.patch_embedding import use_matrix_products
from vlm_dist.model.phi3_vision import Phi3VisionProcessor, is_phi3_vision, tame
from vlm_dist.model.processor_params import apply_processor_params, split_processor_params
from vlm_dist.model.registry import resolve_class
from vlm_dist.model.remote_code import default_attention, is_remote, made_ready, make_parts_known, recompute_buffers
from vlm_dist.model.vocabulary import add_special_tokens

if TYPE_CHECKING:
    from vlm_dist.config.vlm_model import LoadingParams, ModelClassEntry, ProcessorParams

logger = logging.getLogger(__name__)

_DTYPES = {
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
    "half": torch.float16,
    "float32": torch.float32,
    "fp32": torch.float32,
}

#: A warning that transformers' tokenizers give once, by its name there.
_LENGTH_WARNING = "sequence-length-is-longer-than-the-specified-maximum"

#: Keys of loading_params and processor_params that are read here and go nowhere else as they are.
_OWN_KEYS = ("torch_dtype", "dtype", "device_map", "trust_remote_code", "revision")


def parse_dtype(name: str | torch.dtype) -> torch.dtype:
    """The dtype of a name such as "torch.bfloat16" or "bfloat16".

    Raises:
        ConfigError: unknown name.
    """
    if isinstance(name, torch.dtype):
        return name
    dtype = _DTYPES.get(name.removeprefix("torch."))
    if dtype is None:
        raise ConfigError(
            f"loading_params.torch_dtype: got {name!r}, expected one of torch.bfloat16, torch.float16, torch.float32"
        )
    return dtype


def load_processor(
    model_id: str,
    entry: ModelClassEntry,
    processor_params: ProcessorParams | Mapping[str, Any] | None = None,
    loading_params: LoadingParams | Mapping[str, Any] | None = None,
) -> Any:
    """The processor (tokenizer, image and video processor, chat template) of a model.

    Args:
        model_id: hub id or local directory.
        entry: the model's row of `model_classes`.
        processor_params: `trust_remote_code`, `new_special_tokens`, and any argument of the processor or of its parts.
        loading_params: only `revision` is read: model and processor come from the same one.

    Raises:
        ModelError: it cannot be found or loaded, or a parameter is not one of its own.
    """
    params = _as_dict(processor_params)
    trust_remote_code = bool(params.pop("trust_remote_code", False))
    new_special_tokens = params.pop("new_special_tokens", ())
    revision = params.pop("revision", None) or _as_dict(loading_params).get("revision")
    found = _find(model_id, entry, "processor_class", trust_remote_code, revision)
    model_id, revision, processor_class = found.source, found.revision, found.loaded_by
    check_sizes_fit(params, model_id, revision)
    own, of_parts = split_processor_params(processor_class, params)
    try:
        with translated(model_id, revision, "load the processor of"):
            if is_remote(processor_class):
                make_parts_known(processor_class)
            processor = processor_class.from_pretrained(
                model_id, trust_remote_code=trust_remote_code, revision=revision or "main", **own
            )
    except ModelError as error:
        check_json_files(model_id, revision)
        belongs = native_class_name(model_id, "processor_class", revision)
        if belongs in (None, processor_class.__name__):
            raise
        raise ModelError(
            f"{model_id} belongs to {belongs}, but model_classes names processor_class: {processor_class.__name__}; "
            f"set processor_class: {belongs} ({error})"
        ) from error
    check_is_processor(processor, processor_class, model_id, revision)
    # a text that is longer than the tokenizer thinks is cut or skipped, and told
    processor.tokenizer.deprecation_warnings[_LENGTH_WARNING] = True
    apply_processor_params(processor, of_parts, model_id)
    processor = Phi3VisionProcessor(processor) if is_phi3_vision(processor_class) else processor
    add_special_tokens(processor, new_special_tokens)
    return processor


def load_model(
    model_id: str,
    entry: ModelClassEntry,
    loading_params: LoadingParams | Mapping[str, Any] | None = None,
    dtype: str | torch.dtype | None = None,
) -> nn.Module:
    """The pretrained model, in training form: `use_cache` off.

    The caller gives the context: under ZeRO-3 it enters the engine's, and `from_pretrained` then partitions while it
    loads. Collective under ZeRO-3: every rank calls this.

    Args:
        model_id: hub id or local directory.
        entry: the model's row of `model_classes`.
        loading_params: `torch_dtype`, `trust_remote_code`, `attn_implementation`, `revision`, and whatever else
            `from_pretrained` takes; `device_map` is left out, the engine places the model.
        dtype: of all weights; default is `torch_dtype` of loading_params, then the checkpoint's own.

    Raises:
        ModelError: it cannot be found or loaded, or the checkpoint lacks weights of the model.
    """
    params = _as_dict(loading_params)
    wanted = dtype or params.get("torch_dtype") or params.get("dtype")
    trust_remote_code = bool(params.get("trust_remote_code", False))
    revision = params.get("revision")
    if params.get("device_map") not in (None, "cpu"):
        logger.info("device_map %r is not used: under DeepSpeed the engine places the model", params["device_map"])
    found = _find(model_id, entry, "model_class", trust_remote_code, revision)
    model_id, revision, model_class = found.source, found.revision, found.loaded_by
    check_model_type(model_class, model_id, entry, revision)
    rest = {key: value for key, value in params.items() if key not in _OWN_KEYS}
    is_varlen = rest.get("attn_implementation") == VARLEN
    if is_varlen:
        rest["attn_implementation"] = "sdpa"  # of what has no borders
    remote = is_remote(model_class)
    if remote:
        rest.setdefault("attn_implementation", default_attention(model_class))
    with translated(model_id, revision, "load"):
        model_class = made_ready(model_class) if remote else model_class
        model, info = model_class.from_pretrained(
            model_id,
            dtype="auto" if wanted is None else parse_dtype(wanted),
            trust_remote_code=trust_remote_code,
            revision=revision or "main",
            output_loading_info=True,
            **({"ignore_mismatched_sizes": True} | rest),  # they are told below, by name
        )
    check_is_model(type(model), model_id, revision)
    _check_complete(model, model_id, info)
    if remote:
        with translated(model_id, revision, "compute the buffers of"):
            recompute_buffers(model, model_class)
    if is_phi3_vision(model_class):
        tame(model)
    _switch_cache_off(model)
    use_matrix_products(model)
    install(model)
    if is_varlen:
        use_varlen(model)
    loaded: nn.Module = model
    return loaded


def prepare_checkpoint(
    model_id: str, entry: ModelClassEntry, loading_params: LoadingParams | Mapping[str, Any] | None = None
) -> None:
    """Fetch all files of a model, and convert them where they are in a format of their own; takes long at most once.

    `load_model` would do the same; a run of several ranks does it before, where waiting for each other has no deadline.

    Raises:
        ModelError: see `load_model`.
    """
    params = _as_dict(loading_params)
    found = _find(model_id, entry, "model_class", bool(params.get("trust_remote_code", False)), params.get("revision"))
    if not is_local(found.source):
        fetch_weights(found.source, found.revision)


@dataclass(frozen=True)
class _Found:
    """What is loaded: by which class, from where."""

    loaded_by: type[Any]
    source: str
    revision: str | None


def _find(
    model_id: str, entry: ModelClassEntry, role: Literal["model_class", "processor_class"], trust: bool, revision: Any
) -> _Found:
    """The class of a role and where it loads from: the model itself, or the converted form of it."""
    import transformers

    is_model = role == "model_class"
    model_id = str(Path(model_id).expanduser()) if model_id.startswith("~") else model_id
    if is_model and is_local(model_id):
        check_no_adapter(model_id, revision)
    if not is_local(model_id) or not (Path(model_id) / "config.json").is_file():
        check_present(model_id, revision, weights=is_model, processor=not is_model)
    config = read_json(model_id, "config.json", revision)
    converter = converter_of(config.get("model_type"))
    if converter is None:
        check_type_is_known(config, entry, model_id)
    if is_model and not is_local(model_id):
        check_no_adapter(model_id, revision)
    loaded_by = resolve_class(entry, role, model_id, trust_remote_code=trust, revision=revision)
    if is_model:
        check_is_model(loaded_by, model_id, revision)
    if converter is not None:
        native = getattr(transformers, converter.model_class if is_model else converter.processor_class)
        if loaded_by is native or loaded_by.__name__.startswith("Auto"):
            return _Found(native, native_directory(converter, model_id, revision, weights=is_model), None)
    check_present(model_id, revision, weights=is_model, processor=not is_model)
    return _Found(loaded_by, model_id, revision)


def _as_dict(params: LoadingParams | ProcessorParams | Mapping[str, Any] | None) -> dict[str, Any]:
    """A section of the config, given as a mapping or as a pydantic model, without its empty values."""
    if params is None:
        return {}
    values = dict(params) if isinstance(params, Mapping) else params.model_dump()
    return {key: value for key, value in values.items() if value is not None}


def _check_complete(model: nn.Module, model_id: str, info: Mapping[str, Any]) -> None:
    """Refuse newly initialised weights: training would go on with noise, and the loss would only look high."""
    wrong = sorted(info.get("mismatched_keys") or ())
    if wrong:
        shown = "; ".join(f"{name} is {list(found)}, expected {list(own)}" for name, found, own in wrong[:3])
        raise ModelError(
            f"{model_id}: {len(wrong)} weights of the checkpoint have another shape than in {type(model).__name__} as "
            f"its config.json describes it: {shown}{'; …' if wrong[3:] else ''}. Copy the checkpoint again, with the "
            "config.json that belongs to it."
        )
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    missing = sorted(set(info["missing_keys"]) - tied)
    if missing:
        shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise ModelError(
            f"{model_id}: the checkpoint lacks {len(missing)} weights of {type(model).__name__}, which would start "
            f"random: {shown}. Copy the checkpoint again, or correct model_class in vlm_model_config.yaml."
        )
    unexpected = sorted(info["unexpected_keys"])
    if unexpected:
        logger.warning(
            "%s: %d weights of the checkpoint are not used by %s: %s%s",
            model_id,
            len(unexpected),
            type(model).__name__,
            ", ".join(unexpected[:5]),
            " …" if len(unexpected) > 5 else "",
        )


def _switch_cache_off(model: Any) -> None:
    """No key-value cache in training: it costs memory, and with a packed row it lets samples see each other."""
    for config in {id(c): c for c in (model.config, *_sub_configs(model.config))}.values():
        if hasattr(config, "use_cache"):
            config.use_cache = False


def _sub_configs(config: Any) -> list[Any]:
    names = getattr(config, "sub_configs", None) or {}
    return [sub for name in names if (sub := getattr(config, name, None)) is not None]
