"""Checkpoints in a format of their own, turned once into directories that transformers loads itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vlm_dist.errors import ModelError
from vlm_dist.model.conversion.cache import identity, make_once
from vlm_dist.model.loading_errors import check_present, is_local, translated

_WEIGHTS = ("model.safetensors.index.json", "model*.safetensors")


@dataclass(frozen=True)
class Converter:
    """How one foreign format becomes a native one.

    Attributes:
        target_type: `model_type` of the result.
        model_class: of transformers, which loads the result.
        processor_class: the same.
        version: of the converter.
        small_files: everything that is read but the weights.
        write_processor: source and target directory -> processor and configuration.
        write_checkpoint: source directory, weight files, target directory and progress -> everything.
    """

    target_type: str
    model_class: str
    processor_class: str
    version: str
    small_files: tuple[str, ...]
    write_processor: Callable[[Path, Path], None]
    write_checkpoint: Callable[[Path, list[Path], Path, Callable[[], None]], None]


def converter_of(model_type: str | None) -> Converter | None:
    """The converter of checkpoints of a `model_type`, where they need one."""
    from vlm_dist.model.conversion import internvl_chat

    if model_type != internvl_chat.SOURCE_TYPE:
        return None
    return Converter(
        internvl_chat.TARGET_TYPE,
        internvl_chat.MODEL_CLASS,
        internvl_chat.PROCESSOR_CLASS,
        internvl_chat.VERSION,
        internvl_chat.SMALL_FILES,
        internvl_chat.write_processor,
        internvl_chat.write_checkpoint,
    )


def native_directory(converter: Converter, model_id: str, revision: str | None, *, weights: bool) -> str:
    """The converted form of a checkpoint, from the cache or made now.

    Processes of one or several machines may call this at once; see `make_once`.

    Args:
        converter: of its format.
        model_id: hub id or local directory.
        revision: of the hub repository.
        weights: whether the weights are needed; else the directory has processor and configuration alone, which takes
            seconds.

    Raises:
        ModelError: files are missing, or the checkpoint is one that cannot be converted.
    """
    source = _source_directory(converter, model_id, revision, weights=weights)
    small = [source / name for name in converter.small_files if (source / name).is_file()]
    files = sorted(source.glob("model*.safetensors")) if weights else []
    name = Path(model_id).absolute().name if is_local(model_id) else model_id.replace("/", "--")
    num_bytes = sum(file.stat().st_size for file in files) + sum(file.stat().st_size for file in small)

    def make(target: Path, progress: Callable[[], None]) -> None:
        try:
            if weights:
                converter.write_checkpoint(source, files, target, progress)
            else:
                converter.write_processor(source, target)
        except ModelError as error:
            raise ModelError(f"{model_id} cannot be converted to {converter.model_class}: {error}") from error

    digest = identity([*small, *files], converter.version)
    return str(make_once(f"{name}-{digest}" + ("" if weights else "-processor"), num_bytes, make))


def _source_directory(converter: Converter, model_id: str, revision: str | None, *, weights: bool) -> Path:
    if is_local(model_id):
        source = Path(model_id)
    else:
        from huggingface_hub import snapshot_download

        patterns = [*converter.small_files, *(_WEIGHTS if weights else ())]
        with translated(model_id, revision, "download"):
            source = Path(snapshot_download(model_id, revision=revision, allow_patterns=patterns))
    if weights:
        check_present(str(source), None, weights=True, processor=False)
        if not any(source.glob("model*.safetensors")):
            raise ModelError(
                f"{model_id} has its weights as pickles (pytorch_model*.bin), which can run code when they are read. "
                "Use a revision with safetensors files, or convert them yourself."
            )
    return source
