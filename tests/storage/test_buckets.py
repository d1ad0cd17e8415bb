"""Shards on an S3 (of moto) and on a Google storage (its API, imitated)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.storage.conftest import NUM_SHARDS, ROWS, Opening, picture, read_all
from tests.storage.servers import google_storage, s3_server
from vlm_dist.data.storage.remote import retries, store
from vlm_dist.errors import DataError


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with s3_server() as url:
        yield url


@pytest.fixture
def s3(endpoint: str, shards: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A client of an S3 whose bucket `data-bucket` has the shards under train/."""
    import boto3

    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "someone")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setattr(store, "_stores", {})
    client = boto3.client("s3")
    client.create_bucket(Bucket="data-bucket")
    for file in shards.iterdir():
        client.upload_file(str(file), "data-bucket", f"train/{file.name}")
    client.put_object(Bucket="data-bucket", Key="train/deeper/other.tar", Body=b"x")
    yield client
    for listed in client.list_objects_v2(Bucket="data-bucket")["Contents"]:
        client.delete_object(Bucket="data-bucket", Key=listed["Key"])


@pytest.mark.parametrize(
    ("path", "mode"),
    [
        ("s3://data-bucket/train", "auto"),
        ("s3://data-bucket/train/", "whole"),
        ("s3://data-bucket/train/train-*.tar", "range"),
        ("s3://data-bucket/train/train-{000000..000005}.tar", "auto"),
    ],
)
def test_s3_gives_what_the_local_files_have(s3: Any, shards: Path, opening: Opening, path: str, mode: str) -> None:
    local, remote = opening(str(shards)), opening(path, mode=mode)
    assert remote.manifest_hash == local.manifest_hash
    assert read_all(remote) == read_all(local)


def test_a_name_that_cannot_be_is_refused_at_once(opening: Opening) -> None:
    with pytest.raises(DataError, match=r"s3://data-bucket/a\.tar: s3:// takes no user and password") as refused:
        opening("s3://AKIA:opensesame@data-bucket/a.tar")
    assert "opensesame" not in str(refused.value)
    with pytest.raises(DataError, match="the store answers ParamValidationError"):  # and does not ask seven times
        opening("s3://Data Bucket!/a.tar")


def test_s3_without_manifest_or_indexes(s3: Any, shards: Path, opening: Opening) -> None:
    for file in shards.iterdir():
        if not file.name.endswith(".tar"):
            s3.delete_object(Bucket="data-bucket", Key=f"train/{file.name}")
    source = opening("s3://data-bucket/train", mode="whole")
    assert source.manifest_hash == opening(str(shards)).manifest_hash
    changed = (shards / "train-000002.tar").read_bytes().replace(b'"q16"', b'"Q16"')
    s3.put_object(Bucket="data-bucket", Key="train/train-000002.tar", Body=changed)
    assert opening("s3://data-bucket/train", mode="whole").manifest_hash != source.manifest_hash


def test_s3_that_has_changed_or_is_gone(
    s3: Any, shards: Path, opening: Opening, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retries, "ATTEMPTS", 3)
    source = opening("s3://data-bucket/train", mode="whole")
    data = (shards / "train-000000.tar").read_bytes()
    s3.put_object(Bucket="data-bucket", Key="train/train-000000.tar", Body=data.replace(picture(3)[:600], b"x" * 600))
    with pytest.raises(DataError, match=r"s3://data-bucket/train/train-000000.tar: the shard has changed"):
        source.read(3)
    s3.put_object(Bucket="data-bucket", Key="train/train-000000.tar", Body=data[:-1024])
    with pytest.raises(DataError, match=r"has changed since it was indexed \(size"):
        source.read(3)
    s3.delete_object(Bucket="data-bucket", Key="train/train-000001.tar")
    with pytest.raises(DataError, match=r"train-000001.tar: there is no such object"):
        source.read(8)
    for path, message in (
        ("s3://data-bucket/nothing/", r"no \.tar objects found for s3://data-bucket/nothing/"),
        ("s3://no-such-bucket/train/", r"no \.tar objects found|no-such-bucket"),
        ("s3://data-bucket/train/missing.tar", r"missing.tar: the server has no such file"),
    ):
        with pytest.raises(DataError, match=message) as raised:
            opening(path)
        assert "hunter2" not in str(raised.value)


@pytest.mark.parametrize("mode", ["auto", "whole", "range"])
def test_google_storage_gives_what_the_local_files_have(
    shards: Path, opening: Opening, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with google_storage(shards.parent) as (url, _):
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", url)
        monkeypatch.setenv("FSSPEC_GS_TOKEN", "anon")
        monkeypatch.setattr(store, "_stores", {})
        local = opening(str(shards))
        for path in ("gs://data/", f"gs://data/train-{{000000..{NUM_SHARDS - 1:06d}}}.tar"):
            remote = opening(path, mode=mode)
            assert remote.shard_sizes == [ROWS] * NUM_SHARDS
            assert remote.manifest_hash == local.manifest_hash
        assert read_all(remote) == read_all(local)
        with pytest.raises(DataError, match=r"gs://data/missing.tar: the server has no such file"):
            opening("gs://data/missing.tar")
