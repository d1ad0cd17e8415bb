"""Evaluation on held-out data: the loss, and answers that the model generates itself.

Every sample counts once, whatever the number of ranks, and every rank makes the same number of forwards and of
`generate` calls. Training is left as it was found: generators, modes, gradients and the engine's state.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vlm_dist.config.answer_metrics import OVERALL
from vlm_dist.data.quarantine import Quarantine
from vlm_dist.data.types import IGNORE_INDEX, Source
from vlm_dist.distributed.failures import agree_on_failure
from vlm_dist.distributed.group import Ranks
from vlm_dist.evaluate.answers import Answerer
from vlm_dist.evaluate.losses import LossTally, measure_loss
from vlm_dist.evaluate.metrics import figures
from vlm_dist.evaluate.predictions import Prediction, write_predictions
from vlm_dist.evaluate.undisturbed import undisturbed
from vlm_dist.evaluate.walk import Pool, Walk, distinct_names
from vlm_dist.model.compilation import uncompiled

if TYPE_CHECKING:
    from vlm_dist.engine import Engine


class Evaluator:
    """Loss, and metrics of generated answers, per held-out source and over all of them.

    Args:
        engine: holds the model; called through its `module`, on all ranks equally often.
        ranks: this process among its peers.
        sources: `data.eval`; a `SampleRef.source` in the pools' jobs is a position in it.
        pool: makes micro-batches for the loss.
        per_device_eval_batch_size: samples per forward.
        generation_pool: makes left-padded prompts (`Materialiser(for_generation=True)`); None: generate nothing.
        tokenizer: turns generated ids into text; needed with `generation_pool`.
        max_new_tokens: length limit of an answer, in tokens.
        metrics: of the answers, names of `vlm_dist.evaluate.metrics.METRICS`.
        predictions_dir: where rank 0 writes `step-<position>.jsonl`; None: nowhere.
        ignore_index: the label of tokens without loss.
        quarantine: where samples that could not be used are written down.

    Raises:
        ModelError: answers are wanted from a model that cannot generate.
        DataError: a source has no samples.
    """

    def __init__(
        self,
        *,
        engine: Engine,
        ranks: Ranks,
        sources: Sequence[Source],
        pool: Pool,
        per_device_eval_batch_size: int,
        generation_pool: Pool | None = None,
        tokenizer: Any = None,
        max_new_tokens: int = 32,
        metrics: Sequence[str] = ("exact_match",),
        predictions_dir: Path | None = None,
        ignore_index: int = IGNORE_INDEX,
        quarantine: Quarantine | None = None,
    ) -> None:
        self._engine = engine
        self._ranks = ranks
        self._names = distinct_names(sources)
        self._pool = pool
        self._generation_pool = generation_pool
        self._metrics = tuple(metrics)
        self._predictions_dir = predictions_dir
        self._ignore_index = ignore_index
        self._quarantine = quarantine
        self._walk = Walk(sources, ranks, per_device_eval_batch_size)
        self._answerer: Answerer | None = None
        if generation_pool is not None:
            # Under ZeRO-3 each forward is a collective: a rank that has finished an answer goes on with the others.
            # Below, ranks finish independently.
            synced = engine.zero_stage == 3 and ranks.world_size > 1
            self._answerer = Answerer(engine, tokenizer, max_new_tokens, metrics, is_synchronised=synced)

    def run(self, position: int) -> dict[str, float]:
        """Evaluate now. Collective: every rank calls this.

        Args:
            position: number of training steps that are done; names the file of predictions.

        Returns:
            See `measure`.

        Raises:
            DataError: on every rank, if one cannot read its samples.
            AskedToStop: on every rank, between two micro-batches: one was asked to stop.
        """
        found, predictions = self.measure(position)
        with agree_on_failure(self._ranks):
            if self._answerer is not None and self._predictions_dir is not None and self._ranks.is_main:
                write_predictions(self._predictions_dir / f"step-{position}.jsonl", predictions)
        return found

    def measure(self, position: int) -> tuple[dict[str, float], list[Prediction]]:
        """As `run`, and write nothing. Collective: every rank calls this.

        Returns:
            The same on every rank, per source: `<source>/loss` (nats per target token), `<source>/num_samples`,
            `<source>/num_skipped` (samples that could not be read or did not fit), and with generation
            `<source>/num_answers` and each metric, as `<source>/exact_match` (share of all answers). With several
            sources the same over all samples, as `overall/loss`. And the answers, source by source in the order of
            the data.
        """
        found: dict[str, float] = {}
        tallies: list[LossTally] = []
        predictions: list[Prediction] = []
        with undisturbed(self._engine.module), uncompiled(self._engine.module), torch.no_grad():
            for number, name in enumerate(self._names):
                tally = LossTally.sum(self._ranks.gather_objects(self._measure_loss(number, position)))
                # every held-out sample exactly once, whatever the number of ranks
                assert tally.num_samples + tally.num_skipped == self._walk.plans[number].num_epoch_samples
                answers = self._answer(number, tally)
                found |= {f"{name}/{figure}": value for figure, value in tally.figures().items()}
                found |= self._figures(name, answers)
                tallies.append(tally)
                predictions += answers
        if len(self._names) > 1:
            of_all = LossTally.sum(tallies)
            found |= {f"{OVERALL}/{figure}": value for figure, value in of_all.figures().items()}
            found |= self._figures(OVERALL, predictions)
        return found, predictions

    def _measure_loss(self, number: int, position: int) -> LossTally:
        special_ids = self._answerer.special_ids if self._answerer is not None else frozenset[int]()
        batches = self._walk.micro_batches(number, self._pool, "evaluation")
        return measure_loss(self._engine, batches, self._ignore_index, special_ids, position, self._quarantine)

    def _answer(self, number: int, tally: LossTally) -> list[Prediction]:
        """All ranks' answers to one source's questions, in the order of the data."""
        if self._answerer is None or self._generation_pool is None:
            return []
        self._answerer.end_with(tally.ends)
        batches = self._walk.micro_batches(number, self._generation_pool, "generation")
        mine = self._answerer.answer(self._walk, number, self._names[number], batches)
        return sorted((one for of_rank in self._ranks.gather_objects(mine) for one in of_rank), key=lambda p: p.index)

    def _figures(self, name: str, answers: Sequence[Prediction]) -> dict[str, float]:
        """The metrics of answers, computed once. Collective: every rank calls this."""
        if self._answerer is None:
            return {}
        found: dict[str, float] = {}
        with agree_on_failure(self._ranks):
            if self._ranks.is_main:
                pairs = [(one.prediction, one.references) for one in answers]
                found = {f"{name}/{metric}": value for metric, value in figures(self._metrics, pairs)}
        return {**self._ranks.broadcast_object(found), f"{name}/num_answers": len(answers)}
