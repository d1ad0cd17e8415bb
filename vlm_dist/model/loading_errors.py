"""What can go wrong while files are found and read, each as one clear statement instead of a library's traceback."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vlm_dist.errors import ModelError

_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_INDEXES = tuple(f"{name}.index.json" for name in _WEIGHTS)
_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
_PROCESSORS = ("processor_config.json", "preprocessor_config.json")


def is_local(model_id: str) -> bool:
    """Whether this names a directory rather than a hub repository ("organisation/name")."""
    return Path(model_id).is_dir() or model_id.startswith(("/", ".", "~")) or model_id.count("/") > 1


def check_present(model_id: str, revision: str | None, *, weights: bool, processor: bool) -> None:
    """Name everything that a model lacks before anything else is read from it.

    Of a hub repository one small file is asked for: later, transformers asks for many that may be absent, and hides
    whether it was the network, the name or the permission.

    Args:
        model_id: hub id or local directory.
        revision: of the hub repository.
        weights: whether the weights are about to be loaded.
        processor: whether tokenizer and processor are.

    Raises:
        ModelError: the model, or files that it must have, are missing or out of reach.
    """
    if is_local(model_id):
        _check_directory(model_id, weights=weights, processor=processor)
        return
    from huggingface_hub import hf_hub_download

    with translated(model_id, revision, "find"):
        hf_hub_download(model_id, "config.json", revision=revision)


def _check_directory(model_id: str, *, weights: bool, processor: bool) -> None:
    directory = Path(model_id)
    if not directory.is_dir():
        raise ModelError(
            f"model {model_id}: there is no such directory (looked in {directory.absolute()}). "
            "A local model is the directory that holds config.json; a hub model is written organisation/name."
        )
    lacks = [] if (directory / "config.json").is_file() else ["config.json"]
    if weights:
        lacks += _missing_weights(directory)
    if processor and not any((directory / name).is_file() for name in _TOKENIZERS):
        lacks.append("the tokenizer (tokenizer.json or tokenizer_config.json)")
    if processor and not any((directory / name).is_file() for name in _PROCESSORS):
        lacks.append("the processor (preprocessor_config.json or processor_config.json)")
    if lacks:
        raise ModelError(
            f"model directory {directory.absolute()} lacks {', '.join(lacks)}. "
            "Copy or download the whole repository again (model and processor: both `save_pretrained` into it)."
        )


def _missing_weights(directory: Path) -> list[str]:
    for name in _INDEXES:
        if (directory / name).is_file():
            try:
                shards = set(json.loads((directory / name).read_text(encoding="utf-8"))["weight_map"].values())
            except (json.JSONDecodeError, KeyError, UnicodeDecodeError, AttributeError) as error:
                raise ModelError(f"{directory / name} is damaged ({error!r}). Copy it again.") from error
            return sorted(shard for shard in shards if not (directory / shard).is_file())
    if any((directory / name).is_file() for name in _WEIGHTS):
        return []
    return ["the weights (model.safetensors or model.safetensors.index.json)"]


@contextmanager
def translated(model_id: str, revision: str | None, action: str) -> Iterator[None]:
    """Turn what transformers and huggingface_hub raise for a bad model id, network or file into a `ModelError`.

    Args:
        model_id: hub id or local directory.
        revision: branch, tag or commit of the hub repository.
        action: what was being done, in words: "load the processor of".
    """
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
    from safetensors import SafetensorError

    try:
        yield
    except (
        OSError,  # also what transformers makes of most hub errors; the cause is in the chain
        HfHubHTTPError,
        HFValidationError,
        OfflineModeIsEnabled,
        SafetensorError,
        ImportError,
        ValueError,
        RuntimeError,
        KeyError,
        TypeError,
        AttributeError,
    ) as error:
        raise ModelError(f"could not {action} {model_id}: {_explain(error, model_id, revision)}") from error


def _explain(error: Exception, model_id: str, revision: str | None) -> str:
    """What happened and how to fix it, from the chain of causes."""
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )
    from safetensors import SafetensorError

    chain = list(_causes(error))
    text = " ".join(str(link) for link in chain)
    where = f"https://huggingface.co/{model_id}"

    def has(*kinds: type[BaseException]) -> bool:
        return any(isinstance(link, kinds) for link in chain)

    if not is_local(model_id):
        if has(GatedRepoError) or "gated repo" in text:
            return (
                f"the repository is gated. Ask for access at {where}, then log in on every node (`hf auth login`, or "
                "HF_TOKEN in the environment)."
            )
        # before RepositoryNotFoundError: without a network the hub says nothing about the repository
        offline = has(OfflineModeIsEnabled, LocalEntryNotFoundError, ConnectionError, TimeoutError)
        if offline or "offline mode" in text or "couldn't connect" in text.lower():
            return (
                "it is not in the local cache, and the hub cannot be reached (no network, or HF_HUB_OFFLINE is set). "
                f"Download it where there is a network (`hf download {model_id}`) with HF_HOME on a disk that all "
                "nodes see, or name a local directory."
            )
        if has(RevisionNotFoundError):
            return f"the repository has no revision {revision!r}. Correct loading_params.revision; see {where}."
        if has(RepositoryNotFoundError, HFValidationError) or "not a valid model identifier" in text:
            return (
                f"no such repository on the hub, or a private one. Check the spelling at {where}; for a private one "
                "log in (`hf auth login`, or HF_TOKEN); for a local model name a directory that exists."
            )
    if has(SafetensorError):
        return f"a weight file is damaged or was not copied to its end. Copy or download it again. ({_short(error)})"
    if "FlashAttention" in text or ("does not support" in text and "ttention" in text):
        return f"{_short(error)} Set loading_params.attn_implementation to sdpa or eager, or install that package."
    if has(EntryNotFoundError):
        return f"a file is missing in the repository: {_short(error)}"
    return _short(error)


def _causes(error: BaseException) -> Iterator[BaseException]:
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__ or link.__context__


def _short(error: Exception, limit: int = 600) -> str:
    """A library's message in one paragraph of bounded length, with its kind."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:limit]}{' …' if len(text) > limit else ''}"
