"""Packs: several samples in one row that see nothing of each other, whatever is in them."""

from __future__ import annotations

import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.unit.data.samples import MemorySource, collator, jpeg, mp4
from tests.unit.families.zoo import CHECKPOINTS
from vlm_dist.data.encoding.packing import check_packing
from vlm_dist.data.materialise import Materialiser
from vlm_dist.data.types import IGNORE_INDEX, MicroBatchJob, PackBudget, SampleRef
from vlm_dist.data.workers.process import pack as to_be_sent
from vlm_dist.data.workers.process import unpack
from vlm_dist.errors import ConfigError
from vlm_dist.families import FAMILIES, GENERIC, Family, family_for
from vlm_dist.loss import token_loss_sum
from vlm_dist.model.positions import RopeIndex

ROOM = PackBudget(max_tokens=100_000)
IMAGE, VIDEO, TEXT, CORRUPT, TWO = range(5)
ROWS = [
    {"image": jpeg(112, 84), "question": "which digit is this", "answer": "seven"},
    {"image": None, "video": mp4(8, fps=2), "question": "which digits", "answer": "one two"},
    {"image": None, "question": "what is in the image", "answer": "nothing"},
    None,  # damaged
    {"image": [jpeg(56, 56), jpeg(56, 112, 1)], "question": "two?", "answer": "yes"},
]
#: Names of the tiny models -> samples that they take.
MODELS = {
    "qwen2_vl": (IMAGE, VIDEO, TEXT, TWO),
    "qwen2_5_vl": (TEXT, VIDEO, IMAGE, TWO),
    "llava": (IMAGE, TEXT, TWO),
}


class Packed:
    """A tiny model, and a materialiser for it."""

    def __init__(self, name: str) -> None:
        self.model, self.processor = CHECKPOINTS[name].build()
        self.family: Family = family_for(name)
        self.rows = MODELS[name]
        videos = self.family.takes_video
        config = collator(
            label_masking={"mask_input_tokens": True}, data_processing={"image_data": True, "video_data": videos}
        )
        rope = RopeIndex(self.model.config) if self.family.packing == "mrope" else None
        towers = frozenset({"image", "video"} if videos else {"image"})
        sources = [MemorySource(ROWS)]
        self.make = Materialiser(sources, self.processor, self.family, config, towers, 0, rope_positions=rope)
        self.without_dummies = Materialiser(sources, self.processor, self.family, config, frozenset(), 0)

    def job(self, *rows: int | None, pack: PackBudget | None = None) -> Any:
        refs = tuple(None if row is None else SampleRef(0, row) for row in rows)
        return self.make(MicroBatchJob(3, 1, refs, pack=pack))

    def single(self, row: int) -> Any:
        """One sample and nothing else."""
        return self.without_dummies(MicroBatchJob(3, 1, (SampleRef(0, row),)))

    def logits(self, inputs: dict[str, torch.Tensor], **arguments: Any) -> torch.Tensor:
        return self.model(**inputs, **{"use_cache": False, **arguments}).logits


@pytest.fixture(scope="module", params=sorted(MODELS))
def packed(request: pytest.FixtureRequest) -> Packed:
    return Packed(request.param)


@pytest.fixture(scope="module")
def qwen() -> Packed:
    return Packed("qwen2_vl")


def alone(packed: Packed, *rows: int) -> torch.Tensor:
    """Logits of samples that were run one by one, one after the other: [T, V]."""
    found = []
    for row in rows:
        with torch.no_grad():
            found.append(packed.logits(packed.single(row).inputs)[0])
    return torch.cat(found)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_samples_are_what_they_are_alone(packed: Packed, attention: str) -> None:
    packed.model.set_attn_implementation(attention)
    batch = packed.job(*packed.rows, pack=ROOM)
    assert batch.inputs["input_ids"].shape == (1, batch.num_computed_tokens)
    with torch.no_grad():
        logits = packed.logits(batch.inputs)[0, : batch.num_tokens]
    assert (logits - alone(packed, *packed.rows)).abs().max() <= 1e-5


def test_loss_and_gradients_are_those_of_padded_rows(packed: Packed) -> None:
    packed.model.set_attn_implementation("sdpa")
    results = []
    for pack in (None, ROOM):
        batch = packed.job(*packed.rows, None, CORRUPT, pack=pack)
        packed.model.zero_grad()
        loss = token_loss_sum(packed.logits(batch.inputs), batch.labels)
        loss.backward()
        gradients = {name: p.grad.clone() for name, p in packed.model.named_parameters() if p.grad is not None}
        results.append((batch, loss, gradients))
    (padded, padded_loss, padded_gradients), (row, row_loss, row_gradients) = results
    assert row_loss.item() == pytest.approx(padded_loss.item(), rel=1e-6)
    assert row_gradients.keys() == padded_gradients.keys()
    largest = max(gradient.abs().max() for gradient in padded_gradients.values())
    for name, gradient in padded_gradients.items():
        assert (row_gradients[name] - gradient).abs().max() <= 1e-5 * largest, name
    for name in ("num_samples", "num_tokens", "num_target_tokens", "origins", "null_slots"):
        assert getattr(row, name) == getattr(padded, name), name
    assert row.num_computed_tokens < padded.num_computed_tokens


def test_a_leak_would_be_seen(packed: Packed) -> None:
    """What keeps samples apart is no cache, and positions that begin again; without either, this shows it."""
    batch = packed.job(*packed.rows, pack=ROOM)
    expected = alone(packed, *packed.rows)
    positions = batch.inputs["position_ids"]
    running = torch.arange(positions.shape[-1]).expand_as(positions)
    with torch.no_grad():
        cached = packed.logits(batch.inputs, use_cache=True)[0, : batch.num_tokens]
        wrong = packed.logits(batch.inputs | {"position_ids": running})[0, : batch.num_tokens]
    assert (cached - expected).abs().max() > 0.1
    assert (wrong - expected).abs().max() > 0.1


def test_every_segment_begins_at_0_and_without_a_label(packed: Packed) -> None:
    batch = packed.job(*packed.rows, pack=ROOM)
    assert "attention_mask" not in batch.inputs
    ends = batch.inputs["cu_seq_lens"]
    assert ends.dtype == torch.int32 and int(ends[-1]) == batch.num_computed_tokens
    assert batch.inputs["max_seq_len"] == int(ends.diff().max()) and type(batch.inputs["max_seq_len"]) is int
    arrived = unpack(pickle.loads(pickle.dumps(to_be_sent(batch))))  # as it comes from a worker
    assert torch.equal(arrived.inputs["cu_seq_lens"], ends)
    assert type(arrived.inputs["max_seq_len"]) is int and arrived.inputs.keys() == batch.inputs.keys()
    places = batch.inputs["position_ids"].reshape(-1, batch.num_computed_tokens)[0]
    starts = (places == 0).nonzero().flatten()
    lengths = [packed.job(row).num_tokens for row in packed.rows]
    assert torch.equal(starts.int(), ends[:-1])
    assert starts[: len(lengths)].tolist() == [sum(lengths[:i]) for i in range(len(lengths))]
    assert (batch.labels[0, starts] == IGNORE_INDEX).all()
    targets = [packed.job(row).num_target_tokens for row in packed.rows]
    assert batch.num_target_tokens == sum(targets)


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl"])
def test_positions_are_the_models_own(name: str) -> None:
    packed = Packed(name)
    batch = packed.job(*packed.rows, pack=ROOM)
    own = []
    for row in packed.rows:
        inputs = packed.single(row).inputs
        known = ("input_ids", "mm_token_type_ids", "image_grid_thw", "video_grid_thw", "second_per_grid_ts")
        arguments = {key: inputs[key] for key in known if key in inputs}
        positions = packed.model.model.get_rope_index(**arguments, attention_mask=inputs["attention_mask"])[0]
        own.append(positions[:, 0])
    assert torch.equal(batch.inputs["position_ids"][1:, 0, : batch.num_tokens], torch.cat(own, dim=1))
    again = pickle.loads(pickle.dumps(packed.make))  # as it goes to a worker
    assert torch.equal(again(batch.job).inputs["position_ids"], batch.inputs["position_ids"])


def test_dummies_are_the_last_segments(qwen: Packed) -> None:
    batch = qwen.job(TEXT, pack=ROOM)
    assert batch.inputs["image_grid_thw"].tolist() == batch.inputs["video_grid_thw"].tolist() == [[1, 2, 2]]
    assert batch.num_tokens < batch.num_computed_tokens
    assert (batch.labels[0, batch.num_tokens :] == IGNORE_INDEX).all()
    for empty in (qwen.job(CORRUPT, None, pack=ROOM), qwen.job(pack=ROOM)):
        assert empty.inputs["position_ids"].shape[:2] == (4, 1)
        assert empty.num_tokens == empty.num_target_tokens == 0
        assert empty.num_computed_tokens < 10
        assert torch.isfinite(qwen.logits(empty.inputs)).all()


def test_what_is_beyond_the_headroom_becomes_empty_slots(qwen: Packed) -> None:
    lengths = [qwen.job(row).num_tokens for row in (IMAGE, TEXT, TWO)]
    exact = PackBudget(max_tokens=sum(lengths[:2]), headroom=0.0)
    batch = qwen.job(IMAGE, TEXT, TWO, pack=exact)
    assert [slot.null_class for slot in batch.null_slots] == ["over_budget"]
    assert "vlm-dist shards tokens" in batch.null_slots[0].message
    assert batch.num_tokens == exact.max_tokens
    kept = replace(exact, headroom=lengths[2] / sum(lengths[:2]) + 1e-9)
    assert qwen.job(IMAGE, TEXT, TWO, pack=kept).null_slots == []
    # one that is longer than everything comes through alone, and leaves no room for those behind it
    alone_in_it = qwen.job(TWO, TEXT, pack=PackBudget(max_tokens=8))
    assert alone_in_it.num_samples == 1
    assert [slot.null_class for slot in alone_in_it.null_slots] == ["over_budget"]


def test_patches_have_a_budget_of_their_own(qwen: Packed) -> None:
    grid = qwen.job(IMAGE).inputs["image_grid_thw"].prod(dim=1).sum()
    budget = PackBudget(max_tokens=10_000, max_patches=int(grid), headroom=0.0)
    assert qwen.job(IMAGE, TEXT, pack=budget).num_samples == 2
    assert qwen.job(IMAGE, TEXT, IMAGE, pack=budget).num_samples == 2


def test_families_that_cannot_be_packed_say_why() -> None:
    for family in (*FAMILIES, GENERIC):
        if family.packing is not None:
            check_packing(family)
            continue
        with pytest.raises(ConfigError) as caught:
            check_packing(family)
        assert family.packing_refusal in str(caught.value)
        assert "set train.packing to false" in str(caught.value)
    assert "both directions" in family_for("paligemma").packing_refusal
