import io
import json
import logging
import os
import pty
import re
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from vlm_dist.errors import ConfigError
from vlm_dist.observability.jsonl import JsonLines, read_metrics
from vlm_dist.observability.log import MetricLog
from vlm_dist.observability.logging_setup import configure_logging
from vlm_dist.observability.metrics import StepMetrics


def metrics(step, **values):
    defaults = {
        "num_steps": 100, "epoch": step / 50, "loss": 1.25, "learning_rate": 1e-4, "grad_norm": 0.5,
        "tokens_per_second": 12345.6, "samples_per_second": 7.5, "padding_share": 0.2, "data_wait_share": 0.01,
        "step_seconds": 2.0, "num_window_steps": 10, "num_target_tokens": 640,
        "null_slots": {"decode": 1, "tail": 0}, "host_memory_bytes": 2**31, "eta_seconds": 180.0,
    }  # fmt: skip
    return StepMetrics(step=step, **(defaults | values))


def run(directory, first, last, *, stream=None, every=10, evaluate_at=()):
    with MetricLog(directory, stream=stream or io.StringIO()) as log:
        log.start(start_step=first, num_steps=100)
        for step in range(first + 1, last + 1):
            if step % every == 0:
                log.log_step(metrics(step))
            else:
                log.advance(step)
            if step in evaluate_at:
                log.log_eval(step, {"loss": 1.5, "exact_match/digits": 0.5})


def steps(directory, kind="train"):
    return [record["step"] for record in read_metrics(directory / "metrics.jsonl", kind)]


class TestMetricsFile:
    def test_every_line_is_an_object_with_kind_and_step(self, tmp_path):
        run(tmp_path, 0, 20, evaluate_at=[20])
        records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        assert [(record["kind"], record["step"]) for record in records] == [("train", 10), ("train", 20), ("eval", 20)]
        assert records[0]["loss"] == 1.25
        assert records[0]["null_slots/decode"] == 1
        assert records[0]["device_memory_bytes"] is None
        assert records[2]["exact_match/digits"] == 0.5

    def test_a_resumed_run_has_every_step_once_and_the_repeated_lines_are_kept_aside(self, tmp_path):
        run(tmp_path, 0, 50, evaluate_at=[20, 50])  # killed here; the last checkpoint is of step 20
        run(tmp_path, 20, 100, evaluate_at=[50])
        assert steps(tmp_path) == [10, 20, 30, 40, 50, 60, 70, 80, 90, 100]
        assert steps(tmp_path, "eval") == [20, 50]
        lines = (tmp_path / "metrics_superseded.jsonl").read_text().splitlines()
        superseded = [json.loads(line)["step"] for line in lines]
        assert superseded == [30, 40, 50, 50]

    def test_a_new_run_in_an_old_directory_begins_a_new_record(self, tmp_path):
        run(tmp_path, 0, 50)
        run(tmp_path, 0, 20)
        assert steps(tmp_path) == [10, 20]

    def test_a_line_that_was_cut_by_a_kill_does_no_harm(self, tmp_path):
        run(tmp_path, 0, 20)
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write('{"kind": "train", "step": 30, "lo')
        assert steps(tmp_path) == [10, 20]
        run(tmp_path, 20, 40)
        assert steps(tmp_path) == [10, 20, 30, 40]

    def test_resuming_at_the_end_of_the_record_changes_nothing(self, tmp_path):
        run(tmp_path, 0, 20)
        run(tmp_path, 20, 30)
        assert steps(tmp_path) == [10, 20, 30]
        assert not (tmp_path / "metrics_superseded.jsonl").exists()

    def test_a_loss_that_is_not_a_number_is_valid_json_and_named(self, tmp_path):
        lines = JsonLines(tmp_path)
        lines.start(0)
        lines.write("train", {"step": 1, "loss": float("nan"), "grad_norm": float("inf"), "epoch": 0.5})
        lines.close()
        text = (tmp_path / "metrics.jsonl").read_text()
        record = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
        assert record["loss"] is None
        assert record["non_finite"] == ["loss", "grad_norm"]
        assert record["epoch"] == 0.5

    def test_a_disk_that_fails_is_said_once_and_training_goes_on(self, tmp_path, caplog):
        (tmp_path / "metrics.jsonl").mkdir()
        with caplog.at_level(logging.WARNING):
            run(tmp_path, 0, 50)
        assert len(caplog.records) == 1
        assert "metrics.jsonl" in caplog.text


class TestConsole:
    def test_a_log_file_has_plain_lines_only(self, tmp_path, monkeypatch):
        monkeypatch.setenv("FORCE_COLOR", "1")
        stream = io.StringIO()
        run(tmp_path, 0, 20, stream=stream, evaluate_at=[20])
        lines = stream.getvalue().splitlines()
        assert len(lines) == 3
        assert re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  step 10/100  epoch 0.20  loss 1.2500  lr 1.00e-04", lines[0])
        assert "12,346 tokens/s" in lines[0]
        assert "null slots decode=1" in lines[0]
        assert lines[0].endswith("eta 0:03:00")
        assert "evaluation at step 20  loss 1.5000" in lines[2]
        assert not re.search(r"[\x1b\r]", stream.getvalue())

    def test_a_window_without_loss_or_norm_is_printed(self, tmp_path):
        stream = io.StringIO()
        with MetricLog(tmp_path, stream=stream) as log:
            log.start(start_step=0, num_steps=10)
            log.log_step(metrics(5, loss=None, grad_norm=None))
            log.log_step(metrics(6, loss=float("nan")))
        assert "loss -  " in stream.getvalue()
        assert "loss nan" in stream.getvalue()

    def test_a_terminal_has_a_bar_below_whole_lines(self, tmp_path):
        code = f"""
            import logging, sys, time
            from pathlib import Path
            sys.path.insert(0, {str(Path(__file__).parent)!r})
            from test_log import metrics
            from vlm_dist.observability.log import MetricLog
            from vlm_dist.observability.logging_setup import configure_logging
            configure_logging(0)
            with MetricLog(Path({str(tmp_path)!r})) as log:
                log.start(start_step=40, num_steps=100)
                log.log_step(metrics(50))
                log.message("a message [with] brackets")
                logging.getLogger("vlm_dist.x").warning("a warning")
                print("somebody prints")
                time.sleep(0.3)
        """
        screen = _in_terminal(code)
        assert "\x1b[" in screen
        assert "50/100" in screen
        assert "12,346 tokens/s" in screen
        plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen)
        lines = [line.split("\r")[-1] for line in plain.replace("\r\n", "\n").split("\n")]
        for whole in ("a message [with] brackets", "WARNING vlm_dist.x: a warning", "somebody prints"):
            assert whole in lines

    @pytest.mark.parametrize("columns", [24, 48, 80, 200])
    def test_the_live_line_has_the_room_that_there_is(self, tmp_path, columns):
        """What has no room is left out: a line that wraps would leave a copy of itself at every refresh."""
        screen = _in_terminal(_PROGRAM.format(tests=str(Path(__file__).parent), directory=str(tmp_path)), columns)
        plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen)
        live = [line for line in re.split(r"[\r\n]+", plain) if re.search(r"\d+/100  .*eta ", line + " eta ")]
        live = [line for line in live if not line.startswith("step")]
        assert live and max(map(len, live)) <= columns
        assert re.search(r"eta 0:01:(40|39)$", live[-1])
        assert ("51/100  loss 1.2500  12,346 tokens/s  MFU 41.5%  lr 1.00e-04  eta" in live[-1]) is (columns == 200)
        assert ("tokens/s" in live[-1]) is (columns >= 80)
        assert "━" in live[-1] or columns < 48

    def test_a_dumb_terminal_has_plain_lines(self, tmp_path):
        program = _PROGRAM.format(tests=str(Path(__file__).parent), directory=str(tmp_path))
        screen = _in_terminal(program, TERM="dumb")
        assert not re.search(r"\x1b|\r(?!\n)", screen)
        assert "step 50/100" in screen and "eta 0:03:00" in screen

    def test_a_narrow_pipe_has_whole_lines(self, tmp_path):
        program = textwrap.dedent(_PROGRAM.format(tests=str(Path(__file__).parent), directory=str(tmp_path)))
        environ = os.environ | {"COLUMNS": "20", "TERM": "xterm-256color", "FORCE_COLOR": "1"}
        ended = subprocess.run([sys.executable, "-c", program], env=environ, capture_output=True, text=True, check=True)
        (line,) = ended.stdout.splitlines()
        assert line.endswith("eta 0:03:00") and "12,346 tokens/s" in line and "\x1b" not in ended.stdout


class TestRanks:
    def test_only_rank_0_prints_and_writes(self, tmp_path, capsys):
        with MetricLog(tmp_path / "run", rank=1, report_to=["wandb"]) as log:
            log.start(start_step=0, num_steps=10)
            log.log_step(metrics(1))
            log.log_eval(1, {"loss": 1.0})
            log.message("hello")
            log.advance(2)
        assert not (tmp_path / "run").exists()
        assert capsys.readouterr() == ("", "")

    def test_warnings_carry_the_rank_and_libraries_are_quiet(self, capsys):
        chatty = logging.getLogger("DeepSpeed")
        chatty.addHandler(logging.StreamHandler(sys.stdout))  # as DeepSpeed does on import
        chatty.propagate = False
        try:
            configure_logging(3, world_size=4)
            logging.getLogger("vlm_dist.data").warning("a shard is damaged")
            logging.getLogger("vlm_dist.data").info("not from this rank")
            chatty.warning("the same on every rank")
            chatty.error("an error")
            assert capsys.readouterr().err.splitlines() == [
                "[rank 3] WARNING vlm_dist.data: a shard is damaged",
                "[rank 3] ERROR DeepSpeed: an error",
            ]
            configure_logging(0, world_size=4)
            logging.getLogger("vlm_dist.data").info("from rank 0")
            chatty.warning("once")
            chatty.info("noise")
            assert capsys.readouterr().err.splitlines() == [
                "[rank 0] INFO vlm_dist.data: from rank 0",
                "[rank 0] WARNING DeepSpeed: once",
            ]
        finally:
            logging.captureWarnings(False)
            root = logging.getLogger()
            root.handlers = [h for h in root.handlers if type(h).__module__ != "vlm_dist.observability.logging_setup"]
            for name in ("vlm_dist", "DeepSpeed"):
                logging.getLogger(name).setLevel(logging.NOTSET)


@pytest.mark.parametrize("report_to", [[], None, "none", ["none"], ["wandb"], "wandb", "tensorboard"])
def test_report_to_takes_what_people_write(tmp_path, report_to):
    MetricLog(tmp_path, rank=1, report_to=report_to)


def test_an_unknown_service_is_refused_by_name(tmp_path):
    with pytest.raises(ConfigError, match="report_to: got mlflow, expected a list of wandb, tensorboard"):
        MetricLog(tmp_path, report_to=["wandb", "mlflow"])


#: A line, and a step without one.
_PROGRAM = """
    import sys, time
    from pathlib import Path
    sys.path.insert(0, {tests!r})
    from test_log import metrics
    from vlm_dist.observability.log import MetricLog
    with MetricLog(Path({directory!r})) as log:
        log.start(start_step=40, num_steps=100)
        log.log_step(metrics(50, mfu=0.415))
        log.advance(51, 100.0)
"""


def _in_terminal(code, columns=160, **environ):
    """Output of a Python program whose standard streams are a terminal."""
    controller, terminal = pty.openpty()
    environ = os.environ | {"TERM": "xterm", "COLUMNS": str(columns), "LINES": "40"} | environ
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdin=terminal, stdout=terminal, stderr=terminal, env=environ
    )
    os.close(terminal)
    chunks = []

    def read():
        while True:
            try:
                chunk = os.read(controller, 65536)
            except OSError:  # Linux says so at the end
                return
            if not chunk:
                return
            chunks.append(chunk)

    reader = threading.Thread(target=read)
    reader.start()
    assert process.wait(timeout=30) == 0, b"".join(chunks).decode()
    reader.join(timeout=10)
    os.close(controller)
    return b"".join(chunks).decode()
