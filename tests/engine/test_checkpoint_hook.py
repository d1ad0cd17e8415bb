"""DeepSpeed's `save_checkpoint` collects our state and makes nothing of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.engine import tiny
from tests.ranks import Ranks, run_ranks
from vlm_dist.engine import TrainableState
from vlm_dist.errors import CheckpointError

pytestmark = pytest.mark.engine


def content(state: TrainableState | None) -> dict[str, bytes] | None:
    if state is None:
        return None
    return {f"{n} {part}": t.numpy().tobytes() for n, s in state.parameters.items() for part, t in vars(s).items()}


def save(ranks: Ranks, model: Path, output: Path, stage: int) -> dict[str, Any]:
    engine = tiny.make_engine(model, tiny.ds_config(stage, ranks.world_size))
    batches = [tiny.micro_batch(index) for index in range(ranks.world_size)]
    tiny.run_step(engine, batches[ranks.rank :: ranks.world_size], tiny.num_targets(batches))
    wanted = content(engine.collect_trainable())
    gathered: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("all_gather", "all_gather_into_tensor", "all_reduce", "broadcast"):
            real = getattr(dist, name)

            def counted(*arguments: Any, real: Any = real, name: str = name, **named: Any) -> Any:
                if named.get("group") is not holders:
                    gathered.append(name)
                return real(*arguments, **named)

            patch.setattr(dist, name, counted)
        holders: Any = None
        saved = content(engine.save(output, "checkpoint-1"))
        holders = dist.new_group([0, 1], backend="gloo")
        copied = content(engine.save(output, "checkpoint-1", holders))
    with pytest.raises(CheckpointError, match="DeepSpeed wants to write"):
        engine._deepspeed.checkpoint_engine.save({}, "mp_rank_00_model_states.pt")
    more = tiny.run_step(engine, batches[ranks.rank :: ranks.world_size], tiny.num_targets(batches))[0]
    engine.close()
    assert (saved == wanted) and (copied is None) == (ranks.rank == 2)
    return {"copied": copied, "gathered": gathered, "is_whole": wanted is not None, "loss": more}


@pytest.mark.parametrize("stage", [2, 3])
def test_a_save_collects_our_state_and_writes_nothing(tmp_path: Path, stage: int) -> None:
    model = tiny.save_tiny_vlm(tmp_path / "model")
    results = run_ranks(save, 3, model, tmp_path / "run", stage, timeout_seconds=100)
    assert [result["is_whole"] for result in results] == [True, False, False]
    assert results[0]["copied"] == results[1]["copied"]
    assert [result["gathered"] for result in results] == [[], [], []]
    assert all(torch.isfinite(torch.tensor(result["loss"])) for result in results)
    assert not list((tmp_path / "run").rglob("*")) if (tmp_path / "run").exists() else True
