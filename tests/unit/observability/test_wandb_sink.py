import json
import logging
import os
import socket
import subprocess
import sys
import textwrap
import threading
import time
import types
from pathlib import Path

import pytest

from vlm_dist.observability import attempt
from vlm_dist.observability.log import MAX_PREDICTIONS
from vlm_dist.observability.wandb_sink import WandbNames, WandbSink, wandb_mode

SECRET = "5ec7e75ec7e75ec7e75ec7e75ec7e75ec7e75ec7"  # the form of an API key

# Three steps of a run, in a process of its own as wandb starts a service and exit hooks.
RUN = """
    import json, sys, time
    from pathlib import Path
    from vlm_dist.observability import attempt, wandb_sink
    from vlm_dist.observability.log import MetricLog
    from vlm_dist.observability.logging_setup import configure_logging
    wandb_sink.INIT_TIMEOUT_SECONDS = 3.0
    configure_logging(0)
    directory, first = Path(sys.argv[1]), int(sys.argv[2])
    log = MetricLog(directory, report_to=["wandb"], run_name="probe", config={"train": {"learning_rate": 0.0123}})
    began = time.monotonic()
    log.start(start_step=first, num_steps=100)
    print("START_SECONDS", time.monotonic() - began)
    (directory / "predictions").mkdir(parents=True, exist_ok=True)
    (directory / "adapter").mkdir(exist_ok=True)
    (directory / "adapter" / "adapter_config.json").write_text("{}")
    for step in range(first + 1, first + 4):
        row = {"source": "digits", "key": "000001", "prediction": f"answer-{step}", "match": True}
        (directory / "predictions" / f"step-{step}.jsonl").write_text((json.dumps(row) + "\\n") * 500)
        log.log_eval(step, {"loss": 0.75, "exact_match/digits": 0.5})
    log.log_adapter(directory / "adapter", ["adapter_config.json", "not-there"], first + 3, ["final"])
    log.close()
"""


@pytest.fixture
def run(tmp_path):
    """Runs training's reporting; gives its output and the seconds that the whole process took."""

    def run(directory, first=0, *arguments, **environ):
        clean = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")}
        clean |= {"HOME": str(tmp_path / "home"), "PYTHONPATH": str(Path(__file__).resolve().parents[3])}
        began = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(RUN), str(directory), str(first), *arguments],
            env=clean | environ, capture_output=True, text=True, timeout=90,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr, time.monotonic() - began

    return run


def recorded(directory):
    """The bytes of all offline recordings."""
    return [path.read_bytes() for path in sorted(directory.glob("wandb/offline-run-*/*.wandb"))]


def test_the_command_line_is_stored_without_its_secrets(run, tmp_path):
    run(tmp_path / "run", 0, "--set", "data.train=[{path: https://me:opensesame@host/a.tar}]", "--set", "train.seed=7")
    (recording,) = recorded(tmp_path / "run")
    stored = recording + b"".join(path.read_bytes() for path in (tmp_path / "run").rglob("wandb-metadata.json"))
    assert b"train.seed=7" in stored
    assert b"opensesame" not in stored


def test_without_an_account_the_run_is_recorded_offline_and_a_resumed_run_continues_it(run, tmp_path):
    directory = tmp_path / "run"
    output, seconds = run(directory)
    assert "recording offline" in output
    assert f"wandb sync {directory}" in output
    assert seconds < 45
    (recording,) = recorded(directory)
    for expected in (b"learning_rate", b"0.0123", b"eval/loss", b"eval/exact_match/digits", b"probe"):
        assert expected in recording
    run_id = json.loads((directory / "wandb_run.json").read_text())["id"]
    run(directory, first=2)
    assert json.loads((directory / "wandb_run.json").read_text())["id"] == run_id
    assert len(recorded(directory)) == 2
    for step, one in ((3, recording), (5, recorded(directory)[1])):
        assert b"probe-adapter" in one and f"step-{step}".encode() in one
    (table,) = [path for path in directory.rglob("*.table.json") if "answer-2" in path.read_text()]
    content = json.loads(table.read_text())
    assert content["columns"] == ["source", "key", "prediction", "match"]
    assert len(content["data"]) == MAX_PREDICTIONS
    assert all(path.name.endswith(run_id) for path in directory.glob("wandb/offline-run-*"))
    run(directory, first=0)
    assert json.loads((directory / "wandb_run.json").read_text())["id"] != run_id


def test_a_server_that_refuses_costs_seconds_and_one_warning_and_the_key_is_in_no_file(run, tmp_path):
    directory = tmp_path / "run"
    output, _ = run(directory, WANDB_API_KEY=SECRET, WANDB_BASE_URL="http://127.0.0.1:9")
    assert output.count("WARNING vlm_dist") == 1
    assert "starting wandb online failed" in output
    assert _start_seconds(output) < 30
    assert b"eval/loss" in recorded(directory)[0]
    written = [path for root in (directory, tmp_path / "home") for path in root.rglob("*") if path.is_file()]
    assert not [path for path in written if SECRET.encode() in path.read_bytes()]


def test_a_server_that_never_answers_delays_neither_start_nor_end_for_long(run, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        silent = []
        threading.Thread(target=_accept_in_silence, args=(server, silent), daemon=True).start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        output, seconds = run(tmp_path / "run", WANDB_API_KEY=SECRET, WANDB_BASE_URL=url)
    assert silent
    assert output.count("WARNING vlm_dist") == 1
    assert _start_seconds(output) < 30
    assert seconds - _start_seconds(output) < 18  # wandb's telemetry alone waited 20 s at the end


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, "offline"),
        ({"WANDB_API_KEY": "x"}, "online"),
        ({"WANDB_API_KEY": "x", "WANDB_MODE": "offline"}, "offline"),
        ({"WANDB_API_KEY": "x", "WANDB_MODE": "dryrun"}, "offline"),
        ({"WANDB_API_KEY": "x", "WANDB_MODE": "disabled"}, "disabled"),
        ({"WANDB_API_KEY": "x", "WANDB_DISABLED": "true"}, "disabled"),
        ({"WANDB_MODE": "online"}, "offline"),
    ],
)
def test_mode_follows_the_environment_and_is_never_online_without_a_key(environ, expected, tmp_path):
    assert wandb_mode(environ | {"HOME": str(tmp_path)}) == expected


def test_a_key_in_netrc_counts_for_the_server_it_belongs_to(tmp_path):
    (tmp_path / ".netrc").write_text("machine wandb.example login user password x\n")
    assert wandb_mode({"HOME": str(tmp_path)}) == "offline"
    assert wandb_mode({"HOME": str(tmp_path), "WANDB_BASE_URL": "https://wandb.example"}) == "online"
    settings = tmp_path / ".config" / "wandb" / "settings"  # what `wandb login --host` writes
    settings.parent.mkdir(parents=True)
    settings.write_text("[default]\nbase_url = https://wandb.example\n")
    assert wandb_mode({"HOME": str(tmp_path)}) == "online"


class FailingRun:
    """A wandb run that breaks where it is told to."""

    id, url = "abc", "https://wandb.example/abc"

    def __init__(self, breaks, directory):
        self.breaks, self.calls, self.dir = breaks, [], str(directory / "files")

    def log(self, figures, step):
        self.calls.append("log")
        if self.breaks == "log":
            raise RuntimeError("the service died")

    def finish(self, exit_code):
        self.calls.append("finish")
        if self.breaks == "finish":
            raise TimeoutError("too slow")


@pytest.mark.parametrize("breaks", ["init", "log", "finish"])
def test_whatever_wandb_raises_becomes_one_warning_and_then_silence(breaks, tmp_path, monkeypatch, caplog):
    run = FailingRun(breaks, tmp_path)

    def init(**arguments):
        if breaks == "init":
            raise ValueError("unusable")
        return run

    fake = types.SimpleNamespace(init=init, Settings=type("Settings", (), {"model_fields": {}}))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setenv("WANDB_MODE", "offline")
    sink = WandbSink(tmp_path, names=WandbNames(), run_name=None, config={})
    with caplog.at_level(logging.WARNING):
        sink.start(0)
        for step in range(3):
            sink.write("train", step, {"loss": 1.0})
        sink.close(0)
        sink.close(0)
    assert len([record for record in caplog.records if record.name == attempt.__name__]) == 1
    assert run.calls == {"init": [], "log": ["log"], "finish": ["log"] * 3 + ["finish"]}[breaks]


def test_a_damaged_run_id_begins_a_new_run(tmp_path, caplog):
    (tmp_path / "wandb_run.json").write_text("{")
    sink = WandbSink(tmp_path, names=WandbNames(), run_name=None, config={})
    with caplog.at_level(logging.WARNING):
        assert sink._read_run_id() is None
    assert "wandb_run.json" in caplog.text


def _start_seconds(output):
    return float(next(line.split()[1] for line in output.splitlines() if line.startswith("START_SECONDS")))


def _accept_in_silence(server, connections):
    while True:
        try:
            connections.append(server.accept())
        except OSError:
            return
