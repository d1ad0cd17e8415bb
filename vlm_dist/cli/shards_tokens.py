"""`vlm-dist shards tokens`: counts the tokens of all training samples, so that packs are planned exactly."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from vlm_dist.cli.arguments import Commands, add_run
from vlm_dist.errors import ConfigError

if TYPE_CHECKING:
    from vlm_dist.data.lengths.summary import LengthSummary


def add_commands(subcommands: Commands) -> None:
    """Add `tokens`."""
    tokens = subcommands.add_parser(
        "tokens",
        help="count the tokens of the samples of a run",
        description="Counts the tokens of all training samples as this run would see them, and keeps the counts in "
        "data.index_dir; training plans by them from then on (data.lengths). What has been counted is not counted "
        "again: a stopped count goes on, and new shards are added to those that are there.",
    )
    add_run(tokens)
    tokens.add_argument("--workers", type=int, default=None, help="processes (one per CPU); 0: this one")
    tokens.set_defaults(command=count)


def count(options: argparse.Namespace) -> None:
    """Count, and tell what the samples are like."""
    from vlm_dist.build import make_materialisers, make_processor, open_sources_alone
    from vlm_dist.build.data import source_repeats
    from vlm_dist.build.lengths import make_stores, training_materialiser
    from vlm_dist.config import load_run
    from vlm_dist.data.lengths.counting import CountSamples, count_tokens
    from vlm_dist.data.lengths.summary import summarise
    from vlm_dist.data.workers.pool import WorkerPool

    num_workers = (os.cpu_count() or 1) if options.workers is None else options.workers
    if num_workers < 0:
        raise ConfigError(f"--workers {num_workers}: expected 0 (count in this process) or more")
    config = load_run(options.run, options.overrides)
    sources = open_sources_alone(config, "train")
    processor, family = make_processor(config)
    materialise = training_materialiser(make_materialisers(config, sources, [], processor, family))
    stores = make_stores(config, processor, family)
    count_samples = CountSamples(materialise, family.patches_per_token)
    gib = config.data.worker_memory_gib
    pool = WorkerPool(
        count_samples,
        num_workers,
        sample_timeout_seconds=config.data.sample_timeout_seconds,
        max_memory_bytes=None if gib is None else int(gib * 2**30),
    )
    try:
        with pool, progress(sum(len(source) for source in sources)) as advance:
            count_tokens(sources, stores, pool, advance)
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        raise SystemExit(130) from None
    max_length = config.collator.text_processing.max_length
    for source, store in zip(sources, stores, strict=True):
        show(source.name, summarise(source, store), max_length)
    samples = sum(
        int(repeat * len(source)) for repeat, source in zip(source_repeats(config, sources), sources, strict=True)
    )
    per_step = config.train.per_device_train_batch_size * config.train.gradient_accumulation_steps
    print(
        f"an epoch has {samples} samples: {-(-samples // per_step)} steps on one rank, at {per_step} per step and rank"
    )
    print(
        f"kept in {stores[0].directory.parent}; vlm-dist plan {options.run} --summary shows the batches planned by them"
    )


def show(name: str, summary: LengthSummary, max_length: int) -> None:
    """Print what the samples of a source are like."""
    print(f"{name}: {summary.num_samples} samples, {summary.num_tokens} tokens")
    if summary.quantiles:
        figures = ", ".join(f"{label} {value}" for label, value in summary.quantiles.items())
        print(f"  tokens of a sample: {figures}")
    for words, number in (
        (f"with media made smaller to fit max_length {max_length}", summary.num_reduced),
        (f"with text cut at max_length {max_length}", summary.num_cut),
        (f"too long for max_length {max_length}, and left out", summary.num_too_long),
        ("that cannot be used, and are left out", summary.num_unusable),
        ("that took too long or ended their process: estimated, and tried again by the next call", summary.num_lost),
    ):
        if number:
            print(f"  {number} ({number / summary.num_samples:.2%}) {words}")


@contextmanager
def progress(total: int) -> Iterator[Callable[[int], Any]]:
    """A progress bar on a terminal; on anything else one line for every tenth."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("counting"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task("", total=total)
            yield lambda count: bar.advance(task, count)
        return
    done, told = 0, 0

    def advance(count: int) -> None:
        nonlocal done, told
        done += count
        if total and done * 10 // total > told:
            told = done * 10 // total
            print(f"counted {done} of {total} samples", file=sys.stderr, flush=True)

    yield advance
