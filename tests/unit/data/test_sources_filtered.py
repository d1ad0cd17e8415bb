"""Parts of a source: what meets conditions, or a random share; counted once, and the same everywhere."""

import json
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.data.plan_sources import FakeSource
from vlm_dist.config.conditions import parse_conditions
from vlm_dist.data.index.facts import FACTS_DTYPE
from vlm_dist.data.plan.plan import Plan, PlanSettings
from vlm_dist.data.shards.writer import ShardWriter
from vlm_dist.data.sources import open_source
from vlm_dist.data.sources.filtered import FilteredSource
from vlm_dist.data.types import RawSample, SampleOrigin
from vlm_dist.errors import DataError


class Numbers(FakeSource):
    """Row r has r bytes of text; counts how often facts are asked for."""

    columns = ("text",)
    num_asked = 0

    @property
    def shard_digests(self):
        return [f"shard-{i}" for i in range(len(self.shard_sizes))]

    def keep_columns(self, used):
        pass

    def facts(self, rows):
        type(self).num_asked += 1
        facts = np.zeros(len(rows), dtype=FACTS_DTYPE)
        facts["text_bytes"] = rows
        return facts

    def locate(self, rows):
        ends = np.cumsum(self.shard_sizes)
        shards = np.searchsorted(ends, rows, side="right")
        return shards, rows - (ends - self.shard_sizes)[shards]

    def will_read(self, rows):
        self.announced = rows.tolist()

    def origin(self, index):
        return SampleOrigin(self.name, "numbers", str(index))

    def read(self, index):
        return RawSample({"text": str(index)}, self.origin(index))


def kept_rows(source):
    return [int(source.read(i).fields["text"]) for i in range(len(source))]


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=8).filter(sum),
    st.integers(0, 60),
    st.sampled_from([1.0, 0.5, 0.1, 0.37]),
    st.integers(0, 3),
)
def test_what_is_left_is_what_was_asked_for(sizes, least, share, seed):
    whole = Numbers(sizes)
    meeting = [row for row in range(len(whole)) if row >= least]
    conditions = parse_conditions({"text_bytes": f">= {least}"})
    if int(len(meeting) * share + 1e-9) == 0:
        with pytest.raises(DataError, match=r"none is left by text_bytes >= "):
            FilteredSource(whole, conditions, share, seed)
        return
    source = FilteredSource(whole, conditions, share, seed)
    rows = kept_rows(source)
    assert rows == sorted(set(rows))
    assert set(rows) <= set(meeting)
    assert len(rows) == sum(source.shard_sizes) == int(len(meeting) * share + 1e-9)
    everywhere = np.arange(len(rows))
    assert source.facts(everywhere)["text_bytes"].tolist() == rows
    assert np.stack(source.locate(everywhere)).tolist() == np.stack(whole.locate(np.array(rows))).tolist()
    assert np.bincount(source.locate(everywhere)[0], minlength=len(sizes)).tolist() == source.shard_sizes
    assert kept_rows(pickle.loads(pickle.dumps(source))) == rows
    source.will_read(everywhere[:2])
    assert whole.announced == rows[:2]


def test_shares_differ_by_seed_and_not_by_run():
    def rows(seed):
        return kept_rows(FilteredSource(Numbers([500, 500]), share=0.2, seed=seed))

    assert rows(0) == rows(0) != rows(1)
    assert len(rows(0)) == 200
    assert 80 < sum(row < 500 for row in rows(0)) < 120


def test_conditions_are_evaluated_once(tmp_path):
    conditions = parse_conditions({"text_bytes": ["> 10", "!= 20"]})
    first = FilteredSource(Numbers([30, 30]), conditions, index_dir=tmp_path)
    asked = Numbers.num_asked
    again = FilteredSource(Numbers([30, 30]), conditions, index_dir=tmp_path)
    assert kept_rows(again) == kept_rows(first) == [*range(11, 20), *range(21, 60)]
    other_share = FilteredSource(Numbers([30, 30]), conditions, 0.5, index_dir=tmp_path)
    assert Numbers.num_asked == asked
    moved = pickle.loads(pickle.dumps(again))
    assert kept_rows(moved) == kept_rows(first)
    assert len({first.manifest_hash, other_share.manifest_hash, Numbers([30, 30]).manifest_hash}) == 3
    FilteredSource(Numbers([30, 31]), conditions, index_dir=tmp_path)  # other data: evaluated anew
    assert Numbers.num_asked > asked


def test_a_directory_that_cannot_be_written_costs_only_the_next_start(tmp_path, caplog):
    (tmp_path / "where").write_text("a file in the way")
    source = FilteredSource(Numbers([9]), parse_conditions({"text_bytes": "< 3"}), index_dir=tmp_path)
    assert kept_rows(pickle.loads(pickle.dumps(source))) == [0, 1, 2]
    assert "found out again next time" in caplog.text


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ({"size": "> 3"}, r"where names size, which is no fact and no column; facts: text_bytes, .*; columns: text"),
        ({"tokens": "> 3"}, r"tokens depend on the model: text_bytes comes near"),
        ({"text_bytes": "== many"}, r"text_bytes == many compares a number with a text"),
    ],
)
def test_conditions_on_what_there_is_not_are_refused(where, message):
    with pytest.raises(DataError, match=message):
        FilteredSource(Numbers([5]), parse_conditions(where))


def test_conditions_on_columns(tmp_path):
    rows = [
        {"language": "en", "score": 3, "ok": True},
        {"language": "de", "score": 5, "ok": True},
        {"language": "en", "score": "7", "ok": False},
        {"language": "en", "score": None, "ok": True},
        {"score": 9, "ok": True},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "".join(json.dumps({**row, "image": f"{i}.png"}) + "\n" for i, row in enumerate(rows)) + "damaged\n"
    )
    for i in range(len(rows)):
        (tmp_path / f"{i}.png").write_bytes(b"never looked into")

    def left(where):
        settings_ = SimpleNamespace(type="jsonl", path=str(path), where=where, name="rows")
        source = open_source(settings_, tmp_path / "index", ["image"], ["image"])
        return [source.origin(i).key for i in range(len(source))], source.read(0).fields

    assert left({"language": "== en"}) == (["1", "3", "4"], {"image": b"never looked into"})
    assert left({"language": "!= en"})[0] == ["2"]
    assert left({"score": ["> 3", "< 9"]})[0] == ["2", "3"]
    assert left({"ok": "== true", "language": "== en"})[0] == ["1", "4"]


def test_a_plan_of_a_part_covers_the_part():
    source = FilteredSource(Numbers([100, 7, 200]), parse_conditions({"text_bytes": "< 150"}), 0.5)
    plan = Plan([source], [1.0], PlanSettings(8, 2))
    rows = sorted(ref.index for step in plan.steps() for batch in step.micro_batches for ref in batch if ref)
    assert rows == list(range(75))


def test_a_sample_that_nobody_can_parse_meets_no_condition(tmp_path):
    with ShardWriter(tmp_path, "s") as writer:
        for key, answer in (("a", b'{"answer": "yes"}'), ("b", b"[" * 100_000), ("c", b'{"answer": "no"}')):
            writer.write({"__key__": key, "json": answer})
    settings = SimpleNamespace(type="tar", path=str(tmp_path), name="deep", where={"answer": "== yes"})
    assert [open_source(settings).origin(i).key for i in range(len(open_source(settings)))] == ["a"]
