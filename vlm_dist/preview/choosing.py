"""Which samples are shown: those of the first planned step, and at least one of every source."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

from vlm_dist.data.plan.plan import Plan, PlanSettings
from vlm_dist.data.types import MicroBatchJob, SampleRef
from vlm_dist.errors import ConfigError
from vlm_dist.preview.opening import OpenRun

#: Steps that are planned to meet every source; a rare one is shown apart from any step.
MAX_STEPS = 16


@dataclass(frozen=True)
class Chosen:
    """A sample to show.

    Attributes:
        job: the micro-batch that has it.
        slot: its place in there.
        is_planned: False: the micro-batch is made for it alone, as no step that was looked at has a sample of its
            source.
    """

    job: MicroBatchJob
    slot: int
    is_planned: bool = True

    @property
    def ref(self) -> SampleRef:
        """The sample."""
        ref = self.job.refs[self.slot]
        assert ref is not None
        return ref


def choose_samples(
    run: OpenRun, count: int, *, step: int | None = None, seed: int | None = None, held_out: bool = False
) -> list[Chosen]:
    """Choose samples, in the order of the plan.

    Args:
        run: that has them.
        count: how many; one of every source is among them where that is enough.
        step: the first step that is looked at; None: 0.
        seed: micro-batches of all steps are drawn by it; None: steps follow each other.
        held_out: of `data.eval`.

    Raises:
        ConfigError: there is no such step, or nothing held out.
    """
    if count < 1:
        raise ConfigError(f"-n {count}: expected 1 or more")
    if held_out and not run.eval_sources:
        raise ConfigError("--eval: data_config.yaml: data.eval is empty")
    sources = run.eval_sources if held_out else run.train_sources
    jobs = _held_out_jobs(run, step, seed) if held_out else _planned_jobs(run.plan, run.batch.world_size, step, seed)
    found: list[Chosen] = []
    missing = {number for number, source in enumerate(sources) if len(source)}
    for job in jobs:
        for slot, ref in enumerate(job.refs):
            if ref is not None:
                found.append(Chosen(job, slot))
                missing.discard(ref.source)
        if len(found) >= count and not missing:
            break
    pack = None if held_out else run.plan.settings.pack
    for number in sorted(missing):
        ref = SampleRef(number, 0)
        found.append(Chosen(MicroBatchJob(0, 0, (ref,), "eval" if held_out else "train", pack), 0, is_planned=False))
    return _one_of_each(found, count)


def _one_of_each(found: list[Chosen], count: int) -> list[Chosen]:
    """The first ones, of which some make room for the first of sources that are not among them."""
    kept, others = list(range(min(count, len(found)))), range(count, len(found))
    for other in others:
        numbers = Counter(found[index].ref.source for index in kept)
        source, most = numbers.most_common(1)[0]
        if found[other].ref.source in numbers or most < 2:
            continue
        kept.remove(max(index for index in kept if found[index].ref.source == source))
        kept.append(other)
    return [found[index] for index in kept]


def _planned_jobs(plan: Plan, world_size: int, step: int | None, seed: int | None) -> Iterator[MicroBatchJob]:
    first = step or 0
    if not 0 <= first < plan.num_steps:
        raise ConfigError(f"--step {first}: the run has steps 0 to {plan.num_steps - 1}")
    if seed is None:
        for index in range(first, min(first + MAX_STEPS, plan.num_steps)):
            planned = plan.step(index)
            ranks = [planned.for_rank(rank, world_size) for rank in range(world_size)]
            yield from sorted((job for jobs in ranks for job in jobs), key=lambda job: job.micro_batch)
        return
    draw = random.Random(seed)  # noqa: S311 - which samples are looked at is no secret
    steps = range(plan.num_steps) if step is None else [step]
    for index in draw.sample(steps, min(MAX_STEPS, len(steps))):
        planned = plan.step(index)
        jobs = [job for rank in range(world_size) for job in planned.for_rank(rank, world_size) if any(job.refs)]
        yield from draw.sample(jobs, min(2, len(jobs)) if step is None else len(jobs))


def _held_out_jobs(run: OpenRun, step: int | None, seed: int | None) -> Iterator[MicroBatchJob]:
    """Micro-batches as evaluation makes them, one of each source in turn."""
    size = run.config.train.per_device_eval_batch_size
    settings = PlanSettings(global_batch_size=size, micro_batch_size=size, shuffle=False)
    plans = [Plan([source], [1.0], settings) for source in run.eval_sources]
    longest = max(plan.num_steps for plan in plans)
    if not 0 <= (step or 0) < longest:
        raise ConfigError(f"--step {step}: the held-out data have micro-batches 0 to {longest - 1}")
    draw = random.Random(seed)  # noqa: S311
    for ahead in range(MAX_STEPS):
        for number, plan in enumerate(plans):
            index = (step or 0) + ahead if seed is None else draw.randrange(plan.num_steps)
            if index >= plan.num_steps:
                continue
            (job,) = plan.step(index).for_rank(0, 1)
            refs = tuple(None if ref is None else replace(ref, source=number) for ref in job.refs)
            yield MicroBatchJob(job.step, job.micro_batch, refs, "eval")
