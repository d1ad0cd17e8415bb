"""From the names in vlm_model_config.yaml to classes.

Which class replaces a name that no library has is data (`NATIVE_FORMS`), not branches.
"""

from __future__ import annotations

import difflib
import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vlm_dist.errors import ModelError
from vlm_dist.model.checkpoint_files import auto_map_reference, native_class_name
from vlm_dist.model.loading_errors import translated

if TYPE_CHECKING:
    from vlm_dist.config.vlm_model import ModelClassEntry


@dataclass(frozen=True)
class ModelClasses:
    """What a row of `model_classes` stands for."""

    model: type[Any]
    processor: type[Any]


@dataclass(frozen=True)
class NativeForm:
    """Where a class of remote code has a successor inside transformers; its checkpoints are converted once."""

    model_class: str
    processor_class: str


_INTERNVL = NativeForm("InternVLForConditionalGeneration", "InternVLProcessor")

#: Class name that a user may write -> what it stands for.
NATIVE_FORMS: dict[str, NativeForm] = {"InternVLChatModel": _INTERNVL, "InternVLChatProcessor": _INTERNVL}


def resolve_classes(
    entry: ModelClassEntry, model_id: str, *, trust_remote_code: bool = False, revision: str | None = None
) -> ModelClasses:
    """Model and processor class of a row of `model_classes`.

    Raises:
        ModelError: see `resolve_class`.
    """
    return ModelClasses(
        *(
            resolve_class(entry, role, model_id, trust_remote_code=trust_remote_code, revision=revision)
            for role in ("model_class", "processor_class")
        )
    )


def resolve_class(
    entry: ModelClassEntry, role: str, model_id: str, *, trust_remote_code: bool = False, revision: str | None = None
) -> type[Any]:
    """The class that `entry` stands for.

    In this order: the attribute of `import_path`; the native successor of a name in `NATIVE_FORMS`; the class of the
    model's own code (`auto_map`), if that is trusted. An entry that names no class, or `AutoProcessor`, gets the class
    that the checkpoint itself names.

    Args:
        entry: names to look up.
        role: "model_class" or "processor_class".
        model_id: hub id or local directory, whose `auto_map` is read if `import_path` has no such class.
        trust_remote_code: whether code from the model's repository may run.
        revision: of the hub repository.

    Raises:
        ModelError: the module or the class does not exist; the message names the nearest class and the lines to change.
    """
    name: str | None = getattr(entry, role)
    module = _module(entry, model_id)
    if name is None or name == "AutoProcessor":
        named = native_class_name(model_id, role, revision)
        if named is None or (_attribute(module, named, entry, model_id) is None and named not in NATIVE_FORMS):
            remote = auto_map_reference(model_id, role, None, revision)
            if remote is not None and trust_remote_code:
                return _remote_class(model_id, remote, revision)
            named = named or (remote.rsplit(".", 1)[-1] if remote is not None else name)
        if named is None:
            raise ModelError(_nothing_named(entry, role, model_id))
        name = named
    found = _attribute(module, name, entry, model_id)
    if found is not None:
        return found
    if name in NATIVE_FORMS:
        return _native_class(name, role, entry, model_id)
    remote = auto_map_reference(model_id, role, name, revision)
    if remote is not None and trust_remote_code:
        return _remote_class(model_id, remote, revision)
    raise ModelError(_no_such_class(entry, role, name, model_id, revision, module, remote))


def _module(entry: ModelClassEntry, model_id: str) -> Any:
    try:
        return importlib.import_module(entry.import_path)
    except ImportError as error:
        raise ModelError(
            f"{model_id}: import_path {entry.import_path!r} cannot be imported: {error}. "
            "Install that package, or correct import_path in vlm_model_config.yaml (usually: transformers)."
        ) from error


def _attribute(module: Any, name: str, entry: ModelClassEntry, model_id: str) -> type[Any] | None:
    try:
        found = getattr(module, name, None)
    except (ImportError, RuntimeError) as error:  # transformers imports a class's file when it is asked for
        raise ModelError(f"{model_id}: {entry.import_path}.{name} exists but cannot be imported: {error}") from error
    return found if isinstance(found, type) else None


def _native_class(name: str, role: str, entry: ModelClassEntry, model_id: str) -> type[Any]:
    import transformers

    found = _attribute(transformers, getattr(NATIVE_FORMS[name], role), entry, model_id)
    assert found is not None, f"transformers has no {getattr(NATIVE_FORMS[name], role)}"
    return found


def _remote_class(model_id: str, reference: str, revision: str | None) -> type[Any]:
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    with translated(model_id, revision, "import the remote code of"):
        found: type[Any] = get_class_from_dynamic_module(reference, model_id, revision=revision)
    return found


def _no_such_class(
    entry: ModelClassEntry, role: str, name: str, model_id: str, revision: str | None, module: Any, remote: str | None
) -> str:
    """What is wrong, and the three lines that put it right."""
    message = f"{model_id}: {entry.import_path} has no class {name!r} ({role} in vlm_model_config.yaml)."
    if remote is not None:
        return (
            f"{message} The model's repository ships it as its own code ({remote}). After reading that code, allow it "
            "with `trust_remote_code: true` in loading_params and processor_params of this model."
        )
    import transformers

    own = native_class_name(model_id, role, revision)
    if own is not None and own != name and hasattr(transformers, own):
        return f"{message} The checkpoint belongs to {_lines(entry, role, own, model_id, 'transformers')}"
    endings = {"model_class": ("ForConditionalGeneration", "ForCausalLM", "Model"), "processor_class": ("Processor",)}
    known = [n for n in dir(module) if n.endswith(endings[role]) and not n.startswith("_")]
    nearest = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    if not nearest:
        return (
            f"{message} No class there has a similar name, and the model's config names none in auto_map. "
            "Take the class from `architectures` in the model's config.json."
        )
    others = f"\n(others: {', '.join(nearest[1:])})" if nearest[1:] else ""
    return f"{message} The nearest is {_lines(entry, role, nearest[0], model_id)}{others}"


def _nothing_named(entry: ModelClassEntry, role: str, model_id: str) -> str:
    example = {"model_class": "YourModelClass", "processor_class": "YourProcessorClass"}[role]
    return (
        f"{model_id}: vlm_model_config.yaml names no {role} and the checkpoint's own files name none that transformers "
        f"has. Write it: {_lines(entry, role, example, model_id)}"
    )


def _lines(entry: ModelClassEntry, role: str, name: str, model_id: str, import_path: str | None = None) -> str:
    names = {"model_class": entry.model_class, "processor_class": entry.processor_class} | {role: name}
    return (
        f"{name}; in vlm_model_config.yaml:\n"
        f'    "{model_id}":\n'
        + "".join(f"        {key}: {value}\n" for key, value in names.items() if value is not None)
        + f"        import_path: {import_path or entry.import_path}"
    )
