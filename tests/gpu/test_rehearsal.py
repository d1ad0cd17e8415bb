"""The benchmark on a GPU, rehearsed without one: every way it goes, at sizes that take seconds."""

from __future__ import annotations

import gzip
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.bench.gpu import page, peer, samples
from tests.bench.gpu.commands import Command, Outcome
from tests.bench.gpu.kernels import kind_of, read_trace
from tests.bench.gpu.machine import Machine
from tests.bench.gpu.models import NAMES, config_of, write_checkpoint
from tests.bench.gpu.ours import Measured
from tests.bench.report import ROOT, Report
from tests.unit.estimate.true_sizes import MODELS
from vlm_dist.config.vlm_model import ModelClassEntry
from vlm_dist.model import load_model, load_processor


def rehearse(folder: Path, model: str, *arguments: str) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "tests.bench.gpu", model, "--device", "cpu", "--size", "tiny", *arguments]
    ended = subprocess.run([*command, "--folder", str(folder)], cwd=ROOT, capture_output=True, text=True, timeout=1600)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return [json.loads(line) for line in ended.stdout.splitlines() if line.startswith("{")]


def figures(lines: list[dict[str, Any]]) -> dict[str, float]:
    return {line["name"]: line["value"] for line in lines if "name" in line}


@pytest.mark.e2e
def test_our_part_is_measured(tmp_path: Path) -> None:
    lines = rehearse(tmp_path, "7b", "--parts", "8k", "--minutes", "8")
    found = figures(lines)
    assert found["8k: useful tokens per second"] > 0 and 0 <= found["8k: waiting for data"] < 1
    assert not [line for line in lines if "note" in line], lines
    assert "summary" in lines[-1]
    assert any("packs of up to 512 tokens" in line.get("log", "") for line in lines)
    assert sorted((tmp_path / "8k" / "profile").glob("*.json.gz"))  # the step that is traced behind the timed ones


@pytest.mark.e2e
@pytest.mark.long
@pytest.mark.parametrize("model", list(NAMES))
def test_every_part_is_measured(tmp_path: Path, model: str) -> None:
    lines = rehearse(tmp_path, model, "--minutes", "25")
    found = figures(lines)
    for part in ("8k", "16k", "video"):
        assert found[f"{part}: useful tokens per second"] > 0
    notes = [line["note"] for line in lines if "note" in line]
    if importlib.util.find_spec("trl") is None:
        assert len(notes) == 1 and "No module named 'trl'" in notes[0]
    else:
        assert not notes and found["8k against trl"] > 0
    assert found["8k against trainer"] > 0


@pytest.mark.e2e
def test_a_part_whose_time_is_over_is_left_out(tmp_path: Path) -> None:
    lines = rehearse(tmp_path, "2b", "--minutes", "0.2")
    assert [line["note"] for line in lines if "note" in line][-1] == "video: left out, the time is over"
    assert lines[-1] == {"summary": {"met": [], "missed": []}}


@pytest.mark.parametrize("key", list(NAMES))
def test_a_checkpoint_is_one(tmp_path: Path, key: str) -> None:
    """Loaded by the real path, which refuses missing and foreign weights; with several shards."""
    written = write_checkpoint(tmp_path, NAMES[key], torch.device("cpu"), is_tiny=True)
    entry = ModelClassEntry(model_class=written.model_class, processor_class=written.processor_class)
    model = load_model(str(tmp_path), entry, dtype="bfloat16")
    assert sum(p.numel() for p in model.parameters()) == written.num_weights
    assert written.num_bytes == 2 * written.num_weights
    processor = load_processor(str(tmp_path), entry)
    assert len(processor.tokenizer) < model.get_input_embeddings().weight.shape[0] == 4096
    scale = float(model.get_input_embeddings().weight.detach().float().std())
    assert scale == pytest.approx(0.02, rel=0.05)


def test_true_sizes_are_the_published_ones() -> None:
    for name in NAMES.values():
        assert config_of(name) == MODELS[name][0]
    sizes = [(config_of(name)["hidden_size"], config_of(name)["vocab_size"]) for name in NAMES.values()]
    assert sizes == [(1536, 151936), (3584, 152064)]


def test_samples_have_the_lengths_of_the_mix() -> None:
    mixed = samples.make_samples(samples.Scale(1, 40, 0, (2, 2), 4))
    pictures = [sample for sample in mixed if sample.jpeg is not None]
    assert 10 <= len(pictures) <= 30
    tokens, tiles = samples.draw("mix", 40)
    for sample, count, picture in zip(mixed, tokens, tiles, strict=True):
        words = len(f"{sample.question} {sample.answer}".split())
        assert words == max(2, count - 256 * picture)
        assert (sample.jpeg is None) == (picture == 0)
    assert all(width * height == 256 * tiles for tiles, (width, height) in samples.GRIDS.items() if tiles != 4)


def test_a_process_ends_at_its_deadline(tmp_path: Path) -> None:
    command = Command(tmp_path, 0)
    code = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(3)); print('on', flush=True)\n"
    ended = command.python(["-c", code + "time.sleep(60)"], 0.0, name="slow")
    assert ended.exit_code == 124 and ended.stdout == "on\n" and ended.seconds < 20
    assert command.python(["-c", "print(1)"], 60.0, name="quick") == Outcome(0, "1\n", pytest.approx(0, abs=50))


def test_a_peers_ways_are_tried_from_the_fastest_on() -> None:
    tried = peer.ways(10, liger=True)
    assert tried[0] == peer.Way(checkpointing=False, rows=10, liger=True)
    assert [way.rows for way in tried if way.liger] == [10, 10, 5, 2, 1]
    assert [way.liger for way in tried] == sorted((way.liger for way in tried), reverse=True)
    assert {way.liger for way in peer.ways(1, liger=False)} == {False}


def trace(path: Path) -> Path:
    kernels = [
        ("nvjet_tst_128x256_64x4_2x1_v_bz_TNT", 0, 600),
        ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<...>", 600, 200),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<...>>", 1000, 100),
    ]
    events = [{"ph": "X", "cat": "kernel", "name": name, "ts": start, "dur": long} for name, start, long in kernels]
    events.append({"ph": "X", "cat": "cpu_op", "name": "aten::mm", "ts": 0, "dur": 5000})
    with gzip.open(path, "wt") as stream:
        json.dump({"traceEvents": events}, stream)
    return path


def test_a_trace_is_told_by_kinds(tmp_path: Path) -> None:
    table = read_trace(trace(tmp_path / "steps.json.gz"))
    assert {kind: round(seconds * 1e6) for kind, seconds in table.seconds.items()} == {
        "matrix product": 600,
        "attention": 200,
        "elementwise": 100,
    }
    assert round(table.busy_seconds * 1e6) == 900 and round(table.span_seconds * 1e6) == 1100
    assert table.lines[2] == "| matrix product | 0.6 | 66.7% |" and table.lines[-1].endswith("| 18.2% of the step |")
    assert kind_of("ncclDevKernel_AllReduce_Sum_bf16") == "communication"
    assert kind_of("Memcpy HtoD (Pinned -> Device)") == "copy" and kind_of("what_is_this") == "other"


def test_the_page_has_what_was_measured(tmp_path: Path) -> None:
    steps = [
        {"step": number, "tokens_per_second": 20_000.0, "step_seconds": 1.6, "data_wait_share": 0.001, "mfu": 0.41}
        for number in (4, 5, 6)
    ]
    measured = Measured(steps, ("train.gradient_checkpointing=false",), Outcome(0, "", 60.0))
    failed = Measured([], (), Outcome(2, "error: out of memory", 30.0))
    machine = Machine("NVIDIA H100 80GB HBM3", 1, 79.1, 989.4, 700.0, 2500.0, 16, {"torch": "2.11.0"})
    result = {"tokens_per_second": 8000.0, "peak_bytes": 6e10, "rows": 5, "checkpointing": True, "liger": True}
    report = Report()
    report.add("8k against trl", 20_000.0, "tokens/s", peer="trl", peer_value=8000.0, ratio=2.5, ratio_aim=1.5)
    peers = {"trl": result | {"attention": "sdpa"}, "trainer": {}}
    table = read_trace(trace(tmp_path / "steps.json.gz"))
    runs = {"8k": measured, "16k": failed}
    path = page.write(NAMES["7b"], machine, report, runs, peers, table, ["16k: no figure"], tmp_path / "page.md")
    text = path.read_text()
    for line in (
        "| pictures and texts, packs of 8k | 20,000 | 41.0% |",
        "| the same, packs of 16k | none: exit code 2 |",
        "| trl | 8,000 | 2.50 x | 60.0 GB | 5 | yes | yes | sdpa |",
        "| trainer | none |",
        "| 8k against trl | 2.50 x tokens/s | ratio >= 1.5 | met |",
        "| matrix product | 0.6 | 66.7% |",
        "* 16k: no figure",
    ):
        assert line in text, text
    assert "1 x NVIDIA H100 80GB HBM3, 79 GiB each, 16 cores" in text
