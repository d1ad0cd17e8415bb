"""Token counts on disk: counted once, kept by shard, gone on with, and chosen where all samples have them."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from tests.unit.data.samples import MemorySource, collator
from vlm_dist.data.encoding.fitted import SampleLength
from vlm_dist.data.lengths.calibration import TextCalibration
from vlm_dist.data.lengths.counting import CountSamples, count_tokens
from vlm_dist.data.lengths.estimate import BatchKeys
from vlm_dist.data.lengths.opening import LengthChoice, choose_lengths, open_lengths
from vlm_dist.data.lengths.summary import summarise
from vlm_dist.data.lengths.token_store import NO_COUNT, NOT_COUNTED, ExactLengths, TokenStore
from vlm_dist.data.types import MicroBatchJob, NullSlot
from vlm_dist.data.workers import progress
from vlm_dist.data.workers.pool import WorkerPool
from vlm_dist.errors import CheckpointError, ConfigError, DataError
from vlm_dist.families import family_for

KEYS = BatchKeys(family_for("qwen2_vl"), collator().video_processing)
CRASHES, TOO_LONG, DAMAGED = 1013, 1005, 1007


@dataclass
class Sharded(MemorySource):
    """Numbers as samples, in shards; the first `limit` of them are used."""

    shards: Sequence[tuple[str, int]] = field(default=(("a", 40), ("b", 5), ("c", 60)))
    limit: int = 10**9

    def __len__(self) -> int:
        return sum(self.shard_sizes)

    @property
    def shard_sizes(self) -> list[int]:
        sizes, left = [], self.limit
        for _, size in self.shards:
            sizes.append(min(size, left))
            left -= sizes[-1]
        return sizes

    @property
    def shard_digests(self) -> list[str]:
        return [digest for digest, _ in self.shards]

    @property
    def manifest_hash(self) -> str:
        return f"{self.shards}/{self.limit}"

    def locate(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        starts = np.cumsum([0, *self.shard_sizes])
        shards = np.searchsorted(starts, rows, side="right") - 1
        return shards, rows - starts[shards]


@dataclass
class Measure:
    """A sample is as long as its number; some are not what they should be."""

    calls: list[int] = field(default_factory=list)
    stop_after: int = 10**9
    offset: int = 1000

    def measure(self, job: MicroBatchJob) -> list[SampleLength | NullSlot]:
        condemned = {one.slot: one.null_class for one in job.condemned}
        return [
            self._one(slot, ref.index) if slot not in condemned else NullSlot(None, condemned[slot], "no")
            for slot, ref in enumerate(job.refs)
            if ref is not None
        ]

    def _one(self, slot: int, row: int) -> SampleLength | NullSlot:
        number = row + self.offset
        progress.decoding(slot)
        if number == CRASHES:
            os.kill(os.getpid(), signal.SIGSEGV)  # as a decoder does that writes where it must not
        if len(self.calls) >= self.stop_after:
            raise KeyboardInterrupt
        self.calls.append(row)
        if number in (TOO_LONG, DAMAGED):
            return NullSlot(None, "too_long" if number == TOO_LONG else "decode", "no")
        return SampleLength(number, row, was_reduced=row == 3, was_cut=row == 4)


@dataclass
class Losing(Measure):
    """Some samples time out or crash, as the pool tells it."""

    lost: dict[int, str] = field(default_factory=dict)

    def _one(self, slot: int, row: int) -> SampleLength | NullSlot:
        return NullSlot(None, self.lost[row], "no") if row in self.lost else super()._one(slot, row)


@dataclass
class Ahead:
    """A pool that is asked for results after it has been given the next jobs."""

    work: CountSamples
    num_workers: int = 2

    def submit(self, job: MicroBatchJob) -> Any:
        return SimpleNamespace(result=lambda: self.work(job))


class Pictures(Sharded):
    """Each sample has a picture of 16 tokens, and as many bytes of text as its number is."""

    def facts(self, rows: np.ndarray) -> np.ndarray:
        facts = super().facts(rows)
        facts["num_images"], facts["image_pixels"], facts["text_bytes"] = 1, (4 * 28) ** 2, rows + (rows == 9) * 90
        return facts


class Halves(Sharded):
    """Every second shard has the second half of the whole shard."""

    def locate(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        shards, within = super().locate(rows)
        return shards, within + shards % 2 * 40


def count(source: Any, store: TokenStore, measure: Any, workers: int = 0) -> int:
    done: list[int] = []
    with WorkerPool(CountSamples(measure, 4), workers) as pool:
        count_tokens([source], [store], pool, done.append)
    return sum(done)


def costs(source: Any, store: TokenStore, rows: Any) -> Any:
    return ExactLengths([source], [store], KEYS).costs(0, np.asarray(rows))


@pytest.fixture
def store(tmp_path: Path) -> TokenStore:
    return TokenStore(tmp_path, "print")


def test_counts_are_what_was_measured(store: TokenStore) -> None:
    source = Sharded(())
    assert count(source, store, Measure(offset=0)) == 105
    rows = np.array([104, 0, 40, 7, 44, 45])
    found = costs(source, store, rows)
    assert found.tokens.tolist() == [104, 1, 40, 7, 44, 45]  # a sample of no tokens costs one
    assert found.patches.tolist() == (rows * 4).tolist()
    assert found.batch_key.tolist() == [0] * 6
    assert [path.name for path in sorted(store.directory.glob("*.arrow"))] == ["a.arrow", "b.arrow", "c.arrow"]


def test_unusable_samples_cost_nothing_and_are_told(store: TokenStore) -> None:
    source = Sharded((), shards=(("a", 12),))
    count(source, store, Measure())
    assert costs(source, store, [5, 7]).tokens.tolist() == [1, 1]
    assert costs(source, store, [5, 7]).patches.tolist() == [0, 0]
    counts = store.read("a")
    assert counts is not None
    assert counts.tokens[5] == counts.patches[7] == NO_COUNT
    told = summarise(source, store)
    assert (told.num_samples, told.num_reduced, told.num_cut, told.num_too_long, told.num_unusable) == (12, 1, 1, 1, 1)
    assert told.quantiles["longest"] == 1011
    assert told.num_tokens == sum(range(1000, 1012)) - 1005 - 1007


def test_a_stopped_count_goes_on(store: TokenStore) -> None:
    source = Sharded(())
    with pytest.raises(KeyboardInterrupt):
        count(source, store, Measure(stop_after=70, offset=0))
    assert not store.covers(source)
    again = Measure(offset=0)
    assert count(source, store, again) == 105
    assert 105 - 70 <= len(again.calls) < 105 - 30  # at most one task is done again
    assert store.covers(source)
    assert costs(source, store, np.arange(1, 105)).tokens.tolist() == list(range(1, 105))


def test_a_new_shard_leaves_the_others_counted(store: TokenStore) -> None:
    count(Sharded(()), store, Measure(offset=0))
    larger = Sharded((), shards=(("new", 10), ("a", 40), ("b", 5), ("c", 60)))
    assert not store.covers(larger)
    measure = Measure(offset=0)
    count(larger, store, measure)
    assert measure.calls == list(range(10))
    assert costs(larger, store, [9, 10, 55]).tokens.tolist() == [9, 1, 45 - 5 + 5]


def test_a_part_of_a_shard_is_counted_alone(store: TokenStore) -> None:
    first = Sharded((), limit=50)
    count(first, store, Measure(offset=0))
    counts = store.read("c")
    assert counts is not None
    assert len(counts) == 5
    whole = Sharded(())
    assert store.covers(first)
    assert not store.covers(whole)
    measure = Measure(offset=0)
    count(whole, store, measure)
    assert measure.calls == list(range(50, 105))
    counts = store.read("c")
    assert counts is not None
    assert (counts.tokens != NOT_COUNTED).all()


def test_workers_outlive_a_sample_that_ends_its_process(store: TokenStore) -> None:
    source = Sharded((), shards=(("a", 20),))
    assert count(source, store, Measure(), workers=2) == 20
    assert costs(source, store, [12, 13, 14, 5]).tokens.tolist() == [1012, 1, 1014, 1]
    told = summarise(source, store)
    assert (told.num_too_long, told.num_unusable, told.num_lost) == (1, 1, 1)


def test_what_was_lost_to_a_crash_or_a_time_out_is_estimated_and_tried_again(store: TokenStore) -> None:
    source = Pictures((), shards=(("a", 40),))
    count(source, store, Losing(offset=0, lost={7: "timeout", 9: "crash"}))
    assert store.covers(source)  # one bad clip does not keep a run from the counts of all others
    lengths = ExactLengths([source], [store], KEYS, max_length=20, patches_per_token=4)
    found = lengths.costs(0, np.array([7, 8, 9]))
    assert found.tokens.tolist() == [16 + 2, 8, 20]  # 7 bytes of text and a picture; the other is cut to fit
    assert found.patches.tolist() == [64, 32, 64]
    again = Losing(offset=0, lost={9: "crash"})
    count(source, store, again)
    assert again.calls == [7]
    assert ExactLengths([source], [store], KEYS).costs(0, np.array([7])).tokens.tolist() == [7]
    assert summarise(source, store).num_lost == 1
    assert ExactLengths([source], [store], KEYS).digest != lengths.digest


def test_what_earlier_versions_called_unusable_is_tried_again(store: TokenStore) -> None:
    """They called samples so that had timed out, too."""
    source = Sharded((), shards=(("a", 12),))
    count(source, store, Measure())
    table = pa.ipc.open_file(store.path("a").read_bytes()).read_all().replace_schema_metadata({"format": "1"})
    with pa.ipc.new_file(store.path("a"), table.schema) as writer:
        writer.write_table(table)
    measure = Measure()
    count(source, store, measure)
    assert measure.calls == [7]


def test_counts_are_part_of_the_digest_and_others_are_not_planned_with(store: TokenStore, tmp_path: Path) -> None:
    source = Sharded(())
    count(source, store, Measure(offset=0))
    lengths = ExactLengths([source], [store], KEYS)
    other = TokenStore(tmp_path / "other", "print")
    count(source, other, Measure(offset=1))
    assert ExactLengths([source], [other], KEYS).digest != lengths.digest
    shutil.copy(other.path("c"), store.path("c"))  # behind the store's back
    assert lengths.costs(0, np.arange(5)).tokens.tolist() == [1, 1, 2, 3, 4]
    with pytest.raises(DataError, match="gone or others"):
        lengths.costs(0, np.array([104]))


def test_a_mark_does_not_outlive_what_it_was_made_of(store: TokenStore) -> None:
    whole, first = Sharded(()), Sharded((), limit=50)
    count(whole, store, Measure(offset=0))
    assert store.covers(whole)
    store.path("c").write_bytes(b"no arrow file")
    count(first, store, Measure(offset=0))  # writes five rows of the last shard
    assert store.covers(first)
    assert not store.covers(whole)
    assert store.num_uncounted(whole) == 55


def test_shards_of_the_same_contents_of_which_other_rows_are_used_are_counted_in_one_go(store: TokenStore) -> None:
    source = Halves((), shards=(("same", 40), ("same", 40)))
    count_tokens([source], [store], Ahead(CountSamples(Measure(offset=0), 4)), lambda number: None)
    assert store.covers(source)
    assert ExactLengths([source], [store], KEYS).costs(0, np.arange(1, 80)).tokens.tolist() == list(range(1, 80))


def test_damaged_counts_are_counted_again(store: TokenStore) -> None:
    source = Sharded(())
    count(source, store, Measure(offset=0))
    store.path("b").write_bytes(b"no arrow file")
    with pytest.raises(DataError, match="vlm-dist shards tokens"):
        costs(source, store, [41])
    measure = Measure(offset=0)
    count(source, store, measure)
    assert measure.calls == list(range(40, 45))


def test_the_choice(store: TokenStore) -> None:
    source = Sharded([{"question": "q", "answer": "a"}] * 105)

    def choose(setting: Any, planned_with: str | None = None) -> str:
        return choose_lengths(setting, [source], [store], lambda fields: 5, planned_with).kind

    assert choose("auto") == choose("estimate") == choose("auto", "estimate:1") == "estimate"
    assert choose("auto", "facts-1") == "estimate"
    for setting, planned_with in (("exact", None), ("auto", "exact:1"), ("exact", "exact:1")):
        with pytest.raises(ConfigError, match=r"105 samples are left.*\n.*vlm-dist shards tokens RUN.yaml"):
            choose(setting, planned_with)
    count(source, store, Measure(offset=0))
    assert choose("auto") == choose("exact") == choose("auto", "exact:1") == "exact"
    assert choose("estimate") == "estimate"
    assert choose("auto", "estimate:1") == "estimate"  # counts that came meanwhile do not change a run
    with pytest.raises(CheckpointError, match=r"Set data\.lengths: estimate"):
        choose("exact", "estimate:1")
    with pytest.raises(CheckpointError, match=r"Set data\.lengths: exact"):
        choose("estimate", "exact:1")


def test_where_lengths_decide_the_cut_alone_a_run_may_go_on_with_others(store: TokenStore) -> None:
    source = Sharded([{"question": "q", "answer": "a"}] * 105)

    def choose(setting: Any, planned_with: str) -> str:
        return choose_lengths(setting, [source], [store], lambda fields: 5, planned_with, decides_order=False).kind

    assert choose("auto", "exact:1") == choose("estimate", "exact:1") == "estimate"
    count(source, store, Measure(offset=0))
    assert choose("exact", "estimate:1") == choose("auto", "exact:1") == "exact"
    assert choose("auto", "estimate:1") == "estimate"


class Counter:
    """Every picture is one token."""

    kinds = estimated = frozenset({"image"})

    def count_many(self, kind: str, shapes: Sequence[Any]) -> list[int]:
        return [1] * len(shapes)


def test_digests_tell_kind_and_set_up(store: TokenStore, tmp_path: Path) -> None:
    source = Sharded([{"question": "q", "answer": "a"}] * 105)
    count(source, store, Measure(offset=0))

    def digest(choice: LengthChoice, stores: Sequence[TokenStore]) -> str:
        return open_lengths(choice, [source], stores, Counter(), family_for("qwen2_vl"), collator()).digest

    exact, estimate = LengthChoice("exact"), LengthChoice("estimate", (TextCalibration(1, 0.5, 3),))
    assert digest(exact, [store]).startswith("exact:")
    assert digest(estimate, [store]).startswith("estimate:")
    other = TokenStore(tmp_path, "other")
    assert digest(estimate, [store]) != digest(estimate, [other])
    assert digest(estimate, [store]) != digest(LengthChoice("estimate", (TextCalibration(1, 0.6, 3),)), [store])
    with pytest.raises(DataError, match="the same directory on all nodes"):
        digest(exact, [other])
