"""Secrets in paths of data stay out of all that a run writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests.unit.config.conftest import Project
from vlm_dist.config import load_run
from vlm_dist.config.masking import masked
from vlm_dist.errors import ConfigError

MASKED = {
    "https://me:pw@host/a-{000..009}.tar?X-Amz-Signature=abc&X-Amz-Date=2026&versionId=3": (
        "https://***@host/a-{000..009}.tar?X-Amz-Signature=***&X-Amz-Date=***&versionId=3"
    ),
    "https://a.blob.core.windows.net/c/a.tar?sv=2026&sig=a%2Bb&se=2027": (
        "https://a.blob.core.windows.net/c/a.tar?sv=***&sig=***&se=***"
    ),
    "pipe:curl -s -H 'Authorization: Bearer geheim' 'https://h/{0..3}.tar?token=geheim' | zstd -dc": (
        "pipe:curl -s -H 'Authorization: ***' 'https://h/{0..3}.tar?token=***' | zstd -dc"
    ),
    'pipe:curl --header="X-Api-Key: geheim" -u me:geheim https://h/a.tar': (
        'pipe:curl --header="X-Api-Key: ***" -u *** https://h/a.tar'
    ),
    "pipe:curl --user 'me:ge heim' https://h/a.tar": "pipe:curl --user '***' https://h/a.tar",
    "pipe:AWS_SECRET_ACCESS_KEY=ge/heim aws s3 cp s3://b/{000..009}.tar -": (
        "pipe:AWS_SECRET_ACCESS_KEY=*** aws s3 cp s3://b/{000..009}.tar -"
    ),
    "pipe:get --http-password=geheim --secret-key 'ge heim' --token geheim a.tar": (
        "pipe:get --http-password=*** --secret-key '***' --token *** a.tar"
    ),
    "pipe:sshpass -p geheim ssh me@host cat a.tar": "pipe:sshpass -p *** ssh me@host cat a.tar",
    "pipe:get hf_abcdefghijklmnopqrst a.tar": "pipe:get *** a.tar",
}
KEPT = (
    "data/train-{000..009}.tar",
    "s3://bucket/train/",
    "https://host/get?file=train-{000..009}.tar",
    "pipe:aws s3api get-object --bucket b --key x/{000..009}.tar /dev/stdout",
    'pipe:curl -H "Authorization: Bearer $TOKEN" --proxy-user "$ME" https://h/a.tar?token=$TOKEN',
    "pipe:cat /data/auth-logs/token.tar | sort --key 2 | cut -b 1-5",
)


@pytest.mark.parametrize("text", MASKED)
def test_secrets_are_masked_once_and_for_all(text: str) -> None:
    assert masked(text) == MASKED[text]
    assert masked(masked(text)) == MASKED[text]


@pytest.mark.parametrize("text", KEPT)
def test_what_is_no_secret_stays(text: str) -> None:
    assert masked(text) == text


def test_no_record_of_a_run_has_a_secret_and_the_run_has_it_still(project: Project) -> None:
    url, command = "https://host/a.tar?sig=geheim", "pipe:curl -u me:geheim https://h/{0..3}.tar"
    config = project.load(
        f"data.train=[{{type: tar, path: '{url}'}}, {{type: tar, path: ['{command}']}}]",
        f"data.eval=[{{type: tar, path: '{url}'}}]",
    )
    assert [source.path for source in config.data.train] == [url, [command]]
    path = Path("resolved.yaml")
    config.write(path)
    assert "geheim" not in path.read_text() + str(config.dump())
    assert yaml.safe_load(path.read_text())["data"]["train"][1]["path"] == ["pipe:curl -u *** https://h/{0..3}.tar"]
    with pytest.raises(ConfigError, match=r"data.train\[0\].path: has \*\*\* in the place of a secret"):
        load_run(path)
    again = load_run(path, [f"data.{name}=[{{type: tar, path: '{url}'}}]" for name in ("train", "eval")])
    assert again.data.train[0].path == url


def test_a_secret_is_not_in_what_is_refused(project: Project) -> None:
    with pytest.raises(ConfigError) as error:
        project.load(
            "data.train=[{type: jsonl, path: 'https://me:geheim@host/rows.jsonl', weight: 'https://h?sig=geheim'}]"
        )
    assert "geheim" not in str(error.value) and "https://***@host/rows.jsonl" in str(error.value)
