"""A shard that has changed or been replaced since it was indexed is noticed, and a run does not go on with it."""

import logging
import os
import shutil
from types import SimpleNamespace

import pytest

from tests.unit.data.samples import jpeg
from vlm_dist.data.index import describe, open_index
from vlm_dist.data.index.describe import describe_shards
from vlm_dist.data.index.open_index import index_tar, load_or_scan
from vlm_dist.data.index.shard_index import INDEX_SUFFIX, read_index
from vlm_dist.data.plan.contents import read_contents, write_contents
from vlm_dist.data.plan.plan import Plan, PlanSettings
from vlm_dist.data.shards.update_indexes import update_indexes
from vlm_dist.data.shards.verify import Finding, verify_shard
from vlm_dist.data.shards.writer import ShardWriter
from vlm_dist.data.sources import open_source
from vlm_dist.errors import CheckpointError, DataError

NUM_SAMPLES = 6


@pytest.fixture
def built(tmp_path):
    """A shard of our own writer: its index has checksums of all content."""
    with ShardWriter(tmp_path / "data", "s") as writer:
        for i in range(NUM_SAMPLES):
            writer.write({"__key__": f"k{i}", "jpg": picture(i), "json": {"answer": f"a{i}"}})
    return tmp_path / "data" / "s-000000.tar"


@pytest.fixture
def shard(built):
    """A shard of another's, indexed by its headers."""
    index_tar(built)
    return built


def picture(seed):
    """Pictures of the same size in bytes, as two photographs hardly ever are."""
    return jpeg(64, 64, seed).ljust(12_000, b"\0") + seed.to_bytes(4, "big")


def make_plan(shard):
    source = open_source(SimpleNamespace(type="tar", path=str(shard.parent), name="digits"))
    return Plan([source], [1.0], PlanSettings(global_batch_size=2, micro_batch_size=1))


def change_bytes(shard, old, new, *, keep_time=False):
    status = shard.stat()
    data = shard.read_bytes()
    assert data.count(old) == 1
    assert len(old) == len(new)
    shard.write_bytes(data.replace(old, new))
    if keep_time:
        os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns))
    else:
        os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns + 10**9))


@pytest.mark.parametrize(
    ("old", "new"), [(picture(2), picture(9)), (b'"a2"', b'"a9"')], ids=["another picture", "another label"]
)
def test_resume_is_refused_when_a_sample_was_replaced_by_one_of_the_same_size(shard, old, new):
    state = make_plan(shard).state(1)
    make_plan(shard).check_state(state)
    change_bytes(shard, old, new)
    with pytest.raises(CheckpointError, match=r"source 0 \(digits\): contents"):
        make_plan(shard).check_state(state)


def test_resume_is_refused_when_a_shard_was_swapped_for_one_of_the_same_size(shard):
    state = make_plan(shard).state(1)
    with ShardWriter(shard.parent.parent / "other", "s") as writer:
        for i in range(NUM_SAMPLES):
            writer.write({"__key__": f"k{i}", "jpg": picture(100 + i), "json": {"answer": f"a{i}"}})
    other = shard.parent.parent / "other" / shard.name
    assert other.stat().st_size == shard.stat().st_size
    os.utime(other, ns=(0, 10**18))
    shutil.copy2(other, shard)  # the index and manifest.json stay
    with pytest.raises(CheckpointError, match=r"source 0 \(digits\): contents"):
        make_plan(shard).check_state(state)
    # the index was made again: the next start does not look twice
    assert read_index(shard.with_name(shard.name + INDEX_SUFFIX)).stamp == str(10**18)


def test_a_refused_resume_names_the_files_however_often_it_is_tried(tmp_path):
    """The first try indexes a changed shard anew; what it was is known from the run's own directory."""
    with ShardWriter(tmp_path / "data", "s", max_samples=2) as writer:
        for i in range(NUM_SAMPLES):
            writer.write({"__key__": f"k{i}", "jpg": picture(i), "json": {"answer": f"a{i}"}})
    shards = sorted((tmp_path / "data").glob("*.tar"))
    for shard in shards:
        index_tar(shard)
    run = tmp_path / "run"
    run.mkdir()
    plan = make_plan(shards[0])
    state = plan.state(1)
    write_contents(run, plan.contents)
    change_bytes(shards[1], picture(2), picture(9))
    (tmp_path / "data" / "manifest.json").unlink()
    shards[2].rename(shards[2].with_name("t.tar"))
    for _ in range(2):
        with pytest.raises(CheckpointError) as refused:
            make_plan(shards[0]).check_state(state, read_contents(run))
        for said in ("changed: s-000001.tar", "missing: s-000002.tar", "new: t.tar", "put these files back", "adapter"):
            assert said in str(refused.value)
        assert "restore the values" not in str(refused.value)


def test_a_built_shard_that_has_rotted_is_refused_and_keeps_its_index(built):
    describe_shards([built])
    change_bytes(built, b'"a2"', b'"b2"')
    for attempt in (make_plan, lambda shard: describe_shards([shard]), load_or_scan):
        with pytest.raises(DataError, match=r"sample k2 is not what was written: copy the shard again.*index --force"):
            attempt(built)
    (error,) = update_indexes([built]).errors
    assert "not what was written" in error
    assert {finding.problem for finding in findings(built)} == {"content"}
    assert update_indexes([built], force=True).num_indexed == 1
    assert make_plan(built).num_epoch_samples == NUM_SAMPLES
    assert findings(built) == []


def test_an_index_that_its_manifest_does_not_list_is_found(built):
    change_bytes(built, b'"a2"', b'"b2"', keep_time=True)
    index_tar(built)  # behind the manifest's back
    (finding,) = findings(built)
    assert finding.problem == "index"
    assert "manifest.json beside it lists another index" in finding.message


def findings(shard):
    return [found for found in verify_shard(shard) if isinstance(found, Finding)]


def test_a_copied_data_set_keeps_its_index(shard, monkeypatch, caplog):
    before = make_plan(shard)
    os.utime(shard, ns=(0, 10**18))
    monkeypatch.setattr(open_index, "scan_tar", None)  # would fail if it were indexed again
    with caplog.at_level(logging.INFO, "vlm_dist"):
        assert make_plan(shard).digest == before.digest
    assert "1 shard: another time than when indexed" in caplog.text
    assert "all of their 6 samples" in caplog.text
    monkeypatch.setattr(describe, "recheck", None)
    assert make_plan(shard).digest == before.digest  # the new time was kept


def test_of_many_samples_a_spread_is_compared_and_the_command_for_all_is_named(shard, monkeypatch, caplog):
    monkeypatch.setattr(describe, "_COMPARED_SAMPLES", 2)
    monkeypatch.setattr(describe, "_MIN_COMPARED", 2)
    os.utime(shard, ns=(0, 10**18))
    with caplog.at_level(logging.INFO, "vlm_dist"):
        describe_shards([shard])
    assert (
        f"2 of their 6 samples were compared and agree (to compare all: vlm-dist shards verify {shard})" in caplog.text
    )


def test_a_grown_shard_is_indexed_again(shard):
    with ShardWriter(shard.parent, "s", overwrite=True) as writer:
        for i in range(9):
            writer.write({"__key__": f"k{i}", "json": {"answer": "a"}})
    assert describe_shards([shard]).num_samples == 9


def test_a_worker_refuses_an_index_that_is_not_the_plans(shard):
    digest = describe_shards([shard]).shards[0].index_digest
    assert load_or_scan(shard, expected=digest).digest == digest
    change_bytes(shard, picture(2), picture(9))
    describe_shards([shard])
    with pytest.raises(DataError, match="has changed since this run began"):
        load_or_scan(shard, expected=digest)


def test_indexes_of_read_only_data_are_kept_elsewhere(shard, tmp_path, monkeypatch):
    before = describe_shards([shard]).shards[0].index_digest
    sidecar = shard.with_name(shard.name + INDEX_SUFFIX)
    sidecar.unlink()
    sidecar.mkdir()  # nothing can be written there, even by root
    assert describe_shards([shard], tmp_path / "index").shards[0].index_digest == before
    os.utime(shard, ns=(0, 10**18))
    monkeypatch.setattr(open_index, "scan_tar", None)
    for _ in range(2):
        assert describe_shards([shard], tmp_path / "index").shards[0].index_digest == before


def test_unindexed_shards_that_take_too_long_are_refused_with_the_command(shard, tmp_path, monkeypatch):
    shard.with_name(shard.name + INDEX_SUFFIX).unlink()
    monkeypatch.setattr(describe, "MAX_FIRST_USE_SECONDS", 0.0)
    with pytest.raises(DataError, match=r"vlm-dist shards index .*/data --index-dir .*/index"):
        open_source(SimpleNamespace(type="tar", path=str(shard.parent)), tmp_path / "index")
    monkeypatch.undo()
    assert len(open_source(SimpleNamespace(type="tar", path=str(shard.parent)))) == NUM_SAMPLES


def test_all_damaged_shards_are_named_at_once(shard):
    data = shard.read_bytes()
    paths = [shard.with_name(f"t{i}.tar") for i in range(3)]
    for path, content in zip(paths, (data[:3000], data, b"<html>"), strict=True):
        path.write_bytes(content)
    with pytest.raises(DataError, match=r"t0\.tar: truncated[^\n]*\n[^\n]*t2\.tar: not a tar"):
        describe_shards(paths)
    assert paths[1].with_name("t1.tar" + INDEX_SUFFIX).exists()
