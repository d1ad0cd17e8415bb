"""Answers that the model generates itself, with their scores."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from vlm_dist.data.types import MicroBatch
from vlm_dist.evaluate.generation import also_end_with, greedy_config, special_ids
from vlm_dist.evaluate.losses import on_device
from vlm_dist.evaluate.metrics import scores
from vlm_dist.evaluate.predictions import Prediction
from vlm_dist.evaluate.walk import Walk
from vlm_dist.model.checkpointing import base_model

if TYPE_CHECKING:
    from vlm_dist.engine import Engine


class Answerer:
    """Generates greedily, to the tokens that the model was taught to end with.

    Args:
        engine: holds the model.
        tokenizer: turns generated ids into text.
        max_new_tokens: length limit of an answer, in tokens.
        metrics: by which answers are scored.
        is_synchronised: each of generate's forwards is a collective.

    Raises:
        ModelError: the model cannot generate.
    """

    def __init__(
        self, engine: Engine, tokenizer: Any, max_new_tokens: int, metrics: Sequence[str], *, is_synchronised: bool
    ) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._metrics = tuple(metrics)
        self._config = greedy_config(base_model(engine.module), tokenizer, max_new_tokens)
        self._is_synchronised = is_synchronised
        self.special_ids = special_ids(tokenizer)

    def end_with(self, tokens: Collection[int]) -> None:
        """Let answers end with these tokens, too; the same on all ranks."""
        also_end_with(self._config, tokens)

    def answer(self, walk: Walk, number: int, name: str, batches: Iterable[MicroBatch]) -> list[Prediction]:
        """Answer this rank's prompts of one source.

        Args:
            walk: that the batches come from.
            number: of the source.
            name: of the source, in the file.
            batches: prompts, padded on the left, with references.
        """
        predictions: list[Prediction] = []
        model = base_model(self._engine.module)
        for batch in batches:
            inputs = on_device(self._engine, batch.inputs)
            # `synced_gpus` is decided here, not by transformers' state
            ids = model.generate(**inputs, generation_config=self._config, synced_gpus=self._is_synchronised)
            prompt_length = inputs["input_ids"].shape[1]
            rows = walk.rows(number, batch)
            # The samples' rows come first; a dummy row, or a batch of nothing but dummies, has no reference.
            for row, origin in enumerate(batch.origins):
                more = batch.other_references[row] if batch.other_references else ()
                references = (batch.references[row], *more)
                answer = self._decode(ids[row, prompt_length:])
                predictions.append(
                    Prediction(
                        index=rows[row],
                        source=name,
                        shard=origin.shard,
                        key=origin.key,
                        prompt=self._decode(batch.inputs["input_ids"][row]),
                        prediction=answer,
                        references=references,
                        scores=scores(self._metrics, (answer, references)),
                    )
                )
        return predictions

    def _decode(self, ids: Tensor) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True)).strip()
