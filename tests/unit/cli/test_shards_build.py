"""`vlm-dist shards build` as a person runs it: stopped in the middle, resumed, and wrong options."""

import argparse
import signal
import subprocess
import sys
import threading
import time

import pytest
import yaml

from tests.serving import QuietHandler, serving
from tests.unit.data.building import contents, picture, write_lines
from vlm_dist.cli import main
from vlm_dist.cli.shards_build import parse_size


class Server(QuietHandler):
    go_on = threading.Event()

    def get(self):
        if self.path == "/7.jpg":
            self.go_on.wait(20)
        self.answer(picture(int(self.path[1:-4])))


@pytest.fixture
def server():
    with serving(Server) as place:
        yield f"http://{place}"


def test_stopped_and_resumed(tmp_path, server, capsys):
    records = [{"image": f"{server}/{n}.jpg", "question": "q", "answer": str(n)} for n in range(12)]
    path = write_lines(tmp_path / "in.jsonl", records)
    command = ["shards", "build", "--path", str(path), "--max-samples", "3", "--workers", "1", "--out"]
    process = subprocess.Popen(
        [sys.executable, "-m", "vlm_dist.cli", *command, str(tmp_path / "out")], stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    note = tmp_path / "out" / "shard-build.json"
    while not (note.exists() and '"num_shards": 2' in note.read_text()):  # the eighth picture waits
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    Server.go_on.set()
    _, told = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "go on with the same command and --resume" in told and "Traceback" not in told
    assert len(list((tmp_path / "out").glob("*.tar"))) == 2
    assert not list((tmp_path / "out").glob(".*.tmp"))
    assert main([*command, str(tmp_path / "out"), "--resume"]) == 0
    assert main([*command, str(tmp_path / "whole")]) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    printed = capsys.readouterr().out
    assert "12 samples in 4 shards" in printed
    config = yaml.safe_load(printed[printed.rindex("data: #") :])
    assert config == {"data": {"train": [{"type": "tar", "path": str(tmp_path / "whole")}]}}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--from", "jsonl"], "give the records"),
        (["--path", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--path", "in.jsonl", "--columns", "question"], "--columns question: expected NEW=OWN"),
        (["--path", "in.jsonl"], "1 of 1 records cannot be used"),
    ],
)
def test_what_is_wrong_ends_with_code_3(tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "in.jsonl", [{"image": "missing.jpg", "question": "q"}])
    assert main(["shards", "build", "--out", "out", *arguments]) == 3
    assert said in capsys.readouterr().err


def test_sizes():
    assert [parse_size(text) for text in ("512MB", "1.5GiB", "7", "2k")] == [512_000_000, 1_610_612_736, 7, 2000]
    with pytest.raises(argparse.ArgumentTypeError, match="no size"):
        parse_size("big")
