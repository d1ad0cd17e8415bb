"""data_config.yaml: what a worker may take, in time and in memory."""

from __future__ import annotations

import time

from tests.unit.data.test_workers_faults import HANGS_ONCE, Decoder, job, outcome
from tests.unit.test_key_effects.conftest import Project
from tests.unit.test_key_effects.registry import shows
from vlm_dist.build.parts import make_pool


@shows("data.sample_timeout_seconds")
def test_a_sample_that_hangs_is_tried_again_after_its_time(project: Project) -> None:
    config = project.config({"train.dataloader_num_workers": 1, "data.sample_timeout_seconds": 0.7})
    with make_pool(config, Decoder(project.data), has_gpu=False) as pool:
        assert outcome(pool.submit(job(0, 1)).result()) == (["1"], {})  # workers take their time to start
        started = time.monotonic()
        assert outcome(pool.submit(job(0, HANGS_ONCE)).result()) == (["103"], {})
        assert 0.7 <= time.monotonic() - started < 20


@shows("data.worker_memory_gib")
def test_a_worker_that_grows_beyond_its_memory_is_replaced(project: Project) -> None:
    def num_processes(gib: float | None) -> int:
        config = project.config({"train.dataloader_num_workers": 1, "data.worker_memory_gib": gib})
        pids: set[int] = set()
        with make_pool(config, Decoder(project.data, leak_bytes=64 << 20), has_gpu=False) as pool:
            for step in range(20):
                pool.submit(job(step, step)).result()
                pids |= set(pool.pids)
        return len(pids)

    assert num_processes(0.001) > 1
    assert num_processes(None) == 1
