"""`events.jsonl` and `environment.json`: whole lines, no secrets, and no harm where the disk fails."""

from __future__ import annotations

import json
import threading
from types import SimpleNamespace

import pytest

from vlm_dist.build.life import RunLife, grouped
from vlm_dist.distributed.signals import AskedToStop
from vlm_dist.errors import DataError
from vlm_dist.observability.events import ENVIRONMENT_FILE, EVENTS_FILE, EventLog, add_life, read_lives
from vlm_dist.observability.surroundings import command_line, commit_of, process_facts


def events_of(directory):
    return [json.loads(line) for line in (directory / EVENTS_FILE).read_text().splitlines()]


def ranks(is_main=True, signal=None):
    """The only rank of a run."""
    return SimpleNamespace(
        is_main=is_main, world_size=1, stop=SimpleNamespace(signal=signal), gather_objects=lambda value: [value]
    )


def test_events_are_whole_lines_from_any_thread(tmp_path):
    log = EventLog(tmp_path / "run")
    threads = [
        threading.Thread(target=lambda: [log.write("checkpoint", 1, name="x" * 50) for _ in range(50)]) for _ in "1234"
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(events_of(tmp_path / "run")) == 200


def test_a_disk_that_fails_is_told_of_once_and_ends_nothing(tmp_path, caplog):
    (tmp_path / "run").write_text("a file where the directory should be")
    log = EventLog(tmp_path / "run")
    log.write("started", 0)
    log.write("done", 1)
    assert add_life(tmp_path / "run", {"host": "here"}) == 1
    assert [message.count("cannot be written") for message in caplog.messages] == [1, 1]


def test_each_start_is_added_and_a_damaged_file_begins_anew(tmp_path):
    assert [add_life(tmp_path, {"host": name}) for name in ("a", "b")] == [1, 2]
    assert [life["host"] for life in read_lives(tmp_path / ENVIRONMENT_FILE)] == ["a", "b"]
    (tmp_path / ENVIRONMENT_FILE).write_text('{"lives": [{"life": "x"}]}')
    assert add_life(tmp_path, {}) == 2
    (tmp_path / ENVIRONMENT_FILE).write_text("{")
    assert add_life(tmp_path, {"host": "c"}) == 1


@pytest.mark.parametrize(
    ("error", "event", "told"),
    [
        (DataError("no shard at https://me:pass@host/a.tar?X-Amz-Signature=abc"), "failed", {"exit_code": 3}),
        (RuntimeError("bug"), "failed", {"error": "RuntimeError", "exit_code": 1}),
        (AskedToStop("SIGTERM"), "stopped", {"reason": "asked at start-up"}),
        (KeyboardInterrupt(), "stopped", {"reason": "at once"}),
    ],
)
def test_a_run_that_does_not_end_well_says_how(tmp_path, error, event, told):
    with pytest.raises(type(error)), RunLife(tmp_path, ranks()) as life:
        life.begin(3, num_steps=9, resumed_from="checkpoint-3", started_from=None)
        raise error
    first, last = events_of(tmp_path)
    assert first["event"] == "started" and first["resumed_from"] == "checkpoint-3" and "started_from" not in first
    assert last["event"] == event and told.items() <= last.items()
    assert "pass" not in json.dumps(last) and "abc" not in json.dumps(last)


def test_a_run_that_is_refused_writes_nothing_and_neither_does_another_rank(tmp_path):
    with pytest.raises(DataError), RunLife(tmp_path, ranks()):
        raise DataError("refused before it began")
    with RunLife(tmp_path, ranks(is_main=False)) as life:
        life.begin(0)
        life.done(1, "adapter")
    assert list(tmp_path.iterdir()) == []


def test_an_end_is_told_once(tmp_path):
    with pytest.raises(RuntimeError), RunLife(tmp_path, ranks()) as life:
        life.begin(0)
        life.done(5, tmp_path / "adapter")
        raise RuntimeError("while the parts were taken apart")
    assert [one["event"] for one in events_of(tmp_path)] == ["started", "done"]


def test_facts_of_the_process_have_no_secrets(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    facts = process_facts()
    assert facts["versions"]["torch"] and facts["job"]["SLURM_JOB_ID"] == "17" and facts["pid"]
    command = command_line(
        [
            "python",
            "-m",
            "vlm_dist.train",
            "--set",
            "data.cache.token=hunter2",
            "--set",
            "a=https://u:pw@h/x?sig=secret",
        ]
    )
    assert "hunter2" not in command and "pw" not in command and "secret" not in command
    assert command.startswith("python -m vlm_dist.train --set data.cache.token=***")


def test_the_commit_is_read_from_files(tmp_path):
    assert commit_of(tmp_path) is None
    git = tmp_path / ".git"
    git.mkdir()
    (git / "HEAD").write_text("ref: refs/heads/main\n")
    (git / "packed-refs").write_text("# pack-refs\nabc123 refs/heads/main\n")
    assert commit_of(tmp_path) == "abc123"
    (git / "refs" / "heads").mkdir(parents=True)
    (git / "refs" / "heads" / "main").write_text("def456\n")
    assert commit_of(tmp_path) == "def456"


def test_equal_ranks_are_told_once():
    facts = [{"host": "a", "device": "H100"}] * 2 + [{"host": "b", "device": "H100"}]
    assert grouped(facts) == [
        {"host": "a", "device": "H100", "ranks": [0, 1]},
        {"host": "b", "device": "H100", "ranks": [2]},
    ]
