"""Shards on web servers, good ones and bad ones."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest

from tests.storage.conftest import NUM_SHARDS, ROWS, Opening, picture, read_all
from tests.storage.servers import NGINX, Faults, nginx
from vlm_dist.cli.main import main
from vlm_dist.data.storage.remote import retries
from vlm_dist.errors import DataError

Server = tuple[str, Faults]
ALL = "train-{000000..000005}.tar"


def cached(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "cache").glob("*.tar*"))


@pytest.mark.skipif(NGINX is None, reason="needs nginx (.ci/run installs it)")
@pytest.mark.parametrize("mode", ["auto", "whole", "range"])
@pytest.mark.parametrize("place", ["", "/whole"])
def test_nginx_gives_what_the_local_files_have(
    shards: Path, tmp_path: Path, opening: Opening, mode: str, place: str
) -> None:
    local = opening(str(shards))
    with nginx(shards, tmp_path / "nginx") as url:
        remote = opening(f"{url}{place}/{ALL}", mode=mode)
        assert remote.manifest_hash == local.manifest_hash
        assert remote.shard_sizes == local.shard_sizes == [ROWS] * NUM_SHARDS
        rows = np.arange(len(local))
        assert (remote.facts(rows) == local.facts(rows)).all()
        if mode == "range" and place == "/whole":
            with pytest.raises(DataError, match=r"does not honour ranges; set data.cache.mode to auto or whole"):
                remote.read(0)
            return
        assert read_all(remote) == read_all(local)
        assert str(remote.origin(9)) == "x/train-000001.tar:s0009"
        assert len(cached(tmp_path)) == (0 if mode == "range" else NUM_SHARDS)


@pytest.mark.parametrize("path", ["/", "", "/" + ALL, ["/train-000000.tar", "/train-{000001..000005}.tar"]])
def test_shards_are_named_or_found_by_the_manifest(server: Server, opening: Opening, path: str | list[str]) -> None:
    url, faults = server
    source = opening([url + one for one in path] if isinstance(path, list) else url + path)
    assert len(source) == NUM_SHARDS * ROWS
    assert {name for name, _ in faults.requests} == {"manifest.json"}  # one request tells it all
    assert source.read(13).fields == {"jpg": picture(13), "image": picture(13), "question": "q13"}


def test_without_manifest_and_indexes_shards_are_fetched_and_indexed_once(
    server: Server, shards: Path, tmp_path: Path, opening: Opening
) -> None:
    url, faults = server
    expected = opening(str(shards))
    for file in [*shards.glob("*.arrow"), shards / "manifest.json"]:
        file.unlink()
    first = opening(f"{url}/{ALL}", mode="whole")
    assert first.manifest_hash == expected.manifest_hash
    assert read_all(first) == read_all(expected)
    assert set(faults.whole().values()) == {1, *faults.whole().values()} and faults.whole()["train-000003.tar"] == 1
    asked = len(faults.requests)
    again = opening(f"{url}/{ALL}")
    assert again.manifest_hash == expected.manifest_hash
    assert all(wanted == "bytes=0-0" or name == "manifest.json" for name, wanted in faults.requests[asked:])
    with pytest.raises(DataError, match=r"names no \.tar file"):
        opening(url)


def test_a_damaged_index_that_nobody_else_has_is_made_again_by_the_next_start(
    server: Server, shards: Path, tmp_path: Path, opening: Opening
) -> None:
    for file in [*shards.glob("*.arrow"), shards / "manifest.json"]:
        file.unlink()
    good = read_all(opening(f"{server[0]}/{ALL}"))
    (kept,) = (tmp_path / "index").rglob("train-000003.tar*")
    data = kept.read_bytes()
    place = data.index(b"s0024s0025")  # the keys: what the index says of itself is as it was
    kept.write_bytes(data[:place] + b"x" + data[place + 1 :])
    source = opening(f"{server[0]}/{ALL}")
    with pytest.raises(DataError, match=r"the index of .*train-000003\.tar is gone; start the run again"):
        source.read(3 * ROWS)
    assert read_all(opening(f"{server[0]}/{ALL}")) == good


def test_big_shards_without_index_are_refused_with_the_command(
    server: Server,
    shards: Path,
    opening: Opening,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("vlm_dist.data.storage.remote.shards.MAX_FIRST_USE_BYTES", 10_000)
    for file in [*shards.glob("*.arrow"), shards / "manifest.json"]:
        file.unlink()
    with pytest.raises(DataError, match=r"6 shards .* have no index(.|\n)*vlm-dist shards index"):
        opening(f"{server[0]}/{ALL}")
    main(["shards", "index", f"{server[0]}/{ALL}", "--index-dir", str(tmp_path / "index")])
    assert "6 shards indexed" in capsys.readouterr().out
    assert len(opening(f"{server[0]}/{ALL}")) == NUM_SHARDS * ROWS


def test_failures_that_pass_are_waited_for(server: Server, opening: Opening) -> None:
    url, faults = server
    faults.statuses = {"manifest.json": [503, 429], "train-000000.tar": [500, 503, 502], "train-000001.tar": [429] * 5}
    faults.cuts = {"train-000002.tar": [100_000, 60_000, 10_000], "train-000003.tar": [0] * 5}
    source = opening(f"{url}/{ALL}", mode="whole")
    assert [source.read(row).fields["question"] for row in (0, 8, 16, 24)] == ["q0", "q8", "q16", "q24"]
    assert source.read(23).fields["jpg"] == picture(23)
    going_on = [wanted for name, wanted in faults.requests if name == "train-000002.tar" and wanted]
    assert "bytes=100000-" in going_on  # the rest alone is fetched again


@pytest.mark.parametrize("honours_ranges", [True, False])
def test_answers_that_are_cut_are_never_taken_for_the_whole(
    server: Server, opening: Opening, honours_ranges: bool
) -> None:
    url, faults = server
    faults.honours_ranges = honours_ranges
    source = opening(f"{url}/{ALL}", mode="whole")
    faults.cuts = {"train-000000.tar": [150_000, 20]}
    assert source.read(7).fields["jpg"] == picture(7)
    assert source.read(0).fields["jpg"] == picture(0)


def test_a_server_that_stays_down_is_an_error(
    server: Server, opening: Opening, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, faults = server
    monkeypatch.setattr(retries, "ATTEMPTS", 3)
    source = opening(f"{url}/{ALL}")
    faults.statuses = {"train-000000.tar": [503] * 99}
    with pytest.raises(DataError, match=r"/train-000000.tar: given up after 3 attempts: the server answers 503"):
        source.read(0)
    assert cached(tmp_path) == []
    with pytest.raises(DataError, match="given up after 3 attempts"):
        opening("http://127.0.0.1:9/train-000000.tar")


@pytest.mark.parametrize(
    ("status", "message"), [(403, "refuses access"), (404, "has no such file"), (400, "answers 400")]
)
def test_failures_that_stay_are_told_at_once(server: Server, opening: Opening, status: int, message: str) -> None:
    url, faults = server
    source = opening(f"{url}/{ALL}", mode="whole")
    faults.statuses = {"train-000002.tar": [status] * 9}
    with pytest.raises(DataError, match=message):
        source.read(16)
    assert faults.count("train-000002.tar") == 1


def test_a_missing_shard_is_named_when_the_source_is_opened(server: Server, opening: Opening) -> None:
    with pytest.raises(DataError, match=r"train-000006.tar: the server has no such file"):
        opening(f"{server[0]}/train-{{000000..000006}}.tar")


@pytest.mark.parametrize("mode", ["whole", "auto", "range"])
def test_a_shard_that_has_changed_is_noticed(server: Server, shards: Path, opening: Opening, mode: str) -> None:
    url, _ = server
    source = opening(f"{url}/{ALL}", mode=mode)
    source.facts(np.array([0, 8]))
    shard = shards / "train-000001.tar"
    data = shard.read_bytes()
    shard.write_bytes(data.replace(b"s0008", b"s9998").replace(picture(8)[:600], b"x" * 600))
    with pytest.raises(DataError, match=r"train-000001.tar.*(has changed since it was indexed|not the one that was)"):
        source.read(8)
    shard.write_bytes(data[:-20_000])
    with pytest.raises(DataError, match=r"train-000001.tar.*(has changed|not the one that was)"):
        source.read(8)
        source.read(15)


def test_what_was_changed_and_indexed_again_is_another_data_set(server: Server, shards: Path, opening: Opening) -> None:
    url, _ = server
    for file in [*shards.glob("*.arrow"), shards / "manifest.json"]:
        file.unlink()
    before = opening(f"{url}/{ALL}").manifest_hash
    shard = shards / "train-000001.tar"
    shard.write_bytes(shard.read_bytes().replace(b'"q8"', b'"Q8"'))
    assert opening(f"{url}/{ALL}").manifest_hash != before


def test_secrets_are_not_shown_and_signatures_do_not_matter(
    server: Server, tmp_path: Path, opening: Opening, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.DEBUG, logger="vlm_dist")
    monkeypatch.setattr(retries, "ATTEMPTS", 2)
    url, faults = server
    signed = url.replace("http://", "http://user:hunter2@") + "/train-000000.tar?X-Amz-Signature="
    source = opening(signed + "topsecret", mode="whole")
    assert source.read(1).fields["question"] == "q1"
    faults.statuses = {"train-000000.tar": [503] * 9}
    assert opening(signed + "another", mode="whole").read(1).fields["question"] == "q1"  # from the cache
    (tmp_path / "cache" / cached(tmp_path)[0]).unlink()
    with pytest.raises(DataError) as raised:
        opening(signed + "topsecret", mode="whole").read(0)
    told = caplog.text + str(raised.value) + source.origin(0).shard + json.dumps(cached(tmp_path))
    assert "asking again" in told
    assert not any(secret in told for secret in ("hunter2", "topsecret", "Signature"))


def test_missing_packages_are_named(opening: Opening, monkeypatch: pytest.MonkeyPatch) -> None:
    from vlm_dist.data.storage.remote import store

    def missing(extra: str) -> None:
        raise ImportError("no", name="s3fs")

    monkeypatch.setattr(store, "_make_store", missing)
    monkeypatch.setattr(store, "_stores", {})
    with pytest.raises(DataError, match=r"s3:// needs a package that is not installed \(s3fs\): pip install"):
        opening("s3://bucket/x.tar")
    with pytest.raises(DataError, match="ftp:// is not known"):
        opening("ftp://host/x.tar")
