"""A frozen vision tower has no graph under ZeRO either, recomputed or not, and all learn what one process does."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.engine import tiny
from tests.ranks import Ranks, run_ranks
from vlm_dist.config import PeftConfig
from vlm_dist.engine import Engine, zero_init_context
from vlm_dist.model import attach_adapter, enable_gradient_checkpointing, run_frozen_towers_without_graph

pytestmark = pytest.mark.engine

CASES = [(2, False), (2, True), (3, False), (3, True)]
LANGUAGE_ONLY = {"vision": "freeze", "projector": "freeze", "language": "lora"}


def train(ranks: Ranks, directory: Path) -> dict[Any, Any]:
    from transformers import Qwen2VLForConditionalGeneration

    found = {}
    for stage, recomputed in CASES:
        config = tiny.ds_config(stage, ranks.world_size)
        with zero_init_context(config):
            model = Qwen2VLForConditionalGeneration.from_pretrained(directory)
            model = attach_adapter(model, PeftConfig(r=3, lora_dropout=0.0), LANGUAGE_ONLY)
        run_frozen_towers_without_graph(model)
        if recomputed:
            enable_gradient_checkpointing(model)
        model.get_base_model().enable_input_require_grads()  # as PEFT and transformers do by themselves
        engine = Engine.initialise(model.train(), tiny.adamw, tiny.groups_of(model), tiny.schedule, config)
        seen: list[bool] = []
        blocks = model.get_base_model().model.visual.blocks
        for module in (*blocks, model.get_base_model().model.visual):
            module.register_forward_hook(partial(_note, seen))
        losses = []
        for step in range(2):
            batches = [tiny.micro_batch(10 * step + rank) for rank in range(ranks.world_size)]
            losses.append(tiny.run_step(engine, batches[ranks.rank : ranks.rank + 1], tiny.num_targets(batches))[0])
        state = engine.collect_trainable()
        weights = {name: p.master.numpy() for name, p in state.parameters.items()} if state else {}
        found[stage, recomputed] = (seen, losses, weights)
        engine.close()
    return found


def _note(seen: list[bool], module: Any, args: Any, output: Any) -> None:
    first = output if hasattr(output, "requires_grad") else output.pooler_output
    seen.append(first.requires_grad)


def test_the_tower_has_no_graph_and_the_rest_learns_the_same(tmp_path: Path) -> None:
    by_rank = run_ranks(train, 2, tiny.save_tiny_vlm(tmp_path / "model"), timeout_seconds=200)
    for found in by_rank:
        for case in CASES:
            seen, losses, weights = found[case]
            assert len(seen) >= 4 and not any(seen), case
            assert losses == pytest.approx(found[CASES[0]][1], rel=1e-5)
            for name, weight in found[CASES[0]][2].items():
                assert abs(weights[name] - weight).max() < 1e-5, (case, name)
