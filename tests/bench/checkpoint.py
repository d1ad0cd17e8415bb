"""What a checkpoint weighs, what it costs the loop, and how soon a run goes on from one: `make bench-checkpoint`.

    python -m tests.bench.checkpoint [--quick]

A tiny Qwen2-VL with adapters of millions of elements, under ZeRO-2 on 1, 2 and 4 ranks. DeepSpeed's own
`save_checkpoint(exclude_frozen_parameters=True)` of the same engine is the peer.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.bench.checkpoint_page import page
from tests.bench.report import ROOT, Report, write_page
from tests.engine import tiny
from tests.ranks import Ranks, run_ranks

COMMAND = "make bench-checkpoint"
RANK_COUNTS = (1, 2, 4)
POSITIONS = (0.1, 0.5, 0.9)
NUM_STEPS = 100_000
#: LoRA of this r has 9.5 million elements on the tiny model, as r 8 has on a model of 7B.
LORA_R = 4096
QUICK_R = 64

BYTES_PER_ELEMENT, FIXED_BYTES = 16, 1_000_000
AIM_STALL_SECONDS = 0.2


@dataclass(frozen=True)
class Saved:
    """What rank 0 measured.

    Attributes:
        num_elements: that are trained.
        num_bytes: of one checkpoint.
        peer_bytes: of DeepSpeed's own.
        step_seconds: of each step.
        stall_seconds: of each save.
        peer_seconds: of each save of DeepSpeed's own, which is a stall from end to end.
        write_seconds: of each save, in the thread.
    """

    num_elements: int
    num_bytes: int
    peer_bytes: int
    step_seconds: list[float]
    stall_seconds: list[float]
    peer_seconds: list[float]
    write_seconds: list[float]


class _Log:
    """Keeps the stalls."""

    def __init__(self) -> None:
        self.stalls: list[float] = []

    def message(self, text: str) -> None: ...

    def event(self, event: str, /, step: int | None = None, **fields: Any) -> None: ...

    def log_save(self, step: int, metrics: Any) -> None:
        self.stalls.append(metrics["save_stall_seconds"])


def _step(engine: Any, ranks: Ranks, number: int) -> float:
    batches = [tiny.micro_batch(8 * number + index) for index in range(ranks.world_size)]
    started = time.perf_counter()
    tiny.run_step(engine, batches[ranks.rank : ranks.rank + 1], tiny.num_targets(batches))
    return time.perf_counter() - started


def _save_often(ranks: Ranks, model: Path, output: Path, r: int, num_saves: int) -> Saved:
    """Steps with a save behind every fourth; then DeepSpeed's own saves."""
    from vlm_dist.checkpoint import CheckpointSaver, CheckpointStore, Places, Retention, RunFacts

    engine = tiny.make_engine(model, tiny.ds_config(2, ranks.world_size), r=r)
    log, writes = _Log(), []
    store = CheckpointStore(output / "ours", Retention(2))
    places = Places(is_writer=ranks.is_main)
    facts = RunFacts(plan={"position": 0}, global_batch_size=ranks.world_size)
    saver = CheckpointSaver(store, engine, ranks, places, lambda position: facts, log)  # type: ignore[arg-type]
    real_save = store.save

    def timed_save(*arguments: Any) -> Path:
        started = time.perf_counter()
        path = real_save(*arguments)
        writes.append(time.perf_counter() - started)
        return path

    store.save = timed_save  # type: ignore[method-assign]
    steps = []
    for number in range(4 * num_saves):
        steps.append(_step(engine, ranks, number))
        if number % 4 == 3:
            saver.begin(number + 1)
    saver.finish()
    checkpoint = store.output_dir / f"checkpoint-{4 * num_saves}"
    num_bytes = sum(path.stat().st_size for path in checkpoint.iterdir()) if ranks.is_main else 0
    state = engine.collect_trainable()
    engine.close()

    peer = _deepspeed_alone(ranks, model, r)
    peer_seconds = []
    for number in range(num_saves):
        ranks.barrier()
        started = time.perf_counter()
        peer.save_checkpoint(str(output / "peer"), tag=f"{number}", exclude_frozen_parameters=True)
        peer_seconds.append(time.perf_counter() - started)
        ranks.barrier()
        if ranks.is_main and number:
            shutil.rmtree(output / "peer" / f"{number - 1}")
    folder = output / "peer" / f"{num_saves - 1}"
    peer_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if ranks.is_main else 0
    peer.destroy()
    num_elements = state.num_elements if state is not None else 0
    return Saved(num_elements, num_bytes, peer_bytes, steps[1:], log.stalls, peer_seconds, writes)


def _deepspeed_alone(ranks: Ranks, model: Path, r: int) -> Any:
    """DeepSpeed's engine without ours around it, after a step."""
    import deepspeed

    wrapped = tiny.load_peft(model, r=r)
    wrapped.train()
    engine, *_ = deepspeed.initialize(
        model=wrapped,
        optimizer=tiny.adamw,
        model_parameters=tiny.groups_of(wrapped),
        config=tiny.ds_config(2, ranks.world_size),
        dist_init_required=False,
    )
    inputs, labels = tiny.micro_batch(ranks.rank)
    loss = tiny.token_loss_sum(engine(**inputs).logits, labels)
    engine.backward(loss)
    engine.step()
    return engine


def _resume(ranks: Ranks, model: Path, output: Path, r: int, path: str) -> dict[str, float]:
    """Seconds to find, verify and restore a checkpoint into an engine that is there."""
    from vlm_dist.checkpoint import CheckpointStore, choose_checkpoint, restore_checkpoint

    engine = tiny.make_engine(model, tiny.ds_config(2, ranks.world_size), r=r)
    seconds = {}
    for share in POSITIONS:
        ranks.barrier()
        started = time.perf_counter()
        checkpoint = choose_checkpoint(CheckpointStore(output / path), ranks, str(output / path / _name(share)))
        assert checkpoint is not None
        restore_checkpoint(checkpoint, engine, ranks)
        ranks.barrier()
        seconds[f"{share:.0%}"] = time.perf_counter() - started
    engine.close()
    return seconds


def _name(share: float) -> str:
    return f"checkpoint-{int(NUM_STEPS * share)}"


def _at_positions(output: Path) -> None:
    """The checkpoint of the last run under the names of positions of a long one."""
    source = max((output / "ours").iterdir(), key=lambda path: path.stat().st_mtime)
    for share in POSITIONS:
        shutil.copytree(source, output / "positions" / _name(share))


def main() -> None:
    """Measure everything, print a JSON line per figure, and write the page."""
    parser = argparse.ArgumentParser(description="checkpoints")
    parser.add_argument("--quick", action="store_true", help="small adapters and few saves; writes no page")
    options = parser.parse_args()
    r, num_saves = (QUICK_R, 2) if options.quick else (LORA_R, 6)
    report = Report()
    with tempfile.TemporaryDirectory() as folder:
        model = tiny.save_tiny_vlm(Path(folder) / "model")
        for world_size in RANK_COUNTS:
            output = Path(folder) / f"runs-{world_size}"
            saved: Saved = run_ranks(_save_often, world_size, model, output, r, num_saves, timeout_seconds=600)[0]
            _report_saves(report, world_size, saved)
            if world_size == RANK_COUNTS[0]:
                _at_positions(output)
                positions = output
        for world_size in RANK_COUNTS:
            measured = run_ranks(_resume, world_size, model, positions, r, "positions", timeout_seconds=600)[0]
            for position, seconds in measured.items():
                report.add(f"{world_size} ranks/resume at {position}", seconds, "s")
            ratio = measured["90%"] / measured["10%"]
            report.add(f"{world_size} ranks/resume at 90% over 10%", ratio, "ratio", aim=1.5)
    report.summarise()
    if not options.quick:
        path = ROOT / "docs" / "benchmarks" / "checkpoint.md"
        write_page(path, "Checkpoints", COMMAND, ("torch", "deepspeed", "peft", "vlm-dist"), page(report, RANK_COUNTS))


def _report_saves(report: Report, world_size: int, saved: Saved) -> None:
    name = f"{world_size} ranks"
    peer = "DeepSpeed save_checkpoint"
    report.add(f"{name}/trainable elements", saved.num_elements, "elements")
    floor = BYTES_PER_ELEMENT * saved.num_elements + FIXED_BYTES
    ratio = saved.peer_bytes / saved.num_bytes
    report.add(f"{name}/bytes", saved.num_bytes, "B", aim=floor, peer=peer, peer_value=saved.peer_bytes, ratio=ratio)
    step, stall = statistics.median(saved.step_seconds), statistics.median(saved.stall_seconds)
    theirs = statistics.median(saved.peer_seconds)
    report.add(f"{name}/step", step, "s")
    aim = max(step, AIM_STALL_SECONDS)
    report.add(f"{name}/stall", stall, "s", aim=aim, peer=peer, peer_value=theirs, ratio=theirs / stall)
    report.add(f"{name}/worst stall", max(saved.stall_seconds), "s")
    report.add(f"{name}/stall in steps", stall / step, "steps")
    report.add(f"{name}/written in", statistics.median(saved.write_seconds), "s")


if __name__ == "__main__":
    main()
