"""The stage of the data: every source opens, has the columns that are asked for, and its samples can be decoded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from vlm_dist.check.child import Lost, run_in_child
from vlm_dist.check.parts import NotThereError, OfStageError, Parts
from vlm_dist.config import RunConfig
from vlm_dist.data.encoding.preconditions import check_columns, choose_video_libraries
from vlm_dist.data.encoding.template import MessageBuilder
from vlm_dist.data.media.configured import configured_image, configured_video
from vlm_dist.data.types import Source
from vlm_dist.errors import ConfigError, ExitCode, SkipSample, VlmDistError
from vlm_dist.observability.findings import Finding, Level

#: Samples of each source that are read, spread over all of it.
NUM_SAMPLES = 8


def check_data(parts: Parts) -> Iterator[Finding]:
    """Look at each source by itself, and then at all of them together."""
    config = parts.config("data", "collator")
    if not config.data.train:
        yield Finding(
            Level.PROBLEM,
            "data.train",
            "it is empty",
            "name at least one source of samples in data_config.yaml",
            exit_code=ExitCode.CONFIG,
        )
    builder = _builder(parts, config)
    opened: dict[str, list[Source]] = {"train": [], "eval": []}
    for which, sources in opened.items():
        for number, settings in enumerate(getattr(config.data, which)):
            where = f"data.{which}[{number}]" + (f" {settings.name}" if settings.name else "")
            try:
                source = parts.source(which, number)
            except VlmDistError as error:
                yield Finding(Level.PROBLEM, where, str(error), exit_code=error.exit_code)
                continue
            sources.append(source)
            yield from _samples(source, where, builder, config)
    for which, sources in opened.items():
        try:
            check_columns(builder, sources)
        except ConfigError as error:
            for line in str(error).splitlines():
                # a line about media says itself what to do without them
                fix = "correct dataset_columns in vlm_collator_config.yaml, or rename with `columns` of the source"
                yield Finding(
                    Level.PROBLEM,
                    f"data.{which} columns",
                    line,
                    "" if "Without " in line else fix,
                    exit_code=ExitCode.CONFIG,
                )
    if opened["train"] and not config.data.eval:
        yield Finding(Level.OK, "data.eval", "empty: nothing is held out, nothing is evaluated")


def _builder(parts: Parts, config: RunConfig) -> MessageBuilder:
    """What reads the columns; which media are read depends on the model, where it is known."""
    switches = config.collator.data_processing
    kinds = {kind for kind, is_on in (("image", switches.image_data), ("video", switches.video_data)) if is_on}
    try:
        family = parts.family()
    except (NotThereError, OfStageError):
        pass  # the stage of the processor tells it; both kinds are looked for
    else:
        if len(kinds) == 2 and not family.takes_image_and_video:
            kinds = {"video"}
    columns = config.collator.dataset_columns.mapping
    return MessageBuilder(columns, config.collator.message_format, frozenset(kinds))


def _samples(source: Source, where: str, builder: MessageBuilder, config: RunConfig) -> Iterator[Finding]:
    """Read and decode a few samples."""
    if not len(source):
        yield Finding(
            Level.PROBLEM,
            where,
            "it has no samples",
            "look at `where`, `subset` and `max_samples` of the source, and at its files",
            exit_code=ExitCode.DATA,
        )
        return
    lacking = set(builder.text_columns.values()) - set(source.columns)
    if lacking:  # that is told for all sources together; nothing can be made of a sample
        yield Finding(Level.WARNING, where, f"no sample was read: it has no column {', '.join(sorted(lacking))}")
        return
    rows = np.unique(np.linspace(0, len(source) - 1, min(NUM_SAMPLES, len(source))).astype(int)).tolist()
    seconds = config.data.sample_timeout_seconds
    looked = run_in_child([partial(_look_at, source, row, builder, config) for row in rows], seconds)
    bad: list[str] = []
    media: Counter[str] = Counter()
    for row, outcome in zip(rows, looked, strict=True):
        if isinstance(outcome, Lost):
            bad.append(f"{source.origin(row)}: {outcome.message}")
        elif isinstance(outcome, VlmDistError):
            yield Finding(Level.PROBLEM, where, str(outcome), exit_code=outcome.exit_code)
            return
        elif isinstance(outcome, Exception):
            bad.append(f"{source.origin(row)}: {_in_words(outcome)}")
        else:
            media.update(outcome)
    size = f"{_samples_in_words(len(source))} in {len(source.shard_sizes):,} shards" if _is_sharded(source) else (
        _samples_in_words(len(source))
    )  # fmt: skip
    seen = ", ".join(f"{count} {name}{'s' if count != 1 else ''}" for name, count in media.items() if count)
    columns = ", ".join(source.columns)
    if bad:
        # one alone says little about a share of a few percent
        is_hopeless = len(bad) == len(rows) or (len(bad) > 1 and len(bad) / len(rows) > config.data.max_bad_share)
        yield Finding(
            Level.PROBLEM if is_hopeless else Level.WARNING,
            where,
            f"{len(bad)} of {len(rows)} samples that were read cannot be used: {bad[0]}",
            "all are left out in training and named in quarantine/; more than data.max_bad_share of them end the run"
            if not is_hopeless
            else f"look at one with `vlm-dist shards show`, and at the columns: {columns}",
            details="\n".join(bad),
            exit_code=ExitCode.DATA,
        )
    else:
        yield Finding(
            Level.OK, where, f"{size}; {len(rows)} read ({seen or 'text only'}); columns: {columns}"
        )  # fmt: skip


def _in_words(error: Exception) -> str:
    if isinstance(error, SkipSample):
        return f"{error.null_class}: {error.message}"
    return f"{type(error).__name__}: {error}"


def _samples_in_words(count: int) -> str:
    return f"{count:,} sample{'' if count == 1 else 's'}"


def _is_sharded(source: Source) -> bool:
    return len(source.shard_sizes) > 1


def _look_at(source: Source, row: int, builder: MessageBuilder, config: RunConfig) -> dict[str, int]:
    """Read one sample and decode its media; counts of them.

    Raises:
        SkipSample: it cannot be used.
        DataError: the storage fails.
    """
    raw = source.read(row)
    conversation: Any = builder.build(raw.fields)
    for image in conversation.images:
        configured_image(image, config.collator)
    for video in conversation.videos:
        configured_video(video, config.collator, choose_video_libraries(config.collator))
    return {"picture": len(conversation.images), "clip": len(conversation.videos)}
