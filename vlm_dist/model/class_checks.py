"""Whether the classes of an entry are what a run needs, and belong to the checkpoint; each refusal names what does."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from vlm_dist.errors import ConfigError, ModelError
from vlm_dist.model.checkpoint_files import native_class_name, read_json
from vlm_dist.model.loading_errors import is_local
from vlm_dist.model.remote_code import is_remote

if TYPE_CHECKING:
    from vlm_dist.config.vlm_model import ModelClassEntry

_ADAPTER = "adapter_config.json"
#: Argument of a processor -> what the model's vision_config calls the same.
_SHARED_SIZES = {
    "patch_size": "patch_size",
    "temporal_patch_size": "temporal_patch_size",
    "merge_size": "spatial_merge_size",
}


def check_is_model(model_class: type[Any], model_id: str, revision: str | None) -> None:
    """Refuse a class that is no model, and one without a head: it has no logits, and PEFT ends in a traceback.

    Args:
        model_class: of an entry, or of the model that an Auto class has made.
        model_id: hub id or local directory.
        revision: of the hub repository.

    Raises:
        ModelError: with the class that the checkpoint belongs to.
    """
    if hasattr(model_class, "_model_mapping") or is_remote(model_class):
        return  # an Auto class is looked at when it has chosen; remote code gets what it lacks
    if not issubclass(model_class, nn.Module):
        wrong = "is no model"
    elif not hasattr(model_class, "prepare_inputs_for_generation"):
        wrong = "is a model without a language head, which has no loss and generates nothing"
    else:
        return
    own = native_class_name(model_id, "model_class", revision)
    fix = f"; set model_class: {own}" if own not in (None, model_class.__name__) else ""
    raise ModelError(f"{model_id}: model_class {model_class.__name__} {wrong}{fix} in vlm_model_config.yaml")


def check_is_processor(processor: Any, processor_class: type[Any], model_id: str, revision: str | None) -> None:
    """Refuse a part of a processor in its place: with a tokenizer alone, pictures would be left out without a word.

    Raises:
        ModelError: with the class that the checkpoint belongs to.
    """
    lacks = [] if getattr(processor, "tokenizer", None) is not None else ["tokenizer"]
    if not any(getattr(processor, name, None) is not None for name in ("image_processor", "video_processor")):
        lacks.append("image_processor")
    if not lacks:
        return
    own = native_class_name(model_id, "processor_class", revision)
    fix = f" The checkpoint belongs to {own}; set processor_class: {own}" if own else " Name the model's processor"
    raise ModelError(
        f"{model_id}: processor_class {processor_class.__name__} gives a {type(processor).__name__}, which has no "
        f"{' and no '.join(lacks)}, so it is not the whole processor of the model.{fix} in vlm_model_config.yaml."
    )


def check_model_type(model_class: type[Any], model_id: str, entry: ModelClassEntry, revision: str | None) -> None:
    """Refuse a checkpoint of another architecture: transformers only warns, and starts from random weights.

    Raises:
        ModelError: with the class that loads it.
    """
    expected = getattr(getattr(model_class, "config_class", None), "model_type", None)
    if not expected:
        return  # an Auto class, which goes by the checkpoint's own type
    config = read_json(model_id, "config.json", revision)
    found = config.get("model_type")
    if found is None or found == expected:
        return
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as NATIVE

    names = NATIVE.get(found)
    name = names[0] if isinstance(names, tuple | list) else names
    hint = f"Its class is {name}" if name else f"Its own class is among {config.get('architectures')}"
    raise ModelError(
        f"{model_id}: the checkpoint is a {found!r}, but model_class {entry.model_class or model_class.__name__} loads "
        f"{expected!r}. {hint}; correct model_class and processor_class of this model in vlm_model_config.yaml."
    )


def check_type_is_known(config: Mapping[str, Any], entry: ModelClassEntry, model_id: str) -> None:
    """Refuse a `model_type` that transformers does not know where no other code is named: most often it is misspelt.

    Raises:
        ModelError: with the nearest type.
    """
    found = config.get("model_type")
    if not found or config.get("auto_map") or entry.import_path.split(".")[0] != "transformers":
        return
    import transformers
    from transformers import CONFIG_MAPPING

    if found in CONFIG_MAPPING:
        return
    nearest = difflib.get_close_matches(str(found), [str(key) for key in CONFIG_MAPPING], n=1)
    mean = f"; did you mean {nearest[0]!r}?" if nearest else "."
    raise ModelError(
        f"{model_id}: its config.json has model_type {found!r}, which transformers {transformers.__version__} does not "
        f"know{mean} Correct it there, or update transformers; for a type of your own, name the module with its "
        "classes as import_path, and the row of the families' table that fits as `family:`."
    )


def check_no_adapter(model_id: str, revision: str | None) -> None:
    """Refuse a model that holds an adapter beside its weights: transformers would load it into the base by itself.

    Raises:
        ModelError: with where each of the two is to be named.
    """
    if is_local(model_id):
        path = Path(model_id) / _ADAPTER
        try:
            content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
        except ValueError:
            content = {}
    else:
        content = read_json(model_id, _ADAPTER, revision) or None
    if content is None:
        return
    base = content.get("base_model_name_or_path") if isinstance(content, dict) else None
    of = f" ({base}, it says)" if base else ""
    raise ModelError(
        f"{model_id} holds an adapter ({_ADAPTER}), which transformers would load into the model unasked. Name the "
        f"model that it was trained on{of} as model_id, and the adapter's own directory as peft.adapter; if the "
        "directory holds a whole model, too, move adapter_config.json and adapter_model.safetensors out of it."
    )


def check_sizes_fit(params: Mapping[str, Any], model_id: str, revision: str | None) -> None:
    """Refuse sizes of patches in `processor_params` that are not the model's, which cannot be chosen.

    Args:
        params: `processor_params`, those of single parts (`images_kwargs`) among them.
        model_id: hub id or local directory.
        revision: of the hub repository.

    Raises:
        ModelError: with both sizes.
    """
    groups = [params, *(inner for inner in params.values() if isinstance(inner, Mapping))]
    given = [(key, value) for group in groups for key, value in group.items() if key in _SHARED_SIZES]
    if not given:
        return
    from transformers import CONFIG_MAPPING

    content = read_json(model_id, "config.json", revision)
    if content.get("model_type") not in CONFIG_MAPPING:
        return
    vision = getattr(CONFIG_MAPPING[content["model_type"]].from_dict(content), "vision_config", None)
    for key, value in given:
        own = getattr(vision, _SHARED_SIZES[key], None)
        if own is not None and _sides(value) != _sides(own):
            raise ModelError(
                f"processor_params.{key}: got {value!r}, but the model {model_id} has {own!r} "
                f"(vision_config.{_SHARED_SIZES[key]} of its config.json): leave it out"
            )


def _sides(size: Any) -> set[Any]:
    """A size as numbers: 14, [14, 14] and {height: 14, width: 14} mean the same."""
    if isinstance(size, Mapping):
        return set(size.values())
    return set(size) if isinstance(size, list | tuple) else {size}


@contextmanager
def naming_what_belongs(
    processor: Any, entry: ModelClassEntry, family: str, model_id: str, revision: str | None
) -> Iterator[None]:
    """Say beside an error of the data side that the entry's processor class, or the family, may be its cause."""
    try:
        yield
    except (ModelError, ConfigError) as error:
        hints = []
        name, own = type(processor).__name__, native_class_name(model_id, "processor_class", revision)
        if entry.processor_class == name and own not in (None, name):
            hints.append(
                f"{model_id} belongs to {own}, but model_classes names processor_class: {name}; "
                f"set processor_class: {own}"
            )
        model_type = read_json(model_id, "config.json", revision).get("model_type")
        if family == "generic" and isinstance(error, ModelError):
            hints.append(
                f"The model_type {model_type!r} has no row in the families' table: if the model is like one that has, "
                "name that row as model_classes.<model>.family"
            )
        if not hints:
            raise
        raise type(error)(". ".join([str(error).rstrip("."), *hints])) from error
