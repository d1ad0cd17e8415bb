"""`python -m tests.bench.gpu 2b` (or 7b): true sizes, random weights, ours beside TRL and the Hugging Face Trainer.

Every part has its own share of the minutes; what is measured is printed at once, so that a run that is cut short is not
lost. A rehearsal (`--device cpu --size tiny`) goes the same ways without a GPU; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
from pathlib import Path

import torch

from tests.bench.gpu import ours, page, peer, samples
from tests.bench.gpu.commands import Command
from tests.bench.gpu.kernels import read_trace
from tests.bench.gpu.machine import Machine, describe
from tests.bench.gpu.models import NAMES, Checkpoint, write_checkpoint
from tests.bench.report import Report

AIM_MFU, AIM_RATIO, AIM_BYTES = 0.5, 1.5, 80e9
#: Parts, in this order, and the most seconds that each may take; all together are cut at --minutes.
PARTS = {"8k": 170.0, "trl": 150.0, "trainer": 120.0, "16k": 110.0, "video": 90.0}
PACKS_PER_STEP = 4
FILL = 0.97  # of the packs
MEAN_TOKENS = 905  # of the mix, with the words of the chat template
TEMPLATE_TOKENS = 40  # at most
#: Of the GPU that a rehearsal plans for.
REHEARSED_GIB = 80.0
#: At the end: to write the page.
SPARE_SECONDS = 8


class Bench:
    """One run of the benchmark.

    Args:
        options: of the command line.
        folder: for everything that is written.
    """

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.started = time.monotonic()
        self.end = self.started + 60 * options.minutes - SPARE_SECONDS
        self.is_tiny = options.size == "tiny"
        self.device = torch.device(options.device)
        self.scale = samples.TINY if self.is_tiny else samples.TRUE
        self.name = NAMES[options.model]
        self.folder = folder
        num_gpus = torch.cuda.device_count() if self.device.type == "cuda" else 0
        self.num_gpus = num_gpus
        self.command = Command(folder, num_gpus)
        self.report = Report()
        self.machine: Machine = describe(self.device)
        cores = os.cpu_count() or 1
        self.num_workers = 2 if self.is_tiny else max(2, min(8, cores // max(1, num_gpus) - 2))
        self.num_steps = 2 if self.is_tiny else 8
        self.runs: dict[str, ours.Measured] = {}
        self.peers: dict[str, dict] = {}
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        """A line for people, now and on the page."""
        self.notes.append(text)
        print(json.dumps({"note": text}), flush=True)

    def seconds_for(self, part: str) -> float:
        """What is left for a part; a rehearsal, on a machine that may be busy, is cut by --minutes alone."""
        limit = float("inf") if self.device.type == "cpu" else PARTS[part]
        return min(limit, self.end - time.monotonic())

    def prepare(self) -> tuple[Checkpoint, dict[str, Path]]:
        """Checkpoint and data."""
        started = time.monotonic()
        checkpoint = write_checkpoint(self.folder / "model", self.name, self.device, is_tiny=self.is_tiny)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.report.add("checkpoint written", time.monotonic() - started, "s")
        self.report.add("checkpoint", checkpoint.num_bytes / 1e9, "GB")
        mixed = samples.make_samples(self.scale)
        places = {
            "mix": samples.write_shards(self.folder / "mix", mixed),
            "rows": samples.write_rows(self.folder / "rows", mixed),
            "clips": samples.write_shards(self.folder / "clips", samples.make_clips(self.scale)),
        }
        return checkpoint, places

    def setting(self, part: str, places: dict[str, Path]) -> ours.Setting:
        """Of our run."""
        tokens = {"8k": 8192, "16k": 16384, "video": 8192}[part] // (16 if self.is_tiny else 1)
        width, height = self.scale.clip_grid
        per_clip = width * height * self.scale.num_frames // 2 + samples.CLIP_WORDS + TEMPLATE_TOKENS
        in_pack = tokens // per_clip if part == "video" else FILL * tokens / MEAN_TOKENS
        count = 12 if self.is_tiny else max(1, round(PACKS_PER_STEP * in_pack))
        return ours.Setting(
            name=part,
            shards=places["clips" if part == "video" else "mix"],
            pack_tokens=tokens,
            samples_per_step=count,
            num_steps=self.num_steps if part == "8k" else max(2, self.num_steps // 2),
            is_video=part == "video",
            num_frames=self.scale.num_frames,
            max_length=min(8192, tokens),
        )

    def run_ours(self, part: str, checkpoint: Checkpoint, places: dict[str, Path]) -> None:
        """One of our runs, and its figures."""
        setting = self.setting(part, places)
        path = ours.write_run(self.folder, checkpoint, setting, num_workers=self.num_workers)
        deadline = time.monotonic() + self.seconds_for(part)
        chosen = ours.choose_checkpointing(self.command, path, self.machine.memory_gib or REHEARSED_GIB, 60)
        found = ours.train(self.command, path, setting, chosen, deadline - time.monotonic())
        self.runs[part] = found
        speed = found.tokens_per_second
        if speed is None:
            self.note(f"ours, {part}: no figure; exit code {found.outcome.exit_code}\n{found.outcome.tail}")
            return
        for message in found.messages:
            print(json.dumps({"log": f"{part}: {message}"}), flush=True)
        self.report.add(f"{part}: useful tokens per second", speed, "1/s")
        mfu = found.median("mfu")
        if mfu is not None:
            ratio = {"peer": "aim", "peer_value": AIM_MFU, "ratio": mfu / AIM_MFU, "ratio_aim": 1.0}
            aimed = part == "8k" and self.name == NAMES["7b"]
            self.report.add(f"{part}: MFU", mfu, "of the peak", **(ratio if aimed else {}))
            self.report.add(f"{part}: HFU", found.median("hfu") or 0.0, "of the peak")
        self.report.add(f"{part}: waiting for data", found.median("data_wait_share") or 0.0, "of the time", aim=0.02)
        if found.peak_bytes:
            limit = AIM_BYTES if part in ("8k", "16k") else None
            self.report.add(f"{part}: memory", found.peak_bytes, "B", limit)
        self.report.add(f"{part}: process", found.outcome.seconds, "s")

    def run_peer(self, name: str, checkpoint: Checkpoint, places: dict[str, Path]) -> None:
        """A peer, beside our run of packs of 8k."""
        setting = self.setting("8k", places)
        seconds = self.seconds_for(name)
        task = peer.Task(
            model=str(checkpoint.directory),
            model_class=checkpoint.model_class,
            samples=str(places["rows"]),
            output=str(self.folder / name),
            samples_per_step=setting.samples_per_step,
            rows=max(1, setting.samples_per_step // PACKS_PER_STEP),
            num_steps=max(2, self.num_steps // 2),
            seconds=0.5 * seconds,
            is_cpu=self.device.type == "cpu",
            num_workers=self.num_workers,
        )
        path = task.write(self.folder / name / "task.json")
        outcome = self.command.spread(["tests.bench.gpu.peer", name, str(path)], seconds, name=name)
        result = self.folder / name / "result.json"
        found = json.loads(result.read_text()) if result.exists() else {}
        self.peers[name] = found
        if "tokens_per_second" not in found:
            self.note(f"{name}: no figure; exit code {outcome.exit_code}\n{outcome.tail}")
            return
        found["tokens_per_second"] *= max(1, self.num_gpus)  # of all ranks
        print(json.dumps({"peer": name, **found}), flush=True)
        own = self.runs["8k"].tokens_per_second if "8k" in self.runs else None
        if own is not None:
            theirs = found["tokens_per_second"]
            aim = {"ratio_aim": AIM_RATIO} if name == "trl" else {}
            self.report.add(
                f"8k against {name}", own, "tokens/s", peer=name, peer_value=theirs, ratio=own / theirs, **aim
            )

    def run(self, parts: list[str]) -> None:
        """All parts, in order, as far as the time goes."""
        print(json.dumps({"machine": self.machine.as_dict()}), flush=True)
        checkpoint, places = self.prepare()
        for part in parts:
            if self.seconds_for(part) < 20:
                self.note(f"{part}: left out, the time is over")
                continue
            try:
                (self.run_peer if part in peer.PEERS else self.run_ours)(part, checkpoint, places)
            except Exception as error:  # noqa: BLE001 - the parts after it are worth having
                self.note(f"{part}: {type(error).__name__}: {error}")
        self.report.summarise()
        trace = self.runs["8k"].trace if "8k" in self.runs else None
        table = read_trace(trace) if trace is not None else None
        if table is not None and table.seconds:
            print("\n".join(table.lines), flush=True)
        if self.device.type == "cuda" and not self.is_tiny:
            path = page.write(self.name, self.machine, self.report, self.runs, self.peers, table, self.notes)
            print(json.dumps({"page": str(path)}), flush=True)


def main() -> int:
    """Run the benchmark; the status is 0 whether aims are met or missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=list(NAMES))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--size", choices=("true", "tiny"), default="true")
    parser.add_argument("--minutes", type=float, default=9.5, help="for everything (%(default)s)")
    parser.add_argument("--parts", default=",".join(PARTS), help="some of %(default)s")
    parser.add_argument("--folder", type=Path, default=None, help="to keep what is written; else it goes at the end")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device here; a rehearsal without one: --device cpu --size tiny")
        return 1
    if options.device == "cpu" and options.size == "true":
        parser.error("--size true needs a GPU: add --size tiny")
    folder = options.folder or Path(tempfile.mkdtemp(prefix="vlm-dist-gpu-bench-"))
    try:
        Bench(options, folder.resolve()).run([part for part in PARTS if part in options.parts.split(",")])
    finally:
        if options.folder is None:
            shutil.rmtree(folder, ignore_errors=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
