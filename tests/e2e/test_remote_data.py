"""Training on shards of a web server and of an S3: the losses of local files, also with a cache that is too small."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.storage.servers import faulty_server, s3_server
from tests.tiny_run import TinyRun, make_tiny_run
from vlm_dist.errors import ExitCode

pytestmark = pytest.mark.e2e

STEPS = ("train.max_steps=8", "train.dataloader_num_workers=2", "train.logging_steps=1")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    return make_tiny_run(tmp_path_factory.mktemp("remote"), num_images=64, num_clips=8)


@pytest.fixture(scope="module")
def local_losses(run: TinyRun) -> dict[int, float]:
    ended = run.train(*STEPS, "train.output_dir=local")
    assert ended.exit_code == 0, ended.output
    return run.losses("local")


def sources(run: TinyRun, base: str) -> str:
    """The run's training sources, read from a server of its `data` directory."""
    images = [f"{base}/images/{path.name}" for path in sorted((run.directory / "data/images").glob("*.tar"))]
    return json.dumps(
        [
            {"name": "images", "type": "tar", "path": images, "columns": {"image": "png"}},
            {"name": "clips", "type": "tar", "path": f"{base}/clips/", "columns": {"video": "mp4"}},
        ]
    )


def largest_shard(run: TinyRun) -> int:
    return max(path.stat().st_size for path in (run.directory / "data").rglob("*.tar"))


def test_a_web_server_gives_the_run_that_local_files_give(run: TinyRun, local_losses: dict[int, float]) -> None:
    limit = largest_shard(run) + 100_000
    num_bytes = sum(path.stat().st_size for path in (run.directory / "data").rglob("*.tar"))
    assert num_bytes > 1.5 * limit
    with faulty_server(run.directory / "data") as (url, faults):
        faults.statuses = {"images-000000.tar": [503, 503], "images-000001.tar": [429]}
        ended = run.train(
            *STEPS,
            f"data.train={sources(run, url)}",
            f"data.cache={{dir: cache, max_size: {limit}B, mode: whole}}",
            "train.output_dir=web",
        )
    assert ended.exit_code == 0, ended.output
    assert run.losses("web") == local_losses
    copies = [path for path in (run.directory / "cache").iterdir() if path.suffix == ".tar"]
    assert sum(path.stat().st_size for path in copies) <= limit
    assert (
        max(faults.count(path.name) for path in (run.directory / "data").rglob("*.tar")) > 1
    )  # fetched, gone, fetched


@pytest.fixture
def bucket(run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    import boto3

    with s3_server() as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "someone")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        client = boto3.client("s3")
        client.create_bucket(Bucket="data-bucket")
        for path in (run.directory / "data").rglob("*"):
            if path.is_file():
                client.upload_file(str(path), "data-bucket", str(path.relative_to(run.directory / "data")))
        yield "s3://data-bucket"


def test_an_s3_gives_two_ranks_the_run_that_local_files_give(
    run: TinyRun, local_losses: dict[int, float], bucket: str
) -> None:
    ended = run.train(
        *STEPS,
        "train.gradient_accumulation_steps=1",  # the global batch of one rank
        f"data.train={sources(run, bucket)}",
        "data.cache={dir: cache-s3}",
        "train.output_dir=s3",
        processes=2,
    )
    assert ended.exit_code == 0, ended.output
    assert run.losses("s3") == pytest.approx(local_losses, rel=1e-4)
    assert "hunter2" not in ended.output
    assert len(list((run.directory / "cache-s3").glob("*.tar"))) > 1


def test_a_shard_that_cannot_be_fetched_ends_all_ranks_with_one_message(run: TinyRun) -> None:
    with faulty_server(run.directory / "data") as (url, faults):
        faults.statuses = {"images-000002.tar": [404] * 99}
        cache = "data.cache={dir: cache-gone, mode: whole}"
        ended = run.train(*STEPS, f"data.train={sources(run, url)}", cache, "train.output_dir=gone", processes=2)
    assert ended.exit_code == ExitCode.DATA, ended.output
    assert f"{url}/images/images-000002.tar: the server has no such file (404)" in ended.output
    assert "Traceback" not in ended.output
