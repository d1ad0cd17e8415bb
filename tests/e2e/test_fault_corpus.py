"""A run with 2% of damaged samples: it completes, loses nothing else, and learns what it would learn without them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.e2e.faulty_decoder import CRASHES, HANGS
from tests.tiny_run import Finished, TinyRun, make_tiny_run
from tests.unit.data.faults import HTML, Members, clip, picture, sample_faults, sound, text, write_tar
from vlm_dist.data.quarantine import read_quarantine
from vlm_dist.distributed.group import free_port
from vlm_dist.errors import ExitCode

pytestmark = pytest.mark.e2e

NUM_PICTURES, NUM_CLIPS = 540, 20
#: Of the corpus, those whose pictures are called png; the decoder's two, which only this run's decoder trips over.
CHOSEN = (
    "png-cut-0_3",
    "png-empty",
    "png-rotten",
    "bomb",
    "json-cut",
    "json-not-utf8",
    "mp4-cut-50",
    "mp4-first-cut-25",
)
EXPECTED = {
    "png-cut-0_3": "decode",
    "png-empty": "decode",
    "png-rotten": "decode",
    "html": "decode",
    "bomb": "decode",
    "json-cut": "bad_sample",
    "json-not-utf8": "bad_sample",
    "mp4-cut-50": "decode",
    "mp4-first-cut-25": "decode",
    "crashes": "crash",
    "hangs": "timeout",
}


@dataclass(frozen=True)
class FaultyRun:
    """A tiny run on the corpus."""

    run: TinyRun
    keys: frozenset[str]

    def train(self, name: str, *overrides: str, left_out: Path | None = None, processes: int = 0) -> Finished:
        """Train once over all samples, with the decoder that crashes and hangs."""
        environment = self.run.environment() | {"FAULTY_LEDGER": str(self.run.directory / f"{name}-ledger")}
        if left_out is not None:
            environment["FAULTY_NULL"] = str(left_out)
        launcher = [sys.executable]
        if processes:
            launcher = [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", str(processes)]
            launcher += ["--master_port", str(free_port())]
        command = [*launcher, "-m", "tests.e2e.faulty_decoder", "--config", str(self.run.config)]
        for override in (f"train.output_dir={name}", *overrides):
            command += ["--set", override]
        ended = subprocess.run(
            command, cwd=self.run.directory, env=environment, capture_output=True, text=True, timeout=240
        )
        return Finished(ended.returncode, ended.stdout, ended.stderr)

    def trained_on(self, name: str) -> list[str]:
        """Keys of the samples that the ranks trained on."""
        ledgers = sorted(self.run.directory.glob(f"{name}-ledger-*"))
        return [key for ledger in ledgers for key in ledger.read_text().split()]


def with_column(members: Members, kind: str) -> Members:
    """Say that a sample has no media of the other kind, where its JSON can be read."""
    try:
        record = json.loads(members["json"])
    except ValueError:
        return members
    return {**members, "json": json.dumps({**record, kind: None}).encode()}


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> FaultyRun:
    directory = tmp_path_factory.mktemp("faults")
    run = make_tiny_run(directory, num_images=1, num_clips=1)
    corpus = {fault.name: fault.members for fault in sample_faults() if fault.name in CHOSEN}
    pictures = list(sound(NUM_PICTURES))
    bad = {name: members for name, members in corpus.items() if "png" in members}
    bad["html"] = {"png": HTML, "json": text()}
    bad["crashes"] = {"png": picture("PNG") + CRASHES, "json": text()}
    bad["hangs"] = {"png": picture("PNG") + HANGS, "json": text()}
    for number, item in enumerate(bad.items()):
        pictures.insert(50 * number + 7, item)
    clips = [(f"clip{number:03d}", {"mp4": clip(8), "json": text(answer=str(number))}) for number in range(NUM_CLIPS)]
    clips[4:4] = [(name, members) for name, members in corpus.items() if "mp4" in members]
    for name, samples, missing in (("pictures", pictures, "video"), ("moving", clips, "image")):
        for start in range(0, len(samples), 150):
            rows = [(key, with_column(members, missing)) for key, members in samples[start : start + 150]]
            write_tar(directory / "data" / name / f"{start:04d}.tar", rows)
    keys = {key for key, _ in [*pictures, *clips]}
    assert len(EXPECTED) / len(keys) == pytest.approx(0.02, abs=0.001)
    return FaultyRun(run, frozenset(keys))


SOURCES = json.dumps(
    [
        {"name": "pictures", "type": "tar", "path": "data/pictures", "columns": {"image": "png"}},
        {"name": "moving", "type": "tar", "path": "data/moving", "columns": {"video": "mp4"}},
    ]
)
SETTINGS = (
    f"data.train={SOURCES}",
    "data.eval=[]",
    "train.max_steps=-1",
    "train.num_train_epochs=1",
    "train.per_device_train_batch_size=8",
    "train.gradient_accumulation_steps=2",
    "train.group_by_length=false",
    "train.gradient_checkpointing=false",
    "train.dataloader_num_workers=2",
    "data.sample_timeout_seconds=3",
)


def test_it_completes_and_learns_what_it_would_without_them(faulty: FaultyRun) -> None:
    directory = faulty.run.directory
    ended = faulty.train("damaged", *SETTINGS)
    assert ended.exit_code == 0, ended.output[-3000:]

    # the ledger: every sample of the epoch is trained on or in quarantine, exactly once
    records = read_quarantine(directory / "damaged")
    assert {record["key"]: record["class"] for record in records} == EXPECTED
    seen = Counter(faulty.trained_on("damaged")) + Counter(record["key"] for record in records)
    assert seen == Counter(faulty.keys)
    messages = {record["key"]: record["message"] for record in records}
    assert messages["crashes"] == "its decoding ended the worker process twice (died of signal 11)"
    assert messages["hangs"] == "its decoding took longer than 3 s twice"
    for record in records:  # the offset leads to the sample's first member
        shard = (directory / "data" / record["source"] / record["shard"]).read_bytes()
        assert shard[record["offset"] :].startswith(record["key"].encode() + b".")
        assert (record["rank"], record["purpose"]) == (0, "train")
    counted = Counter()
    for line in faulty.run.metrics("damaged"):
        counted += Counter({name: line[f"null_slots/{name}"] for name in set(EXPECTED.values())})
    assert counted == Counter(EXPECTED.values())

    # the same plan with these slots left out by hand, none of the damage ever being read
    by_hand = directory / "left_out.json"
    by_hand.write_text(json.dumps(sorted(EXPECTED)))
    ended = faulty.train("by-hand", *SETTINGS, left_out=by_hand)
    assert ended.exit_code == 0, ended.output[-3000:]
    assert sorted(faulty.trained_on("by-hand")) == sorted(faulty.trained_on("damaged"))
    losses = faulty.run.losses("damaged")
    assert len(losses) == -(-len(faulty.keys) // 16)
    assert losses == faulty.run.losses("by-hand")  # bit for bit


def test_more_than_allowed_ends_all_ranks_with_one_message(faulty: FaultyRun) -> None:
    """Two ranks: the damaged samples of both are counted, and both leave at the same step, after a checkpoint."""
    ended = faulty.train("strict", *SETTINGS, "data.max_bad_share=0.0025", processes=2)
    assert ended.exit_code == ExitCode.DATA, ended.output[-3000:]
    assert "Traceback" not in ended.output
    message = ended.stderr[ended.stderr.index("error: ") :]
    assert "samples of all ranks cannot be used" in message
    assert "data.max_bad_share 0.0025" in message and "verify --decode" in message
    records = read_quarantine(faulty.run.directory / "strict")
    last = max(record["step"] for record in records)
    assert sum(record["step"] < last for record in records) <= 2 < len(records)  # 0.0025 x 1000 are 2
    shown = [record for record in records if f"{record['source']}/{record['shard']}:{record['key']} (" in message]
    assert len(shown) == 3
    assert [path.name for path in (faulty.run.directory / "strict").glob("checkpoint-*")] == [f"checkpoint-{last}"]
    listed = subprocess.run(
        [sys.executable, "-m", "vlm_dist.cli", "quarantine", "strict"],
        cwd=faulty.run.directory,
        env={**os.environ, **faulty.run.environment()},
        capture_output=True,
        text=True,
        check=True,
    )
    assert all(record["key"] in listed.stdout for record in records)
