"""Several short runs in one process, and what can be seen of each: `python -m tests.unit.test_key_effects.probe FILE`.

FILE holds `{name: {key: value}}`; what was seen is printed as one line of JSON behind `PROBE`.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch

from vlm_dist.build import run_parts
from vlm_dist.config import load_run
from vlm_dist.data.types import MicroBatchJob
from vlm_dist.data.workers.pool import WorkerPool
from vlm_dist.distributed.environment import resolve_topology
from vlm_dist.distributed.group import Ranks, init_process_groups, shut_down
from vlm_dist.engine import Engine, prepare_deepspeed


@contextmanager
def watched(ahead: int) -> Iterator[dict[str, Any]]:
    """Note the jobs of the pool, the collections of Python, and in the first update the processes and the furthest job.

    Args:
        ahead: steps that should be prefetched by then.
    """
    seen: dict[str, Any] = {"jobs": [], "outcomes": [], "collects": [], "full_collections": []}
    submit, step = WorkerPool.submit, Engine.step
    num_full = 0

    def count(phase: str, about: dict[str, int]) -> None:
        nonlocal num_full
        num_full += phase == "start" and about["generation"] == 2

    def furthest_step(wanted: int) -> int:
        """Wait until a step is asked for, and a moment more for those that should not be."""
        deadline = time.monotonic() + 30 * (wanted > 0)
        while True:
            furthest = max(number for purpose, number, _ in seen["jobs"] if purpose == "train")
            if furthest >= wanted or time.monotonic() > deadline:
                time.sleep(0.7 * (wanted > 0))
                return max(number for purpose, number, _ in seen["jobs"] if purpose == "train")
            time.sleep(0.05)

    def watched_submit(pool: WorkerPool, job: MicroBatchJob) -> Any:
        seen["jobs"].append((job.purpose, job.step, len(job.refs)))
        return submit(pool, job)

    def watched_step(engine: Engine) -> Any:
        if "num_processes" not in seen:
            seen["furthest_step"] = furthest_step(ahead)
            seen["num_processes"] = len(psutil.Process().children(recursive=True))
        seen["collects"].append(gc.isenabled())
        seen["full_collections"].append(num_full)
        outcome = step(engine)
        seen["outcomes"].append((outcome.learning_rate, outcome.grad_norm))
        return outcome

    WorkerPool.submit, Engine.step = watched_submit, watched_step  # type: ignore[method-assign]
    gc.callbacks.append(count)
    try:
        yield seen
    finally:
        gc.callbacks.remove(count)
        WorkerPool.submit, Engine.step = submit, step  # type: ignore[method-assign]


def observe(name: str, changes: dict[str, Any], ranks: Ranks) -> dict[str, Any]:
    """Run with some values changed."""
    changes = {"train.output_dir": f"probe-{name}"} | changes
    config = load_run(Path("configs/tiny.yaml"), [f"{key}={json.dumps(value)}" for key, value in changes.items()])
    ahead = config.train.dataloader_prefetch_factor if config.train.dataloader_num_workers else 0
    with watched(ahead) as seen, run_parts(config, ranks) as parts:
        module = parts.trainer.engine.module
        seen["dtype"] = str(parts.trainer.engine.compute_dtype)
        start = {key: p.detach().float().clone() for key, p in module.named_parameters() if p.requires_grad}
        parts.tell_ending(parts.trainer.run())
        moved = {key: p.detach().float() - start[key] for key, p in module.named_parameters() if p.requires_grad}
        seen["num_compiled"] = sum(m._compiled_call_impl is not None for m in module.modules())
        seen["num_checkpointing"] = sum(getattr(m, "gradient_checkpointing", False) for m in module.modules())
        seen["moved"] = float(torch.cat([change.flatten() for change in moved.values()]).norm())
        seen["checksum"] = float(sum((change.double() ** 3).sum() for change in moved.values()))
    return seen | compiler_counts()


def compiler_counts() -> dict[str, int]:
    """Graphs since the last call: those that were traced, and those of which a backward was made. Forgets them."""
    utils: Any = sys.modules.get("torch._dynamo.utils")
    if utils is None:
        return {"num_traced": 0, "num_differentiated": 0}
    traced, differentiated = utils.counters["stats"]["unique_graphs"], utils.counters["aot_autograd"]["total"]
    utils.counters.clear()
    torch.compiler.reset()
    return {"num_traced": traced, "num_differentiated": differentiated}


def main() -> None:
    prepare_deepspeed()
    ranks = init_process_groups(resolve_topology(os.environ))
    variants = json.loads(Path(sys.argv[1]).read_text())
    seen = {name: observe(name, changes, ranks) for name, changes in variants.items()}
    shut_down()
    print("PROBE " + json.dumps(seen), flush=True)


if __name__ == "__main__":
    main()
