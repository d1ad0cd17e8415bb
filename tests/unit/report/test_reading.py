"""Whatever state a run is in, its directory can be read, and what is not known is not made up."""

from __future__ import annotations

import json
import os
import socket

import psutil
import pytest

from tests.unit.report.runs import BEGAN, at, make_run, started, train_line, write_lines
from vlm_dist.errors import DataError
from vlm_dist.report.happenings import checkpoint_rows, happenings_of
from vlm_dist.report.run_files import read_run, read_runs
from vlm_dist.report.state import num_steps, state_of, steps_done

NOW = BEGAN.timestamp() + 100


def with_last_sign(directory, second):
    """As if nothing had been written since."""
    for path in directory.iterdir():
        if path.is_file():
            os.utime(path, (BEGAN.timestamp() + second,) * 2)
    return read_run(directory)


def test_a_line_that_is_being_written_is_left_out_and_a_damaged_one_is_told_of(tmp_path):
    make_run(tmp_path, [train_line(1), train_line(2)])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write("\x00\x00garbage\n" + json.dumps(train_line(3)) + '\n{"kind": "train", "step": 4, "lo')
    run = read_run(tmp_path)
    assert run.train.step.tolist() == [1, 2, 3]
    assert any("damaged lines are left out: 1, the first is line 3" in remark for remark in run.remarks)


def test_odd_numbers_and_unknown_fields_do_no_harm(tmp_path):
    odd = {"loss": None, "mfu": 0.4, "new/field": 3, "num_target_tokens": 10**400, "note": "text", "flag": True}
    run = read_run(
        make_run(tmp_path, [train_line(1), train_line(2, **odd), {"kind": "train"}, {"kind": "odd", "x": 1}])
    )
    assert len(run.train) == 2 and run.train.has("mfu") and not run.train.has("flag")
    assert any("lines without a step are left out: 1" in remark for remark in run.remarks)


def test_a_run_that_has_just_begun(tmp_path):
    run = read_run(make_run(tmp_path, [], [started(99)]))
    assert (steps_done(run), num_steps(run)) == (0, 40)
    assert state_of(with_last_sign(tmp_path, 99), NOW).word == "running"


def test_running_on_another_host_is_believed_until_it_is_silent_for_long(tmp_path):
    make_run(tmp_path, [train_line(step) for step in range(1, 5)], [started(0)])
    run = with_last_sign(tmp_path, 90)
    assert state_of(run, NOW).word == "running"
    silent = state_of(run, NOW + 4000)
    assert silent.word == "silent" and "1 h 6 min" in silent.detail


def test_a_process_of_this_host_is_known_again(tmp_path):
    me = psutil.Process()
    here = {"host": socket.gethostname(), "pid": me.pid, "process_started": round(me.create_time(), 2)}
    run = read_run(make_run(tmp_path, [train_line(1)], [started(0, **here)]))
    assert state_of(run, NOW + 10**6).word == "running"
    run = read_run(make_run(tmp_path, [train_line(1)], [started(0, **here | {"process_started": 5.0})]))
    assert state_of(run, NOW).word == "killed"


@pytest.mark.parametrize(
    ("ending", "word", "told"),
    [
        ({"event": "done", "step": 40}, "done", ""),
        ({"event": "stopped", "step": 9, "reason": "stopped by a signal", "signal": "SIGTERM"}, "stopped", "SIGTERM"),
        ({"event": "failed", "step": None, "error": "DataError", "message": "no disk", "exit_code": 3}, "failed", "3"),
    ],
)  # fmt: skip
def test_how_it_ended(tmp_path, ending, word, told):
    run = read_run(make_run(tmp_path, [train_line(1)], [started(0), ending | {"time": at(9)}]))
    state = state_of(run, NOW)
    assert state.word == word and told in state.detail
    # one that goes on afterwards is not what it was
    write_lines(tmp_path / "events.jsonl", [started(0), ending | {"time": at(9)}, started(95, 9, 2)])
    assert state_of(with_last_sign(tmp_path, 95), NOW).word == "running"


def test_a_run_of_an_earlier_version_has_no_events(tmp_path):
    run = read_run(make_run(tmp_path, [train_line(step) for step in range(1, 41)]))
    (tmp_path / "adapter").mkdir()
    assert state_of(read_run(tmp_path), NOW).word == "done"
    assert [one.kind for one in happenings_of(run)] == []


def test_lines_that_were_superseded_count_in_nothing_and_are_told_of(tmp_path):
    make_run(
        tmp_path,
        [train_line(step, time=at(step if step < 3 else step + 50)) for step in range(1, 6)],
        [started(0), started(50, 2, 2, resumed_from="checkpoint-2"), {"event": "done", "time": at(60), "step": 5}],
    )
    write_lines(tmp_path / "metrics_superseded.jsonl", [train_line(3), train_line(4)])
    run = read_run(tmp_path)
    assert run.train.step.tolist() == [1, 2, 3, 4, 5] and run.superseded.step.tolist() == [3, 4]
    told = [(one.kind, one.step, one.what) for one in happenings_of(run)]
    assert told == [
        ("start", 0, "started at step 0"),
        ("end", 4, "start 1 ended without a word"),  # as far as it had come, though that was done again
        ("start", 2, "resumed at step 2 (start 2)"),
        ("end", 5, "done"),
    ]


def test_checkpoints_are_best_kept_removed_or_broken(tmp_path):
    saves = [{"kind": "save", "time": at(step), "step": step, "save_stall_seconds": 0.5} for step in (1, 2, 3, 4)]
    whole = [{"event": "checkpoint", "time": at(s), "step": s, "bytes": 7000, "write_seconds": 1} for s in (1, 2, 3)]
    make_run(tmp_path, [train_line(step) for step in range(1, 5)] + saves, [started(0), *whole])
    for step in (2, 3):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "weights").write_bytes(b"x" * 100)
    (tmp_path / "checkpoint-3" / "COMPLETE").write_text("hash")
    (tmp_path / "best_checkpoint.json").write_text('{"step": 3, "metric": "images/loss", "value": 0.5}')
    rows = {row.step: row for row in checkpoint_rows(read_run(tmp_path))}
    assert {step: row.status for step, row in rows.items()} == {
        1: "removed", 2: "incomplete", 3: "best", 4: "being written",
    }  # fmt: skip
    assert rows[1].num_bytes == 7000 and rows[1].stall_seconds == 0.5


def test_damaged_side_files_are_told_of_and_left_out(tmp_path):
    make_run(tmp_path, [train_line(1)])
    for name, text in (
        ("best_checkpoint.json", '{"step": "three"}'),
        ("resolved_config.yaml", "a: [1"),
        ("environment.json", '{"lives": 3}'),
        ("events.jsonl", "nonsense\n[1]\n"),
    ):
        (tmp_path / name).write_text(text)
    run = read_run(tmp_path)
    assert run.best is None and run.config == {} and run.lives == [] and run.events == []
    assert sum("best_checkpoint" in r or "resolved_config" in r or "events.jsonl" in r for r in run.remarks) == 3


def test_directories_that_are_no_runs_are_named_together(tmp_path):
    make_run(tmp_path / "runs" / "good", [train_line(1)])
    (tmp_path / "empty").mkdir()
    file = tmp_path / "runs" / "good" / "metrics.jsonl"
    with pytest.raises(DataError) as error:
        read_runs([tmp_path / "runs" / "good", tmp_path / "nowhere", tmp_path / "empty", tmp_path / "runs", file])
    lines = str(error.value).splitlines()
    assert len(lines) == 4
    assert "no such directory" in lines[0] and "is no run: it has none of metrics.jsonl" in lines[1]
    assert f"name those that you want: {tmp_path / 'runs' / 'good'}" in lines[2]
    assert f"is a file; give the output_dir of a run, which has metrics.jsonl: {file.parent}" in lines[3]


def test_names_tell_runs_apart(tmp_path):
    paths = [make_run(tmp_path / parent / "run", [train_line(1)]) for parent in ("a", "b")]
    assert [run.name for run in read_runs(paths)] == ["a/run", "b/run"]


def test_the_names_of_files_are_those_that_checkpoints_have():
    from vlm_dist.checkpoint import layout, retention
    from vlm_dist.report import run_files

    assert run_files.BEST_FILE == retention.BEST_FILE
    assert (run_files.CONFIG_FILE, run_files.COMPLETE_FILE) == (layout.RESOLVED_CONFIG, layout.COMPLETE)
    assert run_files.FINAL_ADAPTER == layout.FINAL_ADAPTER
