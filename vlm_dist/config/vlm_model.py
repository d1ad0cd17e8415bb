"""`vlm_model_config.yaml`: which classes a model id stands for, and how they are loaded."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, SerializerFunctionWrapHandler, model_serializer

from vlm_dist.config.section import Name, Names, Section, expected
from vlm_dist.errors import ConfigError

TorchDtype = Literal["torch.bfloat16", "bfloat16", "torch.float16", "float16", "torch.float32", "float32"]

_ATTENTION = ("sdpa", "eager", "varlen", "flash_attention_2", "flash_attention_3", "flex_attention")


def _check_attention(value: str | None) -> str | None:
    if value is None or value in _ATTENTION or "/" in value:  # with a slash: a kernel of the hub
        return value
    raise expected(", ".join(_ATTENTION) + ", or null for the model's own choice")


def _check_module(value: str) -> str:
    if all(part.isidentifier() for part in value.split(".")):
        return value
    raise expected("transformers, or another module as in package.module")


class LoadingParams(Section):
    """Arguments of `from_pretrained` of the model."""

    torch_dtype: TorchDtype = "torch.bfloat16"
    device_map: Literal["auto", "cuda", "cpu"] | None = "auto"  # under DeepSpeed the engine places the model
    trust_remote_code: bool = False
    attn_implementation: Annotated[str | None, AfterValidator(_check_attention)] = None
    revision: Name | None = None

    @property
    def dtype_name(self) -> str:
        """`bfloat16`, `float16` or `float32`."""
        return self.torch_dtype.removeprefix("torch.")


class ProcessorParams(Section, extra="allow"):
    """Keys of ours, and any argument of the processor; these are checked against its signature later."""

    __pydantic_extra__: dict[str, Any] = Field(init=False)

    trust_remote_code: bool = False
    new_special_tokens: Names = ()  # their embeddings must be trained: peft.modules_to_save

    @property
    def arguments(self) -> dict[str, Any]:
        """What is passed to the processor beside the keys above."""
        return dict(self.__pydantic_extra__)


class ModelClassEntry(Section):
    """Three lines that make a model known, and what this model alone wants to be loaded with."""

    model_class: Name | None = None  # null: the one that the checkpoint itself names
    processor_class: Name | None = None
    import_path: Annotated[Name, AfterValidator(_check_module)] = "transformers"
    loading_params: LoadingParams | None = None  # only the keys that are given override the common ones
    processor_params: ProcessorParams | None = None
    family: Name | dict[Name, Any] | None = None  # a row of vlm_dist.families, or facts of one; None: by model_type

    @model_serializer(mode="wrap")
    def _only_what_is_given(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Read back, a dump must not override more than the original did."""
        dumped: dict[str, Any] = handler(self)
        for key, given in (("loading_params", self.loading_params), ("processor_params", self.processor_params)):
            dumped[key] = given and {k: v for k, v in dumped[key].items() if k in given.model_fields_set}
        return {key: value for key, value in dumped.items() if value is not None}


class VlmModelConfig(Section):
    """The table of known models, and what is common to all of them."""

    model_classes: dict[Name, ModelClassEntry] = Field(default_factory=dict)
    loading_params: LoadingParams = Field(default_factory=LoadingParams)
    processor_params: ProcessorParams = Field(default_factory=ProcessorParams)

    def entry(self, model_id: str) -> ModelClassEntry:
        """The classes of a model.

        A local directory that is not in the table is known by the `architectures` of its config.json and by its
        processor, if some entry has these classes.

        Raises:
            ConfigError: the model is unknown; the message has the lines to add.
        """
        known = {key.rstrip("/"): entry for key, entry in self.model_classes.items()}
        if model_id.rstrip("/") in known:
            return known[model_id.rstrip("/")]
        directory = Path(model_id).expanduser()
        if not directory.is_dir():
            if _looks_like_a_path(model_id):
                raise ConfigError(f"no such model directory: {model_id}")
            if "/" not in model_id:  # no hub id of a vision-language model is one word
                raise ConfigError(
                    f"{model_id} is no hub id (organisation/name), and there is no such directory in {Path.cwd()}; "
                    "relative directories start where the command is called"
                )
            missing = _missing_entry(model_id, "YourModelClass", "YourProcessorClass")
            raise ConfigError("\n".join([*_near_directory(directory), missing]))
        architecture = _architecture(directory)
        if architecture is None:
            raise ConfigError(f"{model_id} is not a model directory: no config.json with architectures in it")
        processor = _processor_class(directory)
        for entry in self.model_classes.values():  # one model class may stand behind different processors
            if entry.model_class == architecture and (processor or entry.processor_class) == entry.processor_class:
                return entry
        raise ConfigError(_missing_entry(model_id, architecture, processor or "YourProcessorClass"))

    def loading_for(self, model_id: str) -> LoadingParams:
        """The common loading_params with this model's own on top."""
        own = self.entry(model_id).loading_params
        return self.loading_params.model_copy(update=_given(own))

    def processor_for(self, model_id: str) -> ProcessorParams:
        """The common processor_params with this model's own on top."""
        own = self.entry(model_id).processor_params
        return ProcessorParams.model_validate(self.processor_params.model_dump() | _given(own))


def _given(section: Section | None) -> dict[str, Any]:
    if section is None:
        return {}
    return {key: value for key, value in section.model_dump().items() if key in section.model_fields_set}


def _looks_like_a_path(model_id: str) -> bool:
    return model_id.startswith((".", "/", "~")) or model_id.count("/") > 1


def _near_directory(directory: Path) -> list[str]:
    """A line for a name that is no hub id, since the directory that would hold it is there."""
    if directory.parent == Path() or not directory.parent.is_dir():
        return []
    there = sorted(entry.name for entry in directory.parent.iterdir() if entry.is_dir())
    nearest = difflib.get_close_matches(directory.name, there, n=1)
    mean = f"; did you mean {directory.parent / nearest[0]}?" if nearest else ""
    return [f"there is no directory {directory}{mean}"]


def _missing_entry(model_id: str, model_class: str, processor_class: str) -> str:
    return (
        f"model {model_id} is not in model_classes; add to vlm_model_config.yaml:\n"
        "model_classes:\n"
        f'    "{model_id}":\n'
        f'        model_class: "{model_class}"\n'
        f'        processor_class: "{processor_class}"\n'
        '        import_path: "transformers"'
    )


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # absent or damaged: the caller says what it needed
        return {}
    return content if isinstance(content, dict) else {}


def _architecture(directory: Path) -> str | None:
    names = _read_json(directory / "config.json").get("architectures")
    return str(names[0]) if isinstance(names, list) and names else None


def _processor_class(directory: Path) -> str | None:
    for file in ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json"):
        name = _read_json(directory / file).get("processor_class")
        if isinstance(name, str):
            return name
    return None
