"""From the names in vlm_model_config.yaml to classes: `import_path` first, then the model's own code if it is trusted.

Which class replaces a name that no library has is data (`NATIVE_FORMS`), not branches.
"""

from __future__ import annotations

import difflib
import importlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_dist.errors import ModelError
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
    """Where a class of remote code has a successor inside transformers."""

    model_class: str
    processor_class: str
    model_id: str  # a published checkpoint in the successor's format
    reason: str


_INTERNVL = NativeForm(
    "InternVLForConditionalGeneration",
    "InternVLProcessor",
    "OpenGVLab/InternVL3-2B-hf",
    "the checkpoints whose names end in -hf are in transformers' own format; the older ones need a key conversion "
    "that is not yet supported",
)

#: Class name that a user may write -> what to write instead.
NATIVE_FORMS: dict[str, NativeForm] = {"InternVLChatModel": _INTERNVL, "InternVLChatProcessor": _INTERNVL}

#: Files whose `auto_map` may name the class, by the role of the class.
_AUTO_MAP_FILES = {
    "model_class": ("config.json",),
    "processor_class": ("processor_config.json", "preprocessor_config.json", "config.json"),
}


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
    """The class that `entry` names: the attribute of `import_path`, or the class that the model's own `auto_map` names.

    Args:
        entry: names to look up.
        role: "model_class" or "processor_class".
        model_id: hub id or local directory, whose `auto_map` is read if `import_path` has no such class.
        trust_remote_code: whether code from the model's repository may run.
        revision: of the hub repository.

    Raises:
        ModelError: the module or the class does not exist; the message names the nearest class and the lines to change.
    """
    name: str = getattr(entry, role)
    try:
        module = importlib.import_module(entry.import_path)
    except ImportError as error:
        raise ModelError(
            f"{model_id}: import_path {entry.import_path!r} cannot be imported: {error}. "
            "Install that package, or correct import_path in vlm_model_config.yaml (usually: transformers)."
        ) from error
    try:
        found = getattr(module, name, None)
    except (ImportError, RuntimeError) as error:  # transformers imports a class's file when it is asked for
        raise ModelError(f"{model_id}: {entry.import_path}.{name} exists but cannot be imported: {error}") from error
    if isinstance(found, type):
        return found
    remote = _auto_map_reference(model_id, role, name, revision)
    if remote is not None and trust_remote_code:
        return _remote_class(model_id, remote, revision)
    raise ModelError(_no_such_class(entry, role, model_id, module, remote))


def _auto_map_reference(model_id: str, role: str, name: str, revision: str | None) -> str | None:
    """The reference ("file.Class") under which the model's repository ships a class of this name."""
    for reference in _auto_map_references(model_id, role, revision):
        if reference.rsplit(".", 1)[-1] == name:
            return reference
    return None


def _auto_map_references(model_id: str, role: str, revision: str | None) -> Iterator[str]:
    from transformers.utils.hub import cached_file

    for file_name in _AUTO_MAP_FILES[role]:
        with translated(model_id, revision, "read"):
            path = cached_file(
                model_id,
                file_name,
                revision=revision or "main",
                _raise_exceptions_for_missing_entries=file_name == "config.json",
            )
        if path is None:
            continue
        try:
            auto_map = json.loads(Path(path).read_text(encoding="utf-8")).get("auto_map", {})
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ModelError(f"{model_id}: {path} is not valid JSON: {error}. Copy the file again.") from error
        for references in auto_map.values():
            yield from (r for r in (references if isinstance(references, list) else [references]) if r)


def _remote_class(model_id: str, reference: str, revision: str | None) -> type[Any]:
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    with translated(model_id, revision, "import the remote code of"):
        found: type[Any] = get_class_from_dynamic_module(reference, model_id, revision=revision)
    return found


def _no_such_class(entry: ModelClassEntry, role: str, model_id: str, module: Any, remote: str | None) -> str:
    """What is wrong, and the three lines that put it right."""
    name = getattr(entry, role)
    message = f"{model_id}: {entry.import_path} has no class {name!r} ({role} in vlm_model_config.yaml)."
    if remote is not None:
        return (
            f"{message} The model's repository ships it as its own code ({remote}). After reading that code, allow it "
            "with `trust_remote_code: true` in loading_params and processor_params of this model."
        )
    native = NATIVE_FORMS.get(name)
    if native is not None:
        return f"{message} Its native form is {_lines(native.model_id, native, entry)}\n({native.reason})"
    family = {"model_class": ("ForConditionalGeneration", "ForCausalLM", "Model"), "processor_class": ("Processor",)}
    known = [n for n in dir(module) if n.endswith(family[role]) and not n.startswith("_")]
    nearest = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    if not nearest:
        return (
            f"{message} No class there has a similar name, and the model's config names none in auto_map. "
            "Take the class from `architectures` in the model's config.json."
        )
    names = {"model_class": entry.model_class, "processor_class": entry.processor_class, role: nearest[0]}
    proposal = NativeForm(names["model_class"], names["processor_class"], model_id, "")
    others = f"\n(others: {', '.join(nearest[1:])})" if nearest[1:] else ""
    return f"{message} The nearest is {_lines(model_id, proposal, entry)}{others}"


def _lines(model_id: str, form: NativeForm, entry: ModelClassEntry) -> str:
    return (
        f"{form.model_class}; in vlm_model_config.yaml:\n"
        f'    "{model_id}":\n'
        f"        model_class: {form.model_class}\n"
        f"        processor_class: {form.processor_class}\n"
        f"        import_path: {entry.import_path}"
    )
