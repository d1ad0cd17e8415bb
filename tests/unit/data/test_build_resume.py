"""A build that was stopped goes on to the same bytes; keys are unique whatever the data calls its samples."""

import itertools
import json
import shutil

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.unit.data.building import build, contents, keys, picture, write_lines
from vlm_dist.data.index.shard_index import INDEX_SUFFIX
from vlm_dist.data.shards.build import BuildSettings, build_shards
from vlm_dist.data.shards.build.bad_records import BadRecord
from vlm_dist.data.shards.build.keys import UniqueKeys, clean_key
from vlm_dist.data.shards.build.order import record_order, shuffle_stream
from vlm_dist.errors import DataError

few = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


class Stopped(BaseException):
    """As Ctrl-C: in the middle of anything."""


def stop_after(num_calls):
    calls = itertools.count(1)

    def on_progress(progress):
        if progress.phase == "writing" and next(calls) > num_calls:
            raise Stopped

    return on_progress


@few
@given(
    ids=st.lists(st.sampled_from(["a", "b", "a_2", "c.d", "bad", "…"]), min_size=1, max_size=30),
    stops=st.lists(st.integers(0, 5), max_size=3),
    max_samples=st.integers(1, 7),
    seed=st.none() | st.integers(0, 3),
    by_key=st.booleans(),
)
def test_resumed_builds_have_the_same_bytes(tmp_path, ids, stops, max_samples, seed, by_key):
    shutil.rmtree(tmp_path)
    lines = ["broken" if one == "bad" else {"id": one, "image": "0.jpg", "n": n} for n, one in enumerate([*ids, "z"])]
    path = write_lines(tmp_path / "in.jsonl", lines)
    (tmp_path / "0.jpg").write_bytes(picture())
    arguments = {
        "type": "jsonl", "path": str(path), "max_samples": max_samples, "shuffle": seed, "skip_bad": True,
        "key_column": "id" if by_key else None, "workers": 2,
    }  # fmt: skip
    build_shards(BuildSettings(out=tmp_path / "whole", **arguments))
    for stop in stops:
        try:
            build_shards(BuildSettings(out=tmp_path / "parts", resume=True, **arguments), stop_after(stop))
        except Stopped:
            assert not list((tmp_path / "parts").glob(".*.tmp"))
    summary = build_shards(BuildSettings(out=tmp_path / "parts", resume=True, **arguments))
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    assert summary.num_samples == len(set(keys(tmp_path / "parts"))) == len(ids) + 1 - ids.count("bad")
    assert sum(summary.skipped.values()) == ids.count("bad")


@given(st.lists(st.text(alphabet="ab_2./ é\n", max_size=6) | st.integers(0, 3), max_size=40), st.integers(0, 40))
def test_keys_are_legal_unique_and_do_not_depend_on_where_it_stopped(values, stop):
    def legal():
        for value in values:
            try:
                yield clean_key(value)
            except BadRecord:
                assert not str(value).strip("._/ \n")

    cleaned = list(legal())
    whole = UniqueKeys()
    given_out = [whole.unique(key) for key in cleaned]
    assert len(set(given_out)) == len(given_out)
    for key in given_out:
        base = key.rsplit("/", 1)[-1]
        assert base and "." not in key and not base.startswith("__") and not key.startswith("/")
    again = UniqueKeys(given_out[:stop])
    assert [again.unique(key) for key in cleaned[stop:]] == given_out[stop:]


@given(st.integers(0, 300), st.integers(0, 5), st.integers(1, 40))
def test_orders_have_every_record_once(num_records, seed, buffer_size):
    assert sorted(record_order(num_records, seed, None).tolist()) == list(range(num_records))
    assert sorted(shuffle_stream(range(num_records), seed, buffer_size)) == list(range(num_records))


def write_many(tmp_path, count=12):
    for number in range(count):
        (tmp_path / f"{number}.jpg").write_bytes(picture(number))
    return write_lines(tmp_path / "in.jsonl", [{"image": f"{n}.jpg", "q": n} for n in range(count)])


def stopped(tmp_path, **more):
    path = write_many(tmp_path)
    arguments = {"type": "jsonl", "path": str(path), "max_samples": 3, **more}
    with pytest.raises(Stopped):
        build_shards(BuildSettings(out=tmp_path / "out", **arguments), stop_after(2))
    assert len(list((tmp_path / "out").glob("*.tar"))) == 3
    return path, arguments


def test_whoever_reads_a_part_of_a_build_is_told(tmp_path, caplog):
    _, arguments = stopped(tmp_path)
    assert len(keys(tmp_path / "out")) == 9
    assert "the build of shard-*.tar was stopped" in caplog.text
    caplog.clear()
    build_shards(BuildSettings(out=tmp_path / "out", resume=True, **arguments))
    assert len(keys(tmp_path / "out")) == 12
    assert "was stopped" not in caplog.text


def test_a_shard_that_was_finished_but_not_noted_is_written_again(tmp_path):
    """As after a kill between the two: the note is of two shards, three are there, the third has no index."""
    path, arguments = stopped(tmp_path)
    note = tmp_path / "out" / "shard-build.json"
    state = json.loads(note.read_text())
    note.write_text(json.dumps({**state, "num_shards": 2, "position": 6}))
    (tmp_path / "out" / f"shard-000002.tar{INDEX_SUFFIX}").unlink()
    (tmp_path / "out" / ".shard-000003.tar.1.tmp").write_bytes(b"half")
    build(path, tmp_path / "whole", max_samples=3)
    build_shards(BuildSettings(out=tmp_path / "out", resume=True, **arguments))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert not (tmp_path / "out" / ".shard-000003.tar.1.tmp").exists()
    again = build_shards(BuildSettings(out=tmp_path / "out", resume=True, **arguments))
    assert (again.num_samples, again.notices) == (12, ("this build is complete already",))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tmp_path, arguments: arguments.update(max_samples=4), "max_samples was 3, is 4"),
        (lambda tmp_path, arguments: write_many(tmp_path, 13), "changed since the build to resume"),
        (lambda tmp_path, arguments: (tmp_path / "out" / "shard-000001.tar").unlink(), "now missing or changed"),
        (lambda tmp_path, arguments: arguments.update(overwrite=True), "leave one out"),
    ],
)
def test_what_cannot_be_resumed_is_refused(tmp_path, change, said):
    _, arguments = stopped(tmp_path)
    change(tmp_path, arguments)
    with pytest.raises(DataError, match=said):
        build_shards(BuildSettings(out=tmp_path / "out", resume=True, **arguments))


def test_a_missing_file_is_brought_and_the_build_goes_on(tmp_path):
    """Bad media stop a build where they are; once the file is whole, it goes on, and so it does with skip_bad."""
    path = write_many(tmp_path)
    (tmp_path / "7.jpg").write_bytes(b"half a picture")
    with pytest.raises(DataError, match=r"jsonl:8: 7\.jpg.*--resume"):
        build(path, tmp_path / "out", max_samples=3)
    shutil.copytree(tmp_path / "out", tmp_path / "other")
    assert build(path, tmp_path / "other", max_samples=3, resume=True, skip_bad=True).num_samples == 11
    (tmp_path / "7.jpg").write_bytes(picture(7))
    assert build(path, tmp_path / "out", max_samples=3, resume=True).num_samples == 12
    build(path, tmp_path / "whole", max_samples=3)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
