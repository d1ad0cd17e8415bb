"""Evaluation on held-out data: the loss, and answers that the model generates itself.

It walks each source with the same plan as training, its order fixed: every sample once, empty slots at the end, and on
every rank the same number of forwards and of `generate` calls. It leaves training as it found it: generators, modes,
gradients and the engine's state.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from vlm_dist.data.lookahead import announce
from vlm_dist.data.plan.plan import Plan, PlanSettings
from vlm_dist.data.quarantine import Quarantine
from vlm_dist.data.types import IGNORE_INDEX, MicroBatch, MicroBatchJob, SampleRef, Source
from vlm_dist.distributed.failures import agree_on_failure
from vlm_dist.distributed.group import Ranks
from vlm_dist.evaluate.generation import also_end_with, greedy_config, learned_ends, special_ids
from vlm_dist.evaluate.predictions import Prediction, normalise_answer, write_predictions
from vlm_dist.model.checkpointing import base_model
from vlm_dist.model.compilation import uncompiled

if TYPE_CHECKING:
    from vlm_dist.engine import Engine

#: Micro-batches that are asked for before the first of them is needed.
_PREFETCH = 3
_ANNOUNCED = 32  # micro-batches that the sources are told of before they are needed


class Pool(Protocol):
    """Makes micro-batches; `vlm_dist.data.workers.pool.WorkerPool` is one."""

    def submit(self, job: MicroBatchJob) -> Any:
        """Something whose `result()` is the job's `MicroBatch`."""


@dataclass
class _Tally:
    """What one rank found in one source."""

    losses: list[tuple[int, float]] = field(default_factory=list)  # (micro-batch, sum in nats)
    num_target_tokens: int = 0
    num_samples: int = 0
    num_skipped: int = 0
    ends: set[int] = field(default_factory=set)  # special tokens that labels end with
    predictions: list[Prediction] = field(default_factory=list)


class Evaluator:
    """Loss, and exact match of generated answers, per held-out source.

    Args:
        engine: holds the model; called through its `module`, on all ranks equally often.
        ranks: this process among its peers.
        sources: `data.eval`; a `SampleRef.source` in the pools' jobs is a position in it.
        pool: makes micro-batches for the loss.
        per_device_eval_batch_size: samples per forward.
        generation_pool: makes left-padded prompts (`Materialiser(for_generation=True)`); None: generate nothing.
        tokenizer: turns generated ids into text; needed with `generation_pool`.
        max_new_tokens: length limit of an answer, in tokens.
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
        predictions_dir: Path | None = None,
        ignore_index: int = IGNORE_INDEX,
        quarantine: Quarantine | None = None,
    ) -> None:
        self._engine = engine
        self._ranks = ranks
        self._sources = list(sources)
        self._names = distinct_names(sources)
        self._pool = pool
        self._generation_pool = generation_pool
        self._tokenizer = tokenizer
        self._predictions_dir = predictions_dir
        self._ignore_index = ignore_index
        self._quarantine = quarantine
        settings = PlanSettings(
            global_batch_size=per_device_eval_batch_size * ranks.world_size,
            micro_batch_size=per_device_eval_batch_size,
            shuffle=False,
        )
        self._plans = [Plan([source], [1.0], settings) for source in sources]
        self._special_ids: frozenset[int] = frozenset()
        self._generation: dict[str, Any] = {}
        if generation_pool is not None:
            config = greedy_config(base_model(engine.module), tokenizer, max_new_tokens)
            # Under ZeRO-3 each of generate's forwards is a collective: a rank that has finished goes on with the
            # others. Below, ranks finish independently. `synced_gpus` is decided here, not by transformers' state.
            synced = engine.zero_stage == 3 and ranks.world_size > 1
            self._generation = {"generation_config": config, "synced_gpus": synced}
            self._special_ids = special_ids(tokenizer)

    def run(self, position: int) -> dict[str, float]:
        """Evaluate now. Collective: every rank calls this.

        Args:
            position: number of training steps that are done; names the file of predictions.

        Returns:
            The same on every rank, per source: `<source>/loss` (nats per target token), `<source>/num_samples`,
            `<source>/num_skipped` (samples that could not be read or did not fit), and with generation
            `<source>/exact_match` (share of all answers) and `<source>/num_answers`.

        Raises:
            DataError: on every rank, if one cannot read its samples.
            AskedToStop: on every rank, between two micro-batches: one was asked to stop.
        """
        metrics: dict[str, float] = {}
        predictions: list[Prediction] = []
        with undisturbed(self._engine.module), uncompiled(self._engine.module), torch.no_grad():
            for number, name in enumerate(self._names):
                tally = self._ranks_tally(self._measure_loss(number, position))
                # every held-out sample exactly once, whatever the number of ranks
                assert tally.num_samples + tally.num_skipped == self._plans[number].num_epoch_samples
                targets = tally.num_target_tokens
                metrics[f"{name}/loss"] = (
                    math.fsum(v for _, v in sorted(tally.losses)) / targets if targets else math.nan
                )
                metrics[f"{name}/num_samples"] = tally.num_samples
                metrics[f"{name}/num_skipped"] = tally.num_skipped
                if self._generation_pool is not None:
                    also_end_with(self._generation["generation_config"], tally.ends)
                    answers = sorted(self._ranks_tally(self._generate(number)).predictions, key=lambda p: p.index)
                    matches = sum(answer.match for answer in answers)
                    metrics[f"{name}/exact_match"] = matches / len(answers) if answers else math.nan
                    metrics[f"{name}/num_answers"] = len(answers)
                    predictions += answers
        if self._generation_pool is not None:
            self._write(position, predictions)
        return metrics

    def _measure_loss(self, number: int, position: int) -> _Tally:
        tally = _Tally()
        sums: list[tuple[int, Tensor]] = []
        for batch in self._micro_batches(number, self._pool):
            with self._engine.head.giving_loss(batch.labels, self._ignore_index):
                outputs = self._engine.module(**self._on_device(batch.inputs), use_cache=False)
            sums.append((_order(batch.job), outputs["loss"]))
            tally.num_target_tokens += batch.num_target_tokens
            tally.ends |= learned_ends(batch.labels, self._special_ids, self._ignore_index)
            tally.num_samples += batch.num_samples
            tally.num_skipped += sum(slot.null_class != "tail" for slot in batch.null_slots)
            if self._quarantine is not None:
                unusable = [slot for slot in batch.null_slots if slot.origin is not None]
                self._quarantine.record(position, unusable, "eval")
        tally.losses = [(order, float(value)) for order, value in sums]
        return tally

    def _generate(self, number: int) -> _Tally:
        tally = _Tally()
        model = base_model(self._engine.module)
        for batch in self._micro_batches(number, self._generation_pool):
            inputs = self._on_device(batch.inputs)
            ids = model.generate(**inputs, **self._generation)
            prompt_length = inputs["input_ids"].shape[1]
            # The samples' rows come first; a dummy row, or a batch of nothing but dummies, has no reference.
            rows = range(len(batch.references))
            answers = [self._decode(ids[row, prompt_length:]) for row in rows]
            prompts = [self._decode(batch.inputs["input_ids"][row]) for row in rows]
            indices = _indices(batch, self._sources[number])
            for row, origin in zip(rows, batch.origins, strict=False):
                reference, answer = batch.references[row], answers[row]
                tally.predictions.append(
                    Prediction(
                        index=indices[row],
                        source=self._names[number],
                        shard=origin.shard,
                        key=origin.key,
                        prompt=prompts[row],
                        prediction=answer,
                        reference=reference,
                        match=normalise_answer(answer) == normalise_answer(reference),
                    )
                )
        return tally

    def _micro_batches(self, number: int, pool: Pool | None) -> Iterator[MicroBatch]:
        """This rank's micro-batches of one source, asked for a little ahead. Collective: the ranks agree on each."""
        assert pool is not None
        jobs = deque[MicroBatchJob]()
        # A rank that cannot plan or read must not leave the others waiting in the model's collectives.
        with agree_on_failure(self._ranks, leaves_if_asked=True):
            jobs.extend(
                MicroBatchJob(job.step, job.micro_batch, tuple(_of_source(ref, number) for ref in job.refs))
                for step in self._plans[number].steps()
                for job in step.for_rank(self._ranks.rank, self._ranks.world_size)
            )
        unannounced, pending = deque(jobs), deque[Any]()
        batch: MicroBatch | None = None
        for _ in range(len(jobs)):
            self._ranks.progress.at("evaluation", samples=batch.origins if batch is not None else ())
            with agree_on_failure(self._ranks, leaves_if_asked=True):
                while unannounced and len(unannounced) + _ANNOUNCED > len(jobs):
                    announce(self._sources, unannounced.popleft().refs)
                while jobs and len(pending) < _PREFETCH:
                    pending.append(pool.submit(jobs.popleft()))
                batch = pending.popleft().result()
            assert batch is not None
            phase = "generation" if pool is self._generation_pool else "evaluation"
            self._ranks.progress.at(phase, samples=batch.origins)
            yield batch

    def _ranks_tally(self, mine: _Tally) -> _Tally:
        """The sum over all ranks. Collective: every rank calls this."""
        total = _Tally()
        for tally in self._ranks.gather_objects(mine):
            total.losses += tally.losses
            total.num_target_tokens += tally.num_target_tokens
            total.num_samples += tally.num_samples
            total.num_skipped += tally.num_skipped
            total.ends |= tally.ends
            total.predictions += tally.predictions
        return total

    def _on_device(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        device, dtype = self._engine.device, self._engine.compute_dtype
        return {
            name: value.to(device=device, dtype=dtype if value.is_floating_point() else value.dtype)
            if isinstance(value, Tensor)
            else value
            for name, value in inputs.items()
        }

    def _decode(self, ids: Tensor) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True)).strip()

    def _write(self, position: int, predictions: Sequence[Prediction]) -> None:
        """Write the predictions on rank 0, atomically. Collective: every rank calls this."""
        with agree_on_failure(self._ranks):
            if self._predictions_dir is not None and self._ranks.is_main:
                write_predictions(self._predictions_dir / f"step-{position}.jsonl", predictions)


@contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
    """Within, the model is in `eval()` mode; afterwards its modes, its caches and all generators are as before.

    `eval()` also turns gradient checkpointing off: layers checkpoint only while they train.
    """
    modes = [(part, part.training) for part in module.modules()]
    # Qwen's models keep the offsets of the last prompt's positions for the next token.
    kept = [(part, part.rope_deltas) for part in module.modules() if hasattr(part, "rope_deltas")]
    python, numpy = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        module.eval()
        try:
            yield
        finally:
            for part, training in modes:
                part.training = training
            for part, deltas in kept:
                part.rope_deltas = deltas
            random.setstate(python)
            np.random.set_state(numpy)


def _of_source(ref: SampleRef | None, number: int) -> SampleRef | None:
    """Each source has a plan of its own; the pools know all sources."""
    return None if ref is None else SampleRef(number, ref.index, ref.repeat)


def _order(job: MicroBatchJob) -> int:
    """Position of a micro-batch among all; the sum in this order does not depend on the number of ranks."""
    refs = [ref.index for ref in job.refs if ref is not None]
    return refs[0] if refs else -1


def _indices(batch: MicroBatch, source: Source) -> list[int]:
    """Rows of the source that the batch's samples came from, in the batch's order."""
    rows: dict[str, deque[int]] = {}
    for ref in batch.job.refs:
        if ref is not None:
            rows.setdefault(str(source.origin(ref.index)), deque()).append(ref.index)
    return [rows[str(origin)].popleft() for origin in batch.origins]


def distinct_names(sources: Sequence[Source]) -> list[str]:
    """What each source is called in the figures."""
    names = [source.name for source in sources]
    return [name if names.count(name) == 1 else f"{name}#{number}" for number, name in enumerate(names)]
