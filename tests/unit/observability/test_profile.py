import gzip
import json
from contextlib import contextmanager

import pytest
import torch

from vlm_dist.observability.profile import StepProfile


def run(directory, count, first=1, **settings):
    messages, pauses = [], []

    @contextmanager
    def pausing():
        pauses.append(True)
        yield

    with StepProfile(directory, 3, report=messages.append, pausing=pausing, **settings) as profile:
        for position in range(first, first + count):
            with profile(position):
                # a product of its own in each step, by which the trace tells which steps it has
                torch.ones(position, 2) @ torch.ones(2, 2)
    return messages, pauses


def trace(path):
    with gzip.open(path, "rt") as file:
        return json.load(file)["traceEvents"]


@pytest.mark.parametrize("with_memory", [False, True])
def test_the_steps_that_were_asked_for_are_traced(tmp_path, with_memory):
    messages, pauses = run(tmp_path, 8, first=101, start_step=3, num_steps=2, with_memory=with_memory)
    path = tmp_path / "profile" / "steps-104-105-rank-3.json.gz"
    events = trace(path)
    products = [event for event in events if event.get("name") == "aten::mm"]
    assert len(products) == 2
    if with_memory:
        assert [event["args"]["Input Dims"][0] for event in products] == [[104, 2], [105, 2]]
        assert any(event.get("name") == "[memory]" for event in events)
    table = path.with_name("steps-104-105-rank-3.txt").read_text()
    assert "Self CPU" in table and "aten::mm" in table
    assert ("operators by their own memory" in table) is with_memory
    assert (len(messages), len(pauses)) == (1, 1)
    assert "perfetto" in messages[0]


def test_a_run_that_ends_early_leaves_what_there_is(tmp_path):
    run(tmp_path, 4, start_step=2, num_steps=10)
    assert (tmp_path / "profile" / "steps-3-4-rank-3.json.gz").is_file()


@pytest.mark.parametrize("count", [1, 3])
def test_a_run_that_is_too_short_says_so(tmp_path, count):
    messages, _ = run(tmp_path, count, start_step=3, num_steps=1)
    assert len(messages) == 1 and "nothing was profiled" in messages[0]
    assert not (tmp_path / "profile").exists()
