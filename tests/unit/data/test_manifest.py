"""The manifest's hash is the data set's identity."""

import dataclasses

import pytest

from vlm_dist.data.index.manifest import Manifest, ShardEntry, read_manifest
from vlm_dist.errors import DataError

ENTRY = ShardEntry("a.tar", 3, 100, "digest", ("jpg", "json"), ("answer",))


def test_a_manifest_survives_writing_and_reading(tmp_path):
    manifest = Manifest((ENTRY, dataclasses.replace(ENTRY, name="b.tar")))
    manifest.write(tmp_path)
    assert read_manifest(tmp_path) == manifest
    assert read_manifest(tmp_path).num_samples == 6


@pytest.mark.parametrize("change", [{"name": "b.tar"}, {"num_bytes": 101}, {"index_digest": "other"}])
def test_the_hash_changes_with_every_shard(change):
    assert Manifest((dataclasses.replace(ENTRY, **change),)).hash != Manifest((ENTRY,)).hash


def test_a_missing_manifest_is_none_and_a_damaged_one_an_error(tmp_path):
    assert read_manifest(tmp_path) is None
    (tmp_path / "manifest.json").write_text('{"version": 1, "shards": [{}]}')
    with pytest.raises(DataError, match=r"manifest\.json.*delete it"):
        read_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text('{"version": 99}')
    with pytest.raises(DataError, match="version 99"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text.replace('"num_samples": 3', '"num_samples": "3"'),
        lambda text: text.replace('"index_digest": "digest"', '"index_digest": "dagest"'),
        lambda text: text.replace('"jpg"', "7"),
        lambda text: text.replace('"shards": [', '"shards": [[],'),
        lambda text: "[" * 100_000,
        lambda text: "[]",
    ],
)
def test_any_damage_to_a_manifest_is_one_clear_error(tmp_path, damage):
    Manifest((ENTRY,)).write(tmp_path)
    path = tmp_path / "manifest.json"
    path.write_text(damage(path.read_text()))
    with pytest.raises(DataError, match=r"manifest\.json: damaged manifest .*delete it"):
        read_manifest(tmp_path)
