import io
import logging

import pytest

from vlm_dist.errors import ConfigError
from vlm_dist.observability import tensorboard_sink
from vlm_dist.observability.log import MetricLog
from vlm_dist.observability.tensorboard_sink import TensorBoardSink


def start(directory, at, steps, *, kill=False):
    log = MetricLog(directory, report_to=["tensorboard"], config={"train": {"seed": 7}}, stream=io.StringIO())
    log.start(start_step=at, num_steps=10)
    for step in steps:
        log.log_eval(step, {"loss": step + at / 100, "answers": "text", "missing": None, "broken": float("nan")})
    if not kill:
        log.close()


def scalars(directory, tag="eval/loss"):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory / "tensorboard"))
    events.Reload()
    return [(event.step, round(event.value, 4)) for event in events.Scalars(tag)], events


def test_tensorboard_reads_figures_config_and_answers(tmp_path):
    (tmp_path / "predictions").mkdir()
    (tmp_path / "predictions" / "step-2.jsonl").write_text('{"source": "a", "prediction": "x|y", "match": true}\n')
    start(tmp_path, 0, [1, 2])
    read, events = scalars(tmp_path)
    assert read == [(1, 1.0), (2, 2.0)]
    assert events.Tags()["scalars"] == ["eval/loss"]
    texts = {tag: events.Tensors(tag)[0].tensor_proto.string_val[0] for tag in events.Tags()["tensors"]}
    assert b"seed: 7" in texts["config/text_summary"]
    assert rb"x\|y" in texts["eval/predictions/text_summary"]


def test_a_resumed_run_goes_on_and_what_it_repeats_is_seen_once(tmp_path):
    start(tmp_path, 0, [1, 2, 3, 4], kill=True)
    start(tmp_path, 2, [3, 4, 5])
    assert scalars(tmp_path)[0] == [(1, 1.0), (2, 2.0), (3, 3.02), (4, 4.02), (5, 5.02)]


def test_a_new_run_in_an_old_directory_begins_a_new_record(tmp_path):
    start(tmp_path, 0, [1, 2, 3])
    start(tmp_path, 0, [1])
    assert scalars(tmp_path)[0] == [(1, 1.0)]


def test_a_missing_package_is_named_with_its_extra(tmp_path, monkeypatch):
    monkeypatch.setattr(tensorboard_sink.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'vlm-dist\[tensorboard\]'"):
        MetricLog(tmp_path, rank=1, report_to="tensorboard")


def test_a_disk_that_fails_is_said_once_and_training_goes_on(tmp_path, caplog):
    (tmp_path / "tensorboard").write_text("in the way")
    sink = TensorBoardSink(tmp_path, config={})
    with caplog.at_level(logging.WARNING):
        assert sink.start(0) == "tensorboard: not used"
        sink.write("train", 1, {"loss": 1.0})
        sink.close(0)
    assert len(caplog.records) == 1
