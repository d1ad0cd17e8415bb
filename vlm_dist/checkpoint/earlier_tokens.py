"""Whether the new special tokens of an earlier run are those of this one: their rows are known by number alone."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from vlm_dist.errors import CheckpointError, ConfigError

#: Ends of the names of matrices with one row per token.
_VOCABULARY = ("embed_tokens.weight", "lm_head.weight", "wte.weight", "embed_in.weight")

log = logging.getLogger(__name__)


class _Adapter(Protocol):
    @property
    def path(self) -> Path: ...

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...


def check_new_tokens(point: _Adapter, processor: Any) -> None:
    """Compare with the tokenizer that the earlier run left in `processor/`, beside `adapter/` and its checkpoints.

    Args:
        point: what this run starts from.
        processor: of this run; its `new_token_ids` are told apart from what the model knew before.

    Raises:
        ConfigError: a token of the earlier run has another id here, or none; with the list to set.
        CheckpointError: the earlier run's tokenizer cannot be read.
    """
    directory = point.path.resolve().parent / "processor"
    earlier = _added_tokens(directory)
    if earlier is None:
        if processor.new_token_ids and any(key.endswith(_VOCABULARY) for key in point.shapes):
            log.warning(
                "peft.adapter: %s has rows of the vocabulary, but no processor/ stands beside it that says whose they "
                "are: new_special_tokens must be those of the run that made it, in its order",
                point.path,
            )
        return
    vocabulary = processor.tokenizer.get_vocab()
    if all(vocabulary.get(token) == token_id for token, token_id in earlier.items()):
        return
    new = set(processor.new_token_ids)
    base = {token for token, token_id in vocabulary.items() if token_id not in new}
    theirs = [token for token in sorted(earlier, key=lambda one: earlier[one]) if token not in base]
    ours = [token for token in sorted(vocabulary, key=lambda one: vocabulary[one]) if vocabulary[token] in new]
    if not theirs:
        raise ConfigError(
            f"peft.adapter: {point.path} was trained with another tokenizer than this run's ({directory}): the same "
            "special tokens have other ids; is it of another model?"
        )
    raise ConfigError(
        f"peft.adapter: {point.path} was trained with the new special tokens {json.dumps(theirs)} ({directory}), this "
        f"run has {json.dumps(ours)}: their rows would be taken for others. Set processor_params: "
        f"{{new_special_tokens: {json.dumps(theirs)}}}; more may follow behind them"
    )


def _added_tokens(directory: Path) -> dict[str, int] | None:
    """The tokens beside the plain vocabulary of a tokenizer on disk, with their ids; None: there is no tokenizer."""
    file, settings = directory / "tokenizer.json", directory / "tokenizer_config.json"
    try:
        if file.is_file():
            content = json.loads(file.read_text(encoding="utf-8"))
            return {str(one["content"]): int(one["id"]) for one in content.get("added_tokens", ())}
        if settings.is_file():
            decoder = json.loads(settings.read_text(encoding="utf-8")).get("added_tokens_decoder", {})
            return {str(one["content"]): int(token_id) for token_id, one in decoder.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"peft.adapter: the tokenizer in {directory} cannot be read: {error!r}") from error
    return None
