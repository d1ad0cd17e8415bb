"""What to run, in one or two sentences, and the settings that make it so."""

from __future__ import annotations

from dataclasses import dataclass

from vlm_dist.estimate.estimate import Estimate, Row
from vlm_dist.estimate.memory import GIB, Variant

#: A way is worth a change of the run file from this many times the speed on.
_WORTH = 1.03
#: Seconds of a step below which an estimate tells nothing: starting the kernels takes longer than computing.
_SHORTEST = 1e-3


@dataclass(frozen=True)
class Advice:
    """A recommendation.

    Attributes:
        text: one or two sentences.
        settings: `--set` arguments that carry it out; empty where the run file is as it should be.
    """

    text: str
    settings: tuple[str, ...] = ()


def advise(made: Estimate) -> Advice:
    """Choose the fastest way that fits; where none does, the nearest change that makes one fit."""
    fitting = [row for row in made.rows if row.fits]
    if fitting:
        return _of_fitting(made, min(fitting, key=_cost))
    smaller = [row for row in made.rows if row.largest_units > 0 and not made.shapes.unit.is_packed]
    if smaller:
        return _of_smaller_batch(made, smaller)
    return _of_nothing(made)


def _checkpointing(row: Row) -> str:
    if row.variant.first_blocks is not None:
        return f"with gradient checkpointing of the first {row.variant.first_blocks} blocks of the language model"
    return "with gradient checkpointing" if row.variant.recomputes else "without gradient checkpointing"


def _shown_seconds(row: Row) -> float:
    """Of a step, as the table has them: to three digits."""
    return float(f"{row.time.total:.3g}")


def _seconds(row: Row) -> float:
    """Of a step, as far as an estimate tells ways apart."""
    return max(_shown_seconds(row), _SHORTEST)


def _cost(row: Row) -> tuple[float, int, bool]:
    """Seconds first; then what is simpler."""
    return _seconds(row), row.variant.stage, row.variant.offloads_optimizer


def _of_fitting(made: Estimate, best: Row) -> Advice:
    run, gpu = made.run, made.machine.memory_bytes / GIB
    room = f"{best.largest.total / GIB:.1f} of {gpu:.0f} GiB at the largest micro-batch"
    again = _checkpointing(best)
    settings = _settings(made, best)
    if best is run:
        return Advice(f"The run fits as it is: {best.variant.name} {again}, {room}.{_on_links(made)}")
    if run.fits:
        gain = _seconds(run) / _seconds(best)
        if gain < _WORTH:
            used = f"{run.largest.total / GIB:.1f} of {gpu:.0f} GiB"
            return Advice(f"The run fits as it is ({used}), and {_no_gain(made)}.{_on_links(made)}")
        return Advice(
            f"The run fits as it is, but {best.variant.name} {again} fits too ({room}) and takes "
            f"{1 - 1 / gain:.0%} less time.{_on_links(made)}",
            settings,
        )
    return Advice(
        f"The run does not fit as it is. {best.variant.name} {again} does: {room}.{_on_links(made)}", settings
    )


def _no_gain(made: Estimate) -> str:
    """Why the run may stay as it is, in words that the table bears out."""
    seconds = _shown_seconds(made.run)
    faster = [row for row in made.rows if _shown_seconds(row) * _WORTH <= seconds]
    if not faster:
        return "nothing else is faster by 3%"
    if not any(row.fits for row in faster):
        return "nothing else that fits is faster by 3%"
    return "what is faster gains nothing: a step computes for about a millisecond, and starts kernels for longer"


def _of_smaller_batch(made: Estimate, rows: list[Row]) -> Advice:
    """The largest batch that divides the run's own, so that steps stay the same."""
    size = made.batch.per_device
    ways = []
    for row in rows:
        divisors = [count for count in range(1, size) if size % count == 0 and count <= row.largest_units]
        if divisors:
            ways.append((-max(divisors), _cost(row), row))
    if not ways:
        return _of_nothing(made)
    negative, _, best = min(ways, key=lambda way: way[:2])
    count = -negative
    accumulation = made.batch.accumulation * size // count
    again = _checkpointing(best)
    settings = (
        f"train.per_device_train_batch_size={count}",
        f"train.gradient_accumulation_steps={accumulation}",
        *_settings(made, best),
    )
    return Advice(
        f"Nothing fits with {size} samples per device; {count} with {accumulation} accumulation are the same steps, "
        f"and fit under {best.variant.name} {again}.",
        settings,
    )


def _of_nothing(made: Estimate) -> Advice:
    """Nothing fits: what is largest has to become smaller."""
    best = min(made.rows, key=lambda row: row.largest.total)
    if (fixed := best.largest.parts["framework"]) >= made.machine.memory_bytes:
        return Advice(
            f"Nothing fits: CUDA and NCCL alone take about {fixed / GIB:.1f} GiB of a GPU, whatever the run; "
            "larger GPUs are needed.",
            (),
        )
    lacking = (best.largest.total - made.machine.memory_bytes) / GIB
    parts = {name: size for name, size in best.largest.parts.items() if name != "framework"}
    largest = max(parts, key=lambda name: parts[name])
    config = made.config
    longest = config.collator.text_processing.max_length
    settings = list(_settings(made, best))
    if config.train.packing:
        tokens = int(made.shapes.unit.text.computed / 1.1)
        settings.append(f"train.pack_max_tokens={max(256, tokens // 2)}")
    elif largest in ("base", "gathered and buckets") and config.peft.quantization == "none" and best.variant.stage < 3:
        settings.append("peft.quantization=nf4")
    else:
        settings.append(f"collator.text_processing.max_length={max(128, longest // 2)}")
    return Advice(
        f"Nothing fits: the smallest, {best.variant.name}, lacks {lacking:.1f} GiB, and the largest part that settings "
        f"can change is {largest}. Take smaller micro-batches, more or larger GPUs; a first step:",
        tuple(settings),
    )


def _settings(made: Estimate, row: Row) -> tuple[str, ...]:
    """What differs from the run file."""
    found = []
    own, wanted = made.run.variant, row.variant
    if _placement(own) != _placement(wanted):
        found.append(f"deepspeed=ds_configs/{_file(wanted)}")
    if own.recomputes != wanted.recomputes:
        found.append(f"train.gradient_checkpointing={str(wanted.recomputes).lower()}")
    if wanted.first_blocks is not None:
        found.append(f"train.gradient_checkpointing_policy.language={wanted.first_blocks}")
    return tuple(found)


def _placement(variant: Variant) -> tuple[int, bool, bool]:
    """What a DeepSpeed JSON decides; a user's own may offload one part alone."""
    return variant.stage, variant.offloads_optimizer, variant.offloads_base


def _file(variant: Variant) -> str:
    """The shipped JSON of a variant."""
    if variant.offloads_optimizer or variant.offloads_base:
        return f"zero{variant.stage}_offload.json"
    return f"zero{variant.stage}.json"


def _on_links(made: Estimate) -> str:
    """A sentence on ZeRO-2 or ZeRO-3, where there are ranks to speak of."""
    rows = {row.variant: row for row in made.rows}
    two, three = (rows.get(Variant(stage, recomputes=made.run.variant.recomputes)) for stage in (2, 3))
    if made.machine.ranks.world_size == 1 or two is None or three is None:
        return ""
    over = f"of traffic in each step over {made.machine.link}"
    sent = f"{three.time.sending:.2g} s {over}, ZeRO-2's {two.time.sending:.2g} s"
    if two.fits and three.time.total > two.time.total * 1.02:
        return f" ZeRO-2 rather than ZeRO-3: the latter's {sent}."
    if two.fits:
        return f" ZeRO-2 is enough; ZeRO-3 would be hidden behind the computation here ({sent})."
    return f" Under ZeRO-2 the largest micro-batch does not fit (ZeRO-3: {sent})."
