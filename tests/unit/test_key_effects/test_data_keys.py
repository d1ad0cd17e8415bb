"""data_config.yaml: each key changes which samples there are, or what they hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from tests.storage.servers import faulty_server
from tests.unit.test_key_effects.conftest import RED, Project
from tests.unit.test_key_effects.registry import shows
from vlm_dist import build, cli
from vlm_dist.config.arithmetic import resolve_batch
from vlm_dist.data.types import Source
from vlm_dist.errors import ConfigError

MESSAGES = [
    {"role": role, "content": [{"type": "text", "text": "{" + column + "_column}"}]}
    for role, column in (("user", "question"), ("assistant", "answer"))
]
both = pytest.mark.parametrize("which", ["train", "eval"])


def lines(project: Project, name: str = "rows.jsonl", count: int = 6) -> str:
    """Write records with a question and an answer; returns the path."""
    path = project.data / name
    path.write_text("".join(json.dumps({"question": f"q{i}", "answer": f"{name} {i}"}) + "\n" for i in range(count)))
    return str(path)


def opened(project: Project, which: str, **settings: Any) -> Source:
    (source,) = project.sources({f"data.{which}": [settings]}, which)
    return source


@shows("data.train[].type", "data.eval[].type", "data.train[].path", "data.eval[].path")
@both
def test_each_type_reads_what_its_path_names(project: Project, which: str) -> None:
    saved = project.data / "saved"
    datasets.Dataset.from_list([{"question": "from arrow", "answer": "x"}]).save_to_disk(str(saved))
    shards = f"data/images{'-heldout' if which == 'eval' else ''}"
    tar = opened(project, which, type="tar", path=shards)
    jsonl = opened(project, which, type="jsonl", path=lines(project))
    arrow = opened(project, which, type="hf", path=str(saved))
    assert {"png", "question"} <= set(tar.columns) and len(tar) == (5 if which == "eval" else 20)
    assert jsonl.read(2).fields["question"] == "q2" and len(jsonl) == 6
    assert arrow.read(0).fields["question"] == "from arrow" and len(arrow) == 1


@shows("data.train[].name", "data.eval[].name")
@both
def test_name_is_a_label_or_the_name_of_a_data_set(project: Project, which: str) -> None:
    assert opened(project, which, type="jsonl", path=lines(project), name="vqa").read(0).origin.source == "vqa"
    builder = opened(project, which, type="hf", name="json", data_files=lines(project))
    assert builder.read(1).fields["question"] == "q1"


@shows("data.train[].data_files", "data.eval[].data_files", "data.train[].split", "data.eval[].split")
@both
def test_data_files_and_split_choose_the_rows(project: Project, which: str) -> None:
    files = {"one": lines(project, "one.jsonl"), "two": lines(project, "two.jsonl", count=3)}
    one = opened(project, which, type="hf", name="json", data_files=files, split="one")
    two = opened(project, which, type="hf", name="json", data_files=files, split="two")
    assert (len(one), len(two)) == (6, 3)
    assert two.read(0).fields["answer"] == "two.jsonl 0"


@shows("data.train[].columns", "data.eval[].columns")
@both
def test_columns_get_new_names(project: Project, which: str) -> None:
    source = opened(project, which, type="jsonl", path=lines(project), columns={"query": "question"})
    assert source.read(1).fields == {"query": "q1", "answer": "rows.jsonl 1"}


@shows("data.train[].max_samples", "data.eval[].max_samples")
@both
def test_only_the_first_so_many_samples_are_used(project: Project, which: str) -> None:
    assert len(opened(project, which, type="jsonl", path=lines(project), max_samples=4)) == 4
    assert len(opened(project, which, type="tar", path="data/images-heldout", max_samples=2)) == 2


@shows("data.train[].media_root", "data.eval[].media_root")
@both
def test_media_are_looked_for_under_media_root(project: Project, which: str) -> None:
    (project.data / "media").mkdir()
    project.picture("media/red.png", RED)
    path = project.data / "rows.jsonl"
    path.write_text(json.dumps({"image": "red.png", "question": "q", "answer": "a"}) + "\n")
    source = opened(project, which, type="jsonl", path=str(path), media_root=str(project.data / "media"))
    assert source.read(0).fields["image"] == (project.data / "media" / "red.png").read_bytes()
    with pytest.raises(ConfigError, match="media_root: does not apply to a source of type tar"):
        opened(project, which, type="tar", path="data/images", media_root=str(project.data))


@shows("data.train[].repeat")
def test_repeat_is_the_number_of_passes_in_an_epoch(project: Project) -> None:
    def counts(*repeats: float) -> list[int]:
        names = ("one.jsonl", "two.jsonl")
        sources = [
            {"type": "jsonl", "path": lines(project, name), "repeat": repeat}
            for name, repeat in zip(names, repeats, strict=True)
        ]
        config = project.config({"data.train": sources, "train.max_steps": -1})
        plan = build.make_plan(config, build.open_sources_alone(config, "train"), resolve_batch(config.train, 1))
        refs = [ref for i in range(plan.num_steps) for batch in plan.step(i).micro_batches for ref in batch if ref]
        return [sum(ref.source == number for ref in refs) for number in range(2)]

    assert counts(1.0, 1.0) == [6, 6]
    assert counts(0.5, 2.0) == [3, 12]


@shows("data.eval[].repeat")
def test_held_out_samples_are_not_repeated(project: Project) -> None:
    settings = {"type": "jsonl", "path": lines(project)}
    with pytest.raises(ConfigError, match=r"data.eval\[0\].repeat: got 2, expected 1"):
        opened(project, "eval", **settings, repeat=2.0)
    assert len(opened(project, "eval", **settings, repeat=1.0)) == 6


@shows("data.index_dir")
def test_what_is_indexed_is_kept_in_index_dir(project: Project) -> None:
    place = project.data / "indexes"
    changes = {"data.train": [{"type": "jsonl", "path": lines(project)}], "data.index_dir": str(place)}
    project.sources(changes)
    assert [path.name for path in place.rglob("*") if path.is_file()] == ["rows.jsonl.index.arrow"]
    assert not list(Path(project.data).glob("*.index.arrow"))


@shows("data.lengths")
def test_lengths_are_counted_or_estimated(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    changes = {"data.train": [{"type": "jsonl", "path": lines(project)}], "data.index_dir": str(project.data / "index")}
    changes |= {"collator.data_processing": {"image_data": False, "video_data": False}}
    changes |= {"collator.message_format.training_messages": MESSAGES}

    def kind(setting: str) -> str:
        config = project.config(changes | {"data.lengths": setting})
        sources = build.open_sources_alone(config, "train")
        processor, family = build.make_processor(config)
        materialise = build.make_materialisers(config, sources, [], processor, family)
        return build.make_lengths(config, sources, processor, family, materialise).digest.split(":")[0]

    assert kind("auto") == kind("estimate") == "estimate"
    with pytest.raises(ConfigError, match=r"data\.lengths is exact, but not all tokens have been counted"):
        kind("exact")
    arguments = [f"--set={key}={json.dumps(value)}" for key, value in changes.items()]
    assert cli.main(["shards", "tokens", "configs/tiny.yaml", "--workers", "0", *arguments]) == 0
    assert kind("auto") == kind("exact") == "exact"
    assert kind("estimate") == "estimate"


@shows("data.cache.stage_files")
def test_shards_in_files_are_copied_where_that_is_asked_for(project: Project) -> None:
    from vlm_dist.build.data import LOCAL_LOOKAHEAD_STEPS, lookahead_steps

    def reads(stage: bool) -> tuple[list[bytes], int, int]:
        place = project.data / f"stage-{stage}"
        changes = {"data.train": [{"type": "tar", "path": "data/images"}]}
        changes |= {"data.cache": {"dir": str(place), "stage_files": stage, "mode": "whole", "lookahead_steps": 7}}
        (source,) = project.sources(changes)
        pictures = [source.read(row).fields["png"] for row in range(len(source))]
        return pictures, len(list(place.glob("*.tar"))), lookahead_steps(project.config(changes))

    num_shards = len(list((project.run.directory / "data" / "images").glob("*.tar")))
    plain, staged = reads(False), reads(True)
    assert plain[0] == staged[0]
    assert (plain[1:], staged[1:]) == ((0, LOCAL_LOOKAHEAD_STEPS), (num_shards, 7))


@shows("data.cache.dir", "data.cache.mode", "data.cache.max_size", "data.cache.lookahead_steps")
def test_remote_shards_are_copied_as_the_cache_says(project: Project) -> None:
    from vlm_dist.build.data import LOCAL_LOOKAHEAD_STEPS, lookahead_steps

    def copies(**cache: Any) -> int:
        """Read everything; how many copies there are then."""
        place = project.data / f"cache-{len(list(project.data.iterdir()))}"
        changes = {"data.train": [{"type": "tar", "path": urls}], "data.cache": {"dir": str(place), **cache}}
        (source,) = project.sources(changes)
        assert [source.read(row).fields["png"] for row in range(len(source))] == pictures
        return len(list(place.glob("*.tar")))

    folder = project.run.directory / "data" / "images"
    local = opened(project, "train", type="tar", path="data/images")
    pictures = [local.read(row).fields["png"] for row in range(len(local))]
    num_shards = len(list(folder.glob("*.tar")))
    with faulty_server(folder) as (url, _):
        urls = [f"{url}/{path.name}" for path in sorted(folder.glob("*.tar"))]
        assert copies(mode="whole") == num_shards > 1
        assert copies(mode="range") == 0
        largest = max(path.stat().st_size for path in folder.glob("*.tar"))
        assert copies(mode="whole", max_size=f"{largest}B") == 1
        remote = {"data.train": [{"type": "tar", "path": urls}], "data.cache": {"lookahead_steps": 7}}
        assert lookahead_steps(project.config(remote)) == 7
    assert lookahead_steps(project.config({"data.cache": {"lookahead_steps": 7}})) == LOCAL_LOOKAHEAD_STEPS
