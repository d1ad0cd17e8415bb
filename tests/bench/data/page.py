"""docs/benchmarks/data.md."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tests.bench.batching import ACCUMULATION, MODES, PER_DEVICE
from tests.bench.data.environments import ENVIRONMENT_OF, PINS
from tests.bench.data.figures import OURS, PEERS, TUNED, Answers, Scale, slope
from tests.bench.data.task import BATCH_SIZE, DECODED_SIDE, GLOBAL_BATCH_SIZE
from tests.bench.lengths import MIXES
from tests.bench.report import Report, write_page

_TITLES = {
    "ours": "vlm_dist",
    "webdataset": "webdataset",
    "energon": "megatron-energon",
    "streaming": "mosaicml-streaming",
    "hf_datasets": "datasets, streaming",
    TUNED: "webdataset, decoder by hand",
}
_PACKAGES = ("torch", "torchvision", "transformers", "pillow", "numpy", "vlm-dist")


def write_data_page(
    path: Path,
    command: str,
    report: Report,
    answers: Answers,
    scale: Scale,
    sets: Sequence[tuple[str, Path, int]],
) -> None:
    """Write the page."""
    keys = list(dict.fromkeys(key for key, _ in answers.values))
    speeds = [key for key in keys if "/" in key and not key.startswith("resume")]
    times = ["imports", "first batch", *(key for key in keys if key.startswith("resume"))]
    body = [
        *_method(scale, sets),
        "## Speed, in samples per second",
        "",
        *_table(answers, speeds, "{:,.0f}"),
        "Raw reads hand over the bytes of every member, unparsed; a first epoch is not counted. Raw read, decode and "
        "the first two of the training batches: one process on one core. Against the peers:",
        "",
        *_ratios(report),
        "## Latency, in seconds",
        "",
        *_table(answers, [key for key in times if key in keys], "{:.2f}"),
        "`first batch`: from the end of the imports to the first batch of training tensors, no workers. `resume`: the "
        "same, behind so much of the data.",
        "",
        *(f"* {_TITLES[name]}: {ready['resume']}." for name, ready in answers.ready.items() if name != TUNED),
        "",
        "## Memory",
        "",
        *_memory(answers),
        "## Padding and balance",
        "",
        *_batching(report),
        "## Settings",
        "",
        *(f"* {_TITLES[name]}{_version(name)}: {ready['settings']}." for name, ready in answers.ready.items()),
        "",
        *_failures(answers),
    ]
    write_page(path, "The data engine and its peers", command, _PACKAGES, "\n".join(body))


def _method(scale: Scale, sets: Sequence[tuple[str, Path, int]]) -> list[str]:
    listed = ", ".join(f"{count:,} samples of {label}" for label, _, count in sets)
    return [
        f"The same pictures for all: {listed} (448 x 448 and 1024 x 768 pixels), each with a question and an answer, "
        "in tar shards of ours or in the peer's own form, read from the page cache. Every measurement runs in a "
        "process of its own, forked from one that has done the loader's imports; loaders take turns within every "
        f"round, and what is shown is the median of {scale.rounds} rounds, with (largest - smallest) / median in "
        "brackets. Ratios are "
        "medians of the rounds' ratios. One thread per process. Everybody uses the same torch, torchvision, Pillow and "
        "transformers.",
        "",
        f"Decoding ends with pictures of {DECODED_SIDE} x {DECODED_SIDE} pixels; training batches are {BATCH_SIZE} "
        f"samples through Qwen2-VL's processor (at most {DECODED_SIDE} x {DECODED_SIDE} pixels), with labels on the "
        "answers alone. The peers get a collate function that makes one processor call per batch, which is faster than "
        f"one per sample; ours knows steps of {GLOBAL_BATCH_SIZE} samples besides.",
        "",
    ]


def _table(answers: Answers, keys: Sequence[str], form: str) -> list[str]:
    loaders = list(answers.ready)
    lines = ["| | " + " | ".join(_TITLES[name] for name in loaders) + " |", "|---" * (len(loaders) + 1) + "|"]
    for key in keys:
        cells = []
        for name in loaders:
            median = answers.median(key, name)
            if median is None:
                cells.append("could not" if (key, name) in answers.failures else "")
            else:
                cells.append(f"{form.format(median)} ({answers.spread(key, name):.0%})")
        lines.append(f"| {key.replace('/', ', ')} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def _ratios(report: Report) -> list[str]:
    compared = [one for one in report.figures if one.ratio_aim is not None]
    lines = ["| | ours | peer | ratio | aim | |", "|---|---|---|---|---|---|"]
    for one in compared:
        verdict = "met" if one.is_met else "missed"
        lines.append(
            f"| {one.name.split('/ours')[0].replace('/', ', ')} | {one.value:,.0f} | {one.peer_value:,.0f} "
            f"({_TITLES[one.peer or '']}) | {one.ratio:.2f} | {one.ratio_aim:g} | {verdict} |"
        )
    return [*lines, ""]


def _memory(answers: Answers) -> list[str]:
    lines = [
        "Resident memory of the process and all below it while it makes training batches with 2 workers (the processor "
        "makes at most 112 x 112 pixels here, so that the samples take seconds).",
        "",
        "| | samples | MiB | with shared pages counted once | MiB per 1000 samples |",
        "|---|---|---|---|---|",
    ]
    for name, points in answers.points.items():
        if points:
            count, resident, once = points[-1]
            lines.append(f"| {_TITLES[name]} | {count:,} | {resident:,.0f} | {once:,.0f} | {slope(points):.1f} |")
    return [*lines, ""]


def _batching(report: Report) -> list[str]:
    lines = [
        f"Of our three modes on three mixes of lengths, 16 ranks, {PER_DEVICE} samples per device, {ACCUMULATION} "
        "micro-batches a step (packs have as many samples in all): padding / computed tokens, and the slowest rank's "
        "cost over the mean, the worse of tokens and patches. No peer plans batches over ranks; `make bench-scale` "
        "has more.",
        "",
        "| mix | " + " | ".join(f"{mode}: padding | max/mean" for mode in MODES) + " |",
        "|---" * (1 + 2 * len(MODES)) + "|",
    ]
    for mix in MIXES:
        cells = []
        for mode in MODES:
            cells.append(f"{report.find(f'{mix}/{mode}/padding').value:.1%}")
            name = f"{mix}/{mode}/max over mean of the ranks' costs"
            cells.append(f"{report.find(name).value:.3f}")
        lines.append(f"| {mix} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def _version(loader: str) -> str:
    if loader in (OURS, TUNED):
        return ""
    name = {"energon": "megatron-energon", "streaming": "mosaicml-streaming"}.get(loader, ENVIRONMENT_OF[loader])
    pins = (PINS / f"{ENVIRONMENT_OF[loader]}.txt").read_text().splitlines()
    return " " + next(pin.partition("==")[2] for pin in pins if pin.startswith(name + "=="))


def _failures(answers: Answers) -> list[str]:
    if not answers.failures:
        return []
    lines = [
        f"* {_TITLES[name]}, {key.replace('/', ', ')}: {why.split(';')[0]}"
        for (key, name), why in answers.failures.items()
    ]
    return ["What could not be measured:", "", *lines, ""]


assert set(_TITLES) == {OURS, *PEERS, TUNED}
