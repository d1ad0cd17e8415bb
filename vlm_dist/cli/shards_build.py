"""`vlm-dist shards build`: writes tar shards from other data."""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_dist.cli.arguments import Commands
from vlm_dist.cli.messages import counted

if TYPE_CHECKING:
    from vlm_dist.data.shards.build import BuildSummary, Progress

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}
_LINE_SECONDS = 10.0
_STOPPED = 130  # what a shell says of a command that Ctrl-C has ended

_EXAMPLES = """\
examples:
  vlm-dist shards build --from jsonl --path talks.json --media-root pictures --out data/train
  vlm-dist shards build --from hf --name HuggingFaceM4/ChartQA --split train --out data/chartqa
  vlm-dist shards build --from hf --path 'tables/*.parquet' --out data/train --shuffle 0
  vlm-dist shards build --from tar --path 'old/*.tar' --out data/train --max-shard-size 256MB
"""


def add_commands(commands: Commands) -> None:
    """Add `shards build`."""
    build = commands.add_parser(
        "build",
        help="write tar shards from a Hugging Face dataset, JSON records with media files, or other tars",
        description="Writes size-limited tar shards with their indexes and a manifest, and prints the lines for\n"
        "data_config.yaml and vlm_collator_config.yaml with which they train. Media are stored as they are.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_input(build.add_argument_group("input"))
    _add_columns(build.add_argument_group("columns"))
    _add_output(build.add_argument_group("output"))
    _add_faults(build.add_argument_group("faults"))
    build.set_defaults(command=build_command)


def _add_input(group: Any) -> None:
    group.add_argument("--from", dest="type", choices=("hf", "jsonl", "tar"), help="default: by the ending of --path")
    group.add_argument(
        "--path",
        help="file, directory, glob or brace pattern; hf: a save_to_disk directory, parquet, csv, arrow, or a folder "
        "of images or videos",
    )
    group.add_argument("--name", help="hf: a data set of the hub")
    group.add_argument("--split", help="hf: default train, or the only one")
    group.add_argument("--streaming", action="store_true", help="hf: read from first to last without a local copy")
    group.add_argument(
        "--media-root",
        type=Path,
        metavar="DIR",
        help="where media paths start, and what none of them may leave; default: the folder of the records",
    )
    group.add_argument("--limit", type=int, metavar="N", help="only so many records, the first of the order")


def _add_columns(group: Any) -> None:
    group.add_argument("--columns", nargs="+", default=[], metavar="NEW=OWN", help="rename columns or members")
    group.add_argument("--drop", nargs="+", default=[], metavar="COLUMN", help="leave columns or members out")
    group.add_argument(
        "--image-column", action="append", default=[], metavar="COLUMN", help="default: by type or value"
    )
    group.add_argument(
        "--video-column", action="append", default=[], metavar="COLUMN", help="default: by type or value"
    )
    group.add_argument("--messages-column", metavar="COLUMN", help="of conversations; default: by value")
    group.add_argument("--key-column", metavar="COLUMN", help="names the samples; default: the number of the record")


def _add_output(group: Any) -> None:
    group.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory of the shards")
    group.add_argument("--prefix", default="shard", help="shards are PREFIX-000000.tar, … (default: shard)")
    group.add_argument("--max-shard-size", type=parse_size, default="512MB", metavar="SIZE", help="default: 512MB")
    group.add_argument("--max-samples", type=int, default=10_000, metavar="N", help="per shard; default: 10000")
    group.add_argument("--shuffle", type=int, metavar="SEED", help="write in a random order, which SEED decides")
    group.add_argument(
        "--shuffle-buffer", type=int, default=1000, metavar="N", help="for a stream; default: 1000 records"
    )
    group.add_argument("--overwrite", action="store_true", help="replace the shards of this prefix")
    group.add_argument(
        "--resume",
        action="store_true",
        help="go on where a stopped build ended; the shards are the same as without the stop",
    )


def _add_faults(group: Any) -> None:
    group.add_argument(
        "--skip-bad",
        action="store_true",
        help="leave out records that cannot be used, count them, and list them in PREFIX-build-report.jsonl; default: "
        "they are an error",
    )
    group.add_argument("--verify-images", action="store_true", help="decode every image, not its header alone")
    group.add_argument(
        "--workers", type=int, default=8, metavar="N", help="threads that read and fetch media; default: 8"
    )
    group.add_argument("--timeout", type=float, default=30.0, metavar="SECONDS", help="of fetching a URL; default: 30")
    group.add_argument("--max-media-size", type=parse_size, default="1GB", metavar="SIZE", help="default: 1GB")


def parse_size(text: str) -> int:
    """Read a size such as 512MB, 1.5GiB or 1000000, in bytes."""
    match = re.fullmatch(r"([0-9.]+)\s*([KMG]I?)?B?", text.strip().upper())
    try:
        if match is None:
            raise ValueError
        return int(float(match.group(1)) * _UNITS[match.group(2) or ""])
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; expected e.g. 512MB, 1GiB") from None


def build_command(options: argparse.Namespace) -> None:
    """Build shards."""
    from vlm_dist.data.shards.build import BuildSettings, build_shards

    settings = BuildSettings(
        type=options.type or _guess_type(options.path, options.name),
        out=options.out,
        path=options.path,
        name=options.name,
        split=options.split,
        streaming=options.streaming,
        media_root=options.media_root,
        prefix=options.prefix,
        max_shard_bytes=options.max_shard_size,
        max_samples=options.max_samples,
        overwrite=options.overwrite,
        resume=options.resume,
        shuffle=options.shuffle,
        shuffle_buffer=options.shuffle_buffer,
        limit=options.limit,
        columns=_read_renames(options.columns),
        drop=tuple(options.drop),
        image_columns=tuple(options.image_column),
        video_columns=tuple(options.video_column),
        messages_column=options.messages_column,
        key_column=options.key_column,
        skip_bad=options.skip_bad,
        verify_images=options.verify_images,
        workers=options.workers,
        timeout_seconds=options.timeout,
        max_media_bytes=options.max_media_size,
    )
    if settings.type == "hf":
        _quiet_datasets()
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        with _Display() as display:
            summary = build_shards(settings, display.show)
    except KeyboardInterrupt:
        hint = "" if settings.streaming else f"; go on with the same command and --resume{_without_overwrite(settings)}"
        print(f"stopped: finished shards stay in {settings.out}{hint}", file=sys.stderr)
        raise SystemExit(_STOPPED) from None
    finally:
        signal.signal(signal.SIGTERM, before)
    _print_summary(summary)


def _without_overwrite(settings: Any) -> str:
    return " in the place of --overwrite" if settings.overwrite else ""


def _stop(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _quiet_datasets() -> None:
    import datasets

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()


def _guess_type(path: str | None, name: str | None) -> Any:
    if path is not None and name is None:
        if path.endswith(".tar") or (Path(path).is_dir() and any(Path(path).glob("*.tar"))):
            return "tar"
        if path.endswith((".jsonl", ".ndjson", ".json")):
            return "jsonl"
    return "hf"


def _read_renames(pairs: list[str]) -> dict[str, str]:
    from vlm_dist.errors import DataError

    renames = {}
    for pair in pairs:
        new, equals, own = pair.partition("=")
        if not (new and equals and own):
            raise DataError(f"--columns {pair}: expected NEW=OWN, e.g. question=query")
        renames[new] = own
    return renames


def _print_summary(summary: BuildSummary) -> None:
    for notice in summary.notices:
        print(f"notice: {notice}", file=sys.stderr)
    rate = f", {summary.num_samples / summary.seconds:,.0f} samples/s" if summary.seconds > 2 else ""
    print(
        f"{counted(summary.num_samples, 'sample')} in {counted(summary.num_shards, 'shard')}, "
        f"{summary.num_bytes / 1e6:,.1f} MB, "
        f"{summary.seconds:.1f} s{rate}"
    )
    if summary.skipped:
        classes = ", ".join(f"{count} {name}" for name, count in sorted(summary.skipped.items()))
        print(f"left out: {counted(sum(summary.skipped.values()), 'record')} ({classes}); listed in {summary.report}")
    print(
        f"\nTo train on them, put into the configuration (or the overrides of a run file):\n\n{summary.config}", end=""
    )


class _Display:
    """A bar on a terminal, else a line now and then; on the standard error output."""

    def __enter__(self) -> _Display:
        self._stack = ExitStack()
        self._bar: Any = None
        self._phase = ""
        self._last = time.monotonic()
        if sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = self._stack.enter_context(
                Progress(
                    TextColumn("{task.description}"),
                    BarColumn(),
                    MofNCompleteColumn(),
                    TextColumn("{task.fields[told]}"),
                    TimeRemainingColumn(),
                    console=Console(stderr=True, highlight=False),
                )
            )
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def show(self, progress: Progress) -> None:
        """Show how far it is."""
        told = ""
        if progress.phase == "writing":
            told = f"{counted(progress.num_shards, 'shard')}, {progress.num_bytes / 1e6:,.0f} MB"
        if progress.num_skipped:
            told += f", {progress.num_skipped} bad" if told else f"{progress.num_skipped} bad"
        if self._bar is not None:
            if progress.phase != self._phase:
                self._phase = progress.phase
                self._task = self._bar.add_task(progress.phase, total=progress.total, told="")
            self._bar.update(self._task, completed=progress.done, told=told)
        elif time.monotonic() - self._last >= _LINE_SECONDS:
            self._last = time.monotonic()
            total = "" if progress.total is None else f" of {progress.total}"
            print(f"{progress.phase}: {progress.done}{total} records  {told}", file=sys.stderr, flush=True)
