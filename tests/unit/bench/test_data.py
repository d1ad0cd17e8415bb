"""The benchmark of the data engine cannot rot: its pictures, our part of it, and what the peers' batches must equal."""

import io
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.bench.data import figures
from tests.bench.data.environments import ENVIRONMENT_OF, PINS
from tests.bench.data.pictures import PictureSet, make_pictures, texts
from tests.bench.data.processes import LoaderProcess, MeasureError
from tests.bench.data.task import Task
from tests.bench.report import Report

SMALL = PictureSet("small", 112, 84, 1.0, 4, num_samples=128, samples_per_shard=48)


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    from vlm_dist.demo.tiny_model import DEFAULT_CORPUS, TinyShape, build_processor, build_tokenizer

    folder = tmp_path_factory.mktemp("bench")
    make_pictures(folder, SMALL)
    shape = TinyShape(max_pixels=56 * 84)
    build_processor(shape, build_tokenizer([*DEFAULT_CORPUS, *texts()])).save_pretrained(folder / "processor")
    return Task(str(folder / "small"), SMALL.num_samples, str(folder / "processor"), seconds=0.05)


def test_our_part_runs_as_the_bench_runs_it(task, tmp_path):
    with LoaderProcess("ours", tmp_path / "log") as ours:
        assert ours.ready["import_seconds"] > 0
        for what in ("prepare", "save_state"):
            assert ours.do(what, task) == {}
        raw = ours.do("raw", task, one_core=True)
        assert raw["rate"] > 0
        assert raw["bytes"] > 1000
        assert ours.do("decode", task)["rate"] > 0
        assert ours.do("train", task)["rate"] > 0
        later = Task(task.pictures, task.num_samples, task.processor, start=64)
        assert ours.do("first", later)["seconds"] > 0
        memory = Task(task.pictures, task.num_samples, task.processor, num_workers=1, limit=512)
        assert ours.do("memory", memory)["points"][-1][1] > 0
        with pytest.raises(MeasureError, match="ours: first"):
            ours.do("first", Task("nowhere", 1, "nowhere"))


def test_peers_batches_are_ours(task):
    """The collate function that the peers are given makes the same tensors of the same samples."""
    from tests.bench.data.loaders import ours
    from tests.bench.data.loaders.training import Collate

    batch = next(ours.batches(task))
    source = ours._open(task)
    step = next(ours._plan(task, source).steps())
    samples = []
    for ref in step.micro_batches[0]:
        fields = source.read(ref.index).fields
        image = Image.open(io.BytesIO(fields["jpg"])).convert("RGB")
        samples.append((image, fields["question"], fields["answer"]))
    theirs = Collate(task.processor)(samples)
    labels = theirs.pop("labels")
    assert theirs.keys() == batch.inputs.keys()
    for key, value in theirs.items():
        assert torch.equal(value, batch.inputs[key]), key
    assert torch.equal(labels, batch.labels)


def test_every_peer_has_its_pins():
    for name in set(ENVIRONMENT_OF.values()):
        pins = [line for line in (PINS / f"{name}.txt").read_text().splitlines() if not line.startswith("#")]
        assert pins
        assert all("==" in pin and "/" not in pin for pin in pins)


def test_ratios_are_of_rounds_and_aims_are_judged(capsys):
    answers = figures.Answers()
    answers.values["raw", "ours"] = [80.0, 90.0, 30.0]
    answers.values["raw", "webdataset"] = [10.0, 10.0, 3.0]
    assert answers.ratio("raw", "webdataset") == 9.0
    assert answers.ratio("raw", "webdataset", lower_is_better=True) == pytest.approx(1 / 9)
    assert figures.slope([(n, 100.0 + n / 500, 0.0) for n in range(500, 10_001, 500)]) == pytest.approx(2.0)
    report = Report()
    report.add("raw", 80.0, "samples/s", peer="webdataset", peer_value=10.0, ratio=8.0, ratio_aim=8.5)
    report.add("resume", 1.1, "ratio", 1.3)
    report.summarise()
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines[0]["aim"] == "ratio >= 8.5"
    assert lines[-1] == {"summary": {"met": ["resume"], "missed": ["raw"]}}


def test_pictures_are_made_once_and_are_always_the_same(task, tmp_path):
    again = make_pictures(tmp_path, SMALL)
    first = Path(task.pictures) / "tar"
    names = sorted(path.name for path in again.glob("*.tar"))
    assert [(again / name).read_bytes() == (first / name).read_bytes() for name in names] == [True] * 3
    stamp = (again / names[0]).stat().st_mtime_ns
    make_pictures(tmp_path, SMALL)
    assert (again / names[0]).stat().st_mtime_ns == stamp
