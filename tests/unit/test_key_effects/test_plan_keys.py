"""Keys that decide which samples an epoch has, and how a step is cut into micro-batches."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.unit.test_key_effects.conftest import Project
from tests.unit.test_key_effects.registry import shows
from vlm_dist import build
from vlm_dist.config.arithmetic import resolve_batch
from vlm_dist.data.plan.plan import Plan
from vlm_dist.errors import ConfigError
from vlm_dist.families import family_for

both = pytest.mark.parametrize("which", ["train", "eval"])


def lines(project: Project, name: str, count: int, length: int = 7) -> str:
    """Write records whose texts have `length` bytes."""
    path = project.data / name
    rows = ({"question": "q" * (length - 1), "answer": "a", "number": i} for i in range(count))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def planned(project: Project, changes: dict[str, Any], world_size: int = 1, ranks_per_node: int = 1) -> Plan:
    config = project.config({"train.max_steps": -1, **changes})
    sources = build.open_sources_alone(config, "train")
    return build.make_plan(config, sources, resolve_batch(config.train, world_size), None, ranks_per_node)


def refs_of(plan: Plan) -> list[Any]:
    return [ref for step in plan.steps() for batch in step.micro_batches for ref in batch if ref]


@shows("data.train[].weight")
def test_weights_say_what_an_epoch_is_made_of(project: Project) -> None:
    def counts(*weights: float) -> list[int]:
        names = ("one.jsonl", "two.jsonl")
        sources = [
            {"type": "jsonl", "path": lines(project, name, 6 + 6 * i), "weight": weight}
            for i, (name, weight) in enumerate(zip(names, weights, strict=True))
        ]
        refs = refs_of(planned(project, {"data.train": sources}))
        return [sum(ref.source == number for ref in refs) for number in range(2)]

    assert counts(1.0, 2.0) == [6, 12]
    assert counts(10.0, 10.0) == [9, 9]


@shows("data.eval[].weight")
def test_held_out_samples_have_no_weight(project: Project) -> None:
    settings = {"type": "jsonl", "path": lines(project, "rows.jsonl", 6), "weight": 2.0}
    with pytest.raises(ConfigError, match=r"data.eval\[0\].weight: got 2, expected none"):
        project.sources({"data.eval": [settings]}, "eval")


@shows("data.train[].where", "data.eval[].where")
@both
def test_only_samples_that_meet_the_conditions_are_used(project: Project, which: str) -> None:
    def left(where: dict[str, Any]) -> int:
        both_lengths = [lines(project, "short.jsonl", 3, 7), lines(project, "long.jsonl", 4, 70)]
        settings = {"type": "hf", "name": "json", "data_files": both_lengths, "where": where}
        (source,) = project.sources({f"data.{which}": [settings]}, which)
        return len(source)

    assert left({"text_bytes": "> 50"}) == 4
    assert left({"text_bytes": "<= 50", "number": "< 2"}) == 2


@shows("data.train[].subset.share", "data.eval[].subset.share", "data.train[].subset.seed", "data.eval[].subset.seed")
@both
def test_a_subset_is_a_random_share(project: Project, which: str) -> None:
    def numbers(**subset: Any) -> list[int]:
        settings = {"type": "jsonl", "path": lines(project, "rows.jsonl", 40), "subset": subset}
        (source,) = project.sources({f"data.{which}": [settings]}, which)
        return [source.read(i).fields["number"] for i in range(len(source))]

    assert len(numbers(share=0.25)) == 10
    assert numbers(share=0.25) == numbers(share=0.25, seed=0) != numbers(share=0.25, seed=1)
    assert numbers(share=0.25) != list(range(10))


TEXTS: dict[str, Any] = {
    "train.per_device_train_batch_size": 8,
    "train.gradient_accumulation_steps": 1,
    "collator.text_processing.max_length": 64,
}


@shows("train.packing", "train.pack_max_tokens")
def test_packs_hold_what_their_budget_allows(project: Project) -> None:
    texts = TEXTS | {"data.train": [{"type": "jsonl", "path": lines(project, "rows.jsonl", 16, 35)}]}  # 10 tokens each

    def sizes(**changes: Any) -> list[int]:
        (first, _) = planned(project, texts | {f"train.{key}": value for key, value in changes.items()}).steps()
        assert (first.pack is not None) == changes.get("packing", False)
        return [len(batch) for batch in first.micro_batches]

    assert sizes(group_by_length=False) == [8]
    assert sizes(packing=True, pack_max_tokens=40) == [4, 4]
    assert sizes(packing=True, pack_max_tokens=20) == [2, 2, 2, 2]
    assert sizes(packing=True) == [8]  # 8 x 64 tokens


def test_a_family_that_cannot_be_packed_is_refused_before_training(project: Project) -> None:
    config = project.config({"train.packing": True})
    processor, _ = build.make_processor(config)
    with pytest.raises(ConfigError, match=r"train\.packing is true, but .* paligemma cannot be packed: the tokens of"):
        build.make_materialisers(config, [], [], processor, family_for("paligemma"))


@shows("train.pack_max_patches")
def test_packs_have_no_more_patches_than_their_budget(project: Project) -> None:
    changes = {"train.packing": True, "train.per_device_train_batch_size": 8, "data.index_dir": str(project.data)}

    def num_packs(patches: int | None) -> int:
        config = project.config(changes | {"train.pack_max_patches": patches})
        sources = build.open_sources_alone(config, "train")
        processor, family = build.make_processor(config)
        materialise = build.make_materialisers(config, sources, [], processor, family)
        lengths = build.make_lengths(config, sources, processor, family, materialise)
        made = build.make_plan(config, sources, resolve_batch(config.train, 1), lengths)
        for batch in made.step(0).micro_batches:
            costs = made.costs([ref for ref in batch if ref])
            assert patches is None or len(batch) == 1 or costs.patches.sum() <= patches
        return len(made.step(0).micro_batches)

    assert num_packs(None) < num_packs(64)


@shows("train.balance_scope")
def test_with_node_scope_each_node_has_samples_of_its_own(project: Project) -> None:
    rows = {"data.train": [{"type": "jsonl", "path": lines(project, "rows.jsonl", 2560)}]}

    def shared_blocks(scope: str) -> int:
        changes = TEXTS | rows | {"train.balance_scope": scope, "train.group_by_length": False}
        made, seen = planned(project, changes, world_size=4, ranks_per_node=2), [set[int](), set[int]()]
        for step in list(made.steps())[:20]:
            for rank in range(4):
                refs = [ref for job in step.for_rank(rank, 4) for ref in job.refs if ref]
                seen[rank // 2] |= {ref.index // 256 for ref in refs}
        return len(seen[0] & seen[1])

    assert shared_blocks("node") <= 2 < shared_blocks("world")
