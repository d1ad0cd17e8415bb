"""The largest micro-batch first, so that memory fails at minute one; and what to change where it does not fit."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from vlm_dist.build.data import is_packed, make_rope_positions, pack_budget, towers_in_use
from vlm_dist.config import RunConfig
from vlm_dist.data.types import MicroBatch, Source
from vlm_dist.data.worst_case import WorstCase
from vlm_dist.distributed.failures import agree_on_failure
from vlm_dist.distributed.group import Ranks
from vlm_dist.distributed.progress import Progress
from vlm_dist.engine import Engine
from vlm_dist.errors import ConfigError, ModelError
from vlm_dist.families import Family
from vlm_dist.model.compilation import compile_message, is_compile_error

_GIB = 2**30
_NUM_SAMPLES_NAMED = 8
#: Phases in which nothing is trained.
_EVALUATING = ("evaluation", "generation")
#: How memory that ran out is told by what has no error of its own for it.
_SIGNS = ("CUBLAS_STATUS_ALLOC_FAILED", "out of memory", "can't allocate memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, of a GPU or of the machine."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


@dataclass(frozen=True)
class MemoryGuard:
    """Turns an error for want of memory into what a person can act on.

    Local, without any word to other ranks, which may be in the middle of a collective: this rank ends, and the others
    end as they do when a rank is gone.

    Args:
        config: of the run.
        zero_stage: of ZeRO.
        is_offloaded: whether the optimizer's state lies in the machine's memory already.
        held_bytes: what the engine holds between steps, by part.
        device: of this rank.
        progress: of this rank: an evaluation has other samples, and other settings.
    """

    config: RunConfig
    zero_stage: int
    is_offloaded: bool
    held_bytes: Callable[[], dict[str, int]]
    device: torch.device
    progress: Progress = field(default_factory=Progress)

    @contextmanager
    def explaining(self, doing: str, micro_batch: MicroBatch | None = None) -> Iterator[None]:
        """Explain what goes wrong within.

        Args:
            doing: in the words of the message, such as "step 7, forward".
            micro_batch: whose samples are named.

        Raises:
            ConfigError: memory ran out.
            ModelError: a block cannot be compiled.
        """
        try:
            yield
        except Exception as error:
            if is_out_of_memory(error):
                raise ConfigError(self.message(doing, error, micro_batch)) from error
            if self.config.train.torch_compile and is_compile_error(error):
                raise ModelError(compile_message(doing, error)) from error
            raise

    def message(self, doing: str, error: BaseException, micro_batch: MicroBatch | None = None) -> str:
        """What was asked, of which there was not enough, what is held, and what to change, one line each."""
        lines = [f"out of memory: {doing}: {(str(error).strip().splitlines() or [type(error).__name__])[0]}"]
        if micro_batch is not None:
            rows, tokens = micro_batch.labels.shape
            lines.append(f"the micro-batch has {rows} x {tokens} tokens and {_pixels(micro_batch)}")
            named = [str(origin) for origin in micro_batch.origins[:_NUM_SAMPLES_NAMED]]
            more = len(micro_batch.origins) - len(named)
            if named:
                lines.append(f"samples: {', '.join(named)}" + (f" and {more} more" if more > 0 else ""))
        mark = self.progress.mark
        if (is_evaluation := mark.phase in _EVALUATING) and mark.samples:
            lines.append(str(mark))
        lines.append(self._figures())
        lines.append("what to change, in this order, until it fits:")
        found = self._advice_on_evaluation() if is_evaluation else self.advice()
        lines += [f"  {number}. {advice}" for number, advice in enumerate(found, start=1)]
        return "\n".join(lines)

    def advice(self) -> list[str]:
        """The settings that need less memory, those that cost least first, for this configuration."""
        train, peft = self.config.train, self.config.peft
        found = []
        size, accumulation = train.per_device_train_batch_size, train.gradient_accumulation_steps
        if size > 1 and not (train.packing and train.pack_max_tokens):
            divisor = next(number for number in range(2, size + 1) if size % number == 0)
            rows, times = size // divisor, accumulation * divisor
            found.append(
                f"train.per_device_train_batch_size: {size} -> {rows} and train.gradient_accumulation_steps: "
                f"{accumulation} -> {times} (the same steps, in smaller pieces)"
            )
        if not train.gradient_checkpointing:
            found.append("train.gradient_checkpointing: true (about a third slower, most activations gone)")
        elif {train.gradient_checkpointing_policy.language, train.gradient_checkpointing_policy.vision} != {"all"}:
            found.append("train.gradient_checkpointing_policy: language: all, vision: all")
        if train.packing:
            tokens = pack_budget(self.config).max_tokens
            found.append(f"train.pack_max_tokens: {tokens} -> {tokens // 2}; train.pack_max_patches limits pictures")
        found += self._advice_on_samples()
        if peft.r > 8 and "lora" in peft.towers.model_dump().values():
            halved = max(1, peft.lora_alpha // 2)
            found.append(
                f"peft.r: {peft.r} -> {peft.r // 2} and peft.lora_alpha: {peft.lora_alpha} -> {halved} (the same scale)"
            )
        return found + self._advice_on_weights()

    def _advice_on_evaluation(self) -> list[str]:
        """The same where nothing is trained: no gradient, and batches of another size."""
        train = self.config.train
        found = []
        if (size := train.per_device_eval_batch_size) > 1:
            found.append(f"train.per_device_eval_batch_size: {size} -> {size // 2} (the same figures)")
        if self.progress.mark.phase == "generation" and (tokens := train.generation_max_new_tokens) > 1:
            found.append(f"train.generation_max_new_tokens: {tokens} -> {tokens // 2}")
        return found + self._advice_on_samples() + self._advice_on_weights()

    def _advice_on_samples(self) -> list[str]:
        found = []
        collator = self.config.collator
        if collator.data_processing.image_data:
            side = collator.image_processing.max_size
            found.append(
                f"collator.image_processing.max_size: {side or 'null'} -> {(side or 1792) // 2}, or max_pixels in "
                "model.processor_params"
            )
        if collator.data_processing.video_data:
            count = collator.video_processing.frame_extraction.num_frames
            found.append(f"collator.video_processing.frame_extraction.num_frames: {count} -> {max(1, count // 2)}")
        longest = collator.text_processing.max_length
        found.append(f"collator.text_processing.max_length: {longest} -> {longest // 2}")
        return found

    def _advice_on_weights(self) -> list[str]:
        found = []
        if self.zero_stage < 3:
            found.append("deepspeed: zero3.json (every rank holds a part of the frozen weights alone)")
        if not self.is_offloaded:
            found.append("deepspeed: zero3_offload.json (weights and optimizer in the machine's memory; slow)")
        if self.config.peft.quantization == "none" and self.zero_stage < 3:
            found.append("peft.quantization: nf4 (the frozen weights in 4 bits)")
        return found

    def _figures(self) -> str:
        held = "; ".join(f"{part} {size / _GIB:.2f} GiB" for part, size in self.held_bytes().items())
        text = f"held between steps on this rank: {held}"
        if self.device.type != "cuda":
            return text
        total = torch.cuda.get_device_properties(self.device).total_memory
        peak, now = torch.cuda.max_memory_allocated(self.device), torch.cuda.memory_allocated(self.device)
        reserved = torch.cuda.memory_reserved(self.device)
        return (
            f"{text}; of {total / _GIB:.1f} GiB of the GPU, {now / _GIB:.1f} are in use, {peak / _GIB:.1f} at most, "
            f"{(reserved - now) / _GIB:.1f} are free in pieces"
        )


def make_worst_case(
    config: RunConfig,
    train_sources: Sequence[Source],
    eval_sources: Sequence[Source],
    processor: Any,
    family: Family,
    per_device: int,
) -> MicroBatch:
    """The largest micro-batch of training that the caps of the run allow.

    Args:
        config: of the run.
        train_sources: of the run; nothing of them is read but the names of their columns.
        eval_sources: the same.
        processor: of the model.
        family: its row.
        per_device: rows of a padded micro-batch.
    """
    sources = [*train_sources, *eval_sources]
    columns = tuple(dict.fromkeys(column for source in sources for column in source.columns))
    rope = make_rope_positions(config, family)
    towers = towers_in_use(config, sources)
    make = WorstCase(columns, processor, family, config.collator, towers, config.train.seed, rope_positions=rope)
    return make.pack(pack_budget(config)) if is_packed(config) else make.rows(per_device)


def is_checked(config: RunConfig, device: torch.device, ds_config: dict[str, Any]) -> bool:
    """Whether the first step is rehearsed: where memory is scarce, unless the config says otherwise."""
    if _offload_device(ds_config, "offload_optimizer") == "nvme":
        return False  # its state is on a disk, from which a snapshot would read it all
    wanted = config.train.memory_check
    return device.type == "cuda" if wanted == "auto" else wanted


def is_offloaded(ds_config: dict[str, Any]) -> bool:
    """Whether the optimizer's state lies outside the GPU."""
    return _offload_device(ds_config, "offload_optimizer") not in (None, "none")


def guard_memory(
    config: RunConfig,
    engine: Engine,
    ds_config: dict[str, Any],
    ranks: Ranks,
    report: Callable[[str], None],
    make: Callable[[], MicroBatch],
) -> MemoryGuard:
    """Rehearse the first step where that is asked for. Collective: every rank calls this.

    Args:
        config: of the run.
        engine: as training starts or goes on with it.
        ds_config: DeepSpeed's.
        ranks: of the run.
        report: takes lines for people.
        make: the largest micro-batch; the same on every rank.

    Returns:
        What explains a want of memory later on.

    Raises:
        ConfigError: the largest micro-batch does not fit.
    """
    is_on_cpu = is_offloaded(ds_config)
    guard = MemoryGuard(config, engine.zero_stage, is_on_cpu, engine.held_bytes, engine.device, ranks.progress)
    if is_checked(config, engine.device, ds_config):
        report(check_memory(engine, guard, ranks, make, config.train.seed))
    if engine.head.all_positions is not None:
        report(f"notice: logits of all positions are computed: {engine.head.all_positions}")
    return guard


def check_memory(engine: Engine, guard: MemoryGuard, ranks: Ranks, make: Callable[[], MicroBatch], seed: int) -> str:
    """Run the largest micro-batch through a whole step, and undo it. Collective: every rank calls this.

    Args:
        engine: as training starts or goes on with it.
        guard: explains.
        ranks: of the run.
        make: the micro-batch; the same on every rank.
        seed: of the run.

    Returns:
        What was found, in a line.

    Raises:
        ConfigError: it does not fit.
    """
    with agree_on_failure(ranks):
        batch = make()
    if engine.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(engine.device)
    with _untouched_generators(engine.device), engine.rehearsal():
        torch.manual_seed(seed)
        with guard.explaining("memory check before the first step, forward", batch):
            loss = engine.loss(batch.inputs, batch.labels, guard.config.collator.label_masking.ignore_index)
        engine.copy_ahead(dict(batch.inputs))  # as the one behind it will be
        with guard.explaining("memory check before the first step, backward", batch):
            engine.backward(loss, max(1, batch.num_target_tokens) * engine.world_size)
        with guard.explaining("memory check before the first step, optimizer step"):
            engine.step()
    rows, tokens = batch.labels.shape
    found = f"memory check: {rows} x {tokens} tokens and {_pixels(batch)} fit"
    if engine.device.type != "cuda":
        return found
    total = torch.cuda.get_device_properties(engine.device).total_memory
    peak = torch.cuda.max_memory_allocated(engine.device)
    held = sum(engine.held_bytes().values())
    return f"{found}: at most {peak / _GIB:.1f} of {total / _GIB:.1f} GiB, {held / _GIB:.1f} of them held between steps"


@contextmanager
def _untouched_generators(device: torch.device) -> Iterator[None]:
    python, numpy = random.getstate(), np.random.get_state()
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        yield
    random.setstate(python)
    np.random.set_state(numpy)


def _pixels(batch: MicroBatch) -> str:
    counts = {key: value for key, value in batch.inputs.items() if key.startswith("pixel_values")}
    if not counts:
        return "no pictures"
    return " and ".join(f"{key} {list(value.shape)}" for key, value in counts.items())


def _offload_device(ds_config: dict[str, Any], part: str) -> str | None:
    settings = ds_config.get("zero_optimization", {}).get(part) or {}
    device: str | None = settings.get("device")
    return device
