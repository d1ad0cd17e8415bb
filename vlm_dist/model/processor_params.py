"""`processor_params`: checked against what the processor really has, and set where they really take effect.

transformers hands any argument of `from_pretrained` to the tokenizer, the image and the video processor alike, drops
unknown ones without a word, and lets `min_pixels`/`max_pixels` of the checkpoint's file win over a `size` of the
user. So the parts are loaded plainly, then made again with the user's values, and one blank image is put through.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from vlm_dist.errors import ModelError

#: Upstream's names for arguments of one part only: `processor_params: {videos_kwargs: {max_pixels: 50176}}`.
_PART_OF_KWARGS = {
    "images_kwargs": "image_processor",
    "videos_kwargs": "video_processor",
    "text_kwargs": "tokenizer",
}
_VISUAL_PARTS = ("image_processor", "video_processor")

#: Belong to a call, not to the processor; the collator decides them.
_CALL_ONLY = frozenset({"return_tensors", "input_data_format", "return_metadata", "do_sample_frames"})


def split_processor_params(
    processor_class: type[Any], params: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments of the processor's own constructor, and those of its parts.

    `patch_size` of a LLaVA processor is the first kind, `max_pixels` of Qwen2-VL's image processor the second.
    """
    names = [
        name
        for name, parameter in inspect.signature(processor_class.__init__).parameters.items()
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD and name not in ("self", "tokenizer", *_VISUAL_PARTS)
    ]
    own = {key: value for key, value in params.items() if key in names}
    return own, {key: value for key, value in params.items() if key not in own}


def apply_processor_params(processor: Any, params: Mapping[str, Any], model_id: str) -> None:
    """Set the arguments on every part of the processor that knows them; changes the processor.

    Args:
        processor: as loaded.
        params: `{name: value}` for all parts that know the name, or `{"images_kwargs": {...}}` for one part.
        model_id: for messages.

    Raises:
        ModelError: an argument that no part knows, or a value that the part refuses.
    """
    wanted: dict[str, dict[str, Any]] = {}
    for key, value, parts in _flatten(processor, params):
        knowing = [name for name, part in parts.items() if key in known_names(part)]
        if not knowing:
            raise ModelError(_unknown(key, parts, processor, model_id))
        for name in knowing:
            wanted.setdefault(name, {})[key] = value
    for name, values in wanted.items():
        if name == "processor":
            for key, value in values.items():
                setattr(processor, key, value)
        elif name in _VISUAL_PARTS:
            setattr(processor, name, _remake(getattr(processor, name), values, model_id))
        else:
            for key, value in values.items():
                setattr(processor.tokenizer, key, value)


def known_names(part: Any) -> set[str]:
    """Names of the arguments and settings that a processor, or a part of it, has."""
    names = {key for key, value in vars(part).items() if not key.startswith("_") and not callable(value)}
    valid = getattr(part, "valid_kwargs", None)
    for cls in type(part).__mro__[:-1] if valid is None else valid.__mro__[:-1]:
        names |= set(getattr(cls, "__annotations__", {}))
    names |= {
        name
        for name, parameter in inspect.signature(type(part).__init__).parameters.items()
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD
    }
    if hasattr(part, "init_kwargs"):  # a tokenizer
        names |= {"padding_side", "truncation_side", "model_max_length", *part.init_kwargs}
    return {name for name in names if not name.startswith("_")} - _CALL_ONLY - {"self", "args"}


def _parts(processor: Any) -> dict[str, Any]:
    found = {name: getattr(processor, name, None) for name in (*_VISUAL_PARTS, "tokenizer")}
    return {"processor": processor, **{name: part for name, part in found.items() if part is not None}}


def _flatten(processor: Any, params: Mapping[str, Any]) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    parts = _parts(processor)
    for key, value in params.items():
        if key not in _PART_OF_KWARGS:
            yield key, value, parts
            continue
        name = _PART_OF_KWARGS[key]
        if not isinstance(value, Mapping):
            raise ModelError(f"processor_params.{key}: got {value!r}, expected a mapping of arguments of the {name}")
        for inner, inner_value in value.items():
            yield inner, inner_value, {name: parts[name]} if name in parts else {}


def _unknown(key: str, parts: Mapping[str, Any], processor: Any, model_id: str) -> str:
    known = sorted(set().union(*(known_names(part) for part in parts.values())))
    nearest = difflib.get_close_matches(key, known, n=1)
    mean = f"; did you mean {nearest[0]!r}?" if nearest else f". It has: {', '.join(known)}."
    if key in _CALL_ONLY:
        mean = ": the collator decides it for every call."
    return f"processor_params.{key}: {type(processor).__name__} of {model_id} has no such argument{mean}"


def _remake(part: Any, values: Mapping[str, Any], model_id: str) -> Any:
    """The same image or video processor with some values changed."""
    kind = type(part)
    settings = part.to_dict()
    given, values = values, dict(values)
    if "size" in values:
        values["size"] = _full_size(part, values["size"])
        # left in place they would win over the size in the constructor
        settings = {key: value for key, value in settings.items() if key not in ("min_pixels", "max_pixels")}
    known = {key: value for key, value in values.items() if key in _constructor_names(kind)}
    try:
        made = kind(**{**settings, **known})
    except (TypeError, ValueError, KeyError, ArithmeticError) as error:
        raise ModelError(f"processor_params {values}: {kind.__name__} of {model_id} refuses them: {error}") from error
    for key in values.keys() - known.keys():  # an attribute that is no argument
        setattr(made, key, values[key])
    _order_pixel_bounds(made, given, model_id)
    _try_blank_image(made, part, given, model_id)
    return made


def _constructor_names(kind: type[Any]) -> set[str]:
    valid = getattr(kind, "valid_kwargs", None)
    names = set(inspect.signature(kind.__init__).parameters)
    for cls in () if valid is None else valid.__mro__[:-1]:
        names |= set(getattr(cls, "__annotations__", {}))
    return names


def _full_size(part: Any, size: Any) -> Any:
    """A size that names only some of the present keys changes those and keeps the others."""
    present = getattr(part, "size", None)
    if not isinstance(size, Mapping) or not present:
        return size
    present = dict(present)
    return {**present, **size} if set(size) <= set(present) else dict(size)


def _order_pixel_bounds(part: Any, values: Mapping[str, Any], model_id: str) -> None:
    """Keep the lower bound of the pixels at or below the upper one; a bound that the user did not give, gives way."""
    size = getattr(part, "size", None)
    size = dict(size) if size else {}
    low, high = size.get("shortest_edge"), size.get("longest_edge")
    for bound in (low, high):
        if bound is not None and (isinstance(bound, bool) or not isinstance(bound, int | float)):
            raise ModelError(
                f"processor_params {dict(values)}: {type(part).__name__} of {model_id} needs numbers of pixels, got "
                f"{bound!r}"
            )
    if not (low and high) or low <= high:
        return
    given = {**(values["size"] if isinstance(values.get("size"), Mapping) else {}), **values}
    gave_low = bool({"min_pixels", "shortest_edge"} & given.keys())
    gave_high = bool({"max_pixels", "longest_edge"} & given.keys())
    if gave_low == gave_high:
        raise ModelError(
            f"processor_params: {type(part).__name__} of {model_id} cannot have a lower bound ({low}) above its upper "
            f"bound ({high}); raise max_pixels or lower min_pixels."
        )
    bound = high if gave_high else low
    part.size = type(part.size)(**{**size, "shortest_edge": bound, "longest_edge": bound})


def _try_blank_image(part: Any, original: Any, values: Mapping[str, Any], model_id: str) -> None:
    """Find out now, not at the first sample, whether the values work together."""
    from PIL import Image

    image = Image.new("RGB", (64, 64))
    try:
        if "video" in type(part).__name__.lower():
            import numpy as np

            part([np.zeros((4, 64, 64, 3), dtype=np.uint8)], do_sample_frames=False, return_tensors="pt")
        else:
            part([image], return_tensors="pt")
    except (TypeError, ValueError, KeyError, IndexError, AttributeError, RuntimeError, ArithmeticError) as error:
        raise ModelError(
            f"processor_params {dict(values)}: {type(part).__name__} of {model_id} cannot process an image with them: "
            f"{type(error).__name__}: {error} Its own size is {dict(getattr(original, 'size', None) or {})}."
        ) from error
