"""What was skipped can be read afterwards."""

import json

from vlm_dist import cli
from vlm_dist.data.quarantine import Quarantine, read_quarantine
from vlm_dist.data.types import NullSlot, SampleOrigin
from vlm_dist.errors import ExitCode


def slot(key, null_class="decode"):
    return NullSlot(SampleOrigin("vqa", "vqa-000.tar", key, 1536), null_class, "그림이 깨졌다")


def test_lines_and_counts(tmp_path):
    with Quarantine(tmp_path, 3) as quarantine:
        quarantine.record(7, [slot("a"), NullSlot(None, "tail", "the end"), slot("b", "too_long")])
        quarantine.record(8, [slot("c")])
        assert quarantine.counts == {"decode": 2, "too_long": 1, "tail": 1}
    lines = quarantine.path.read_text(encoding="utf-8").splitlines()
    assert json.loads(lines[0]) == {
        "source": "vqa",
        "shard": "vqa-000.tar",
        "key": "a",
        "offset": 1536,
        "class": "decode",
        "message": "그림이 깨졌다",
        "step": 7,
        "rank": 3,
        "purpose": "train",
    }
    assert [json.loads(line)["key"] for line in lines] == ["a", "b", "c"]


def test_a_continued_run_appends_and_all_ranks_are_read_together(tmp_path):
    for rank, step in ((0, 5), (1, 2), (0, 9)):
        with Quarantine(tmp_path, rank) as quarantine:
            quarantine.record(step, [slot(f"{rank}-{step}")])
    assert [record["key"] for record in read_quarantine(tmp_path)] == ["1-2", "0-5", "0-9"]


def test_nothing_skipped_leaves_no_file(tmp_path):
    with Quarantine(tmp_path, 0) as quarantine:
        quarantine.record(0, [NullSlot(None, "tail", "the end")])
    assert list(tmp_path.iterdir()) == []
    assert read_quarantine(tmp_path) == []


def test_a_line_that_a_killed_run_left_half_written_is_left_out(tmp_path):
    with Quarantine(tmp_path, 0) as quarantine:
        quarantine.record(0, [slot("a")])
    append(quarantine.path, '{"source": "vq' + "x" * 70_000)
    assert [record["key"] for record in read_quarantine(tmp_path)] == ["a"]
    with Quarantine(tmp_path, 0) as quarantine:  # the run goes on
        quarantine.record(1, [slot("b")])
    assert [record["key"] for record in read_quarantine(tmp_path)] == ["a", "b"]
    assert len(quarantine.path.read_text().splitlines()) == 2


def test_damaged_lines_are_told_and_the_others_read(tmp_path, caplog, capsys):
    with Quarantine(tmp_path, 0) as quarantine:
        quarantine.record(0, [slot("a")])
        append(quarantine.path, '{"source": "vq{"source": "vqa"}\n[]\n{"step": 3}\n\0\0\n' + "[" * 100_000 + "\n")
        quarantine.record(1, [slot("b")])
    assert [record["key"] for record in read_quarantine(tmp_path)] == ["a", "b"]
    assert "rank-00000.jsonl: 5 of 7 lines are no records of skipped samples and are left out, first line 2" in (
        caplog.text
    )
    assert cli.main(["quarantine", str(tmp_path)]) == 0
    assert "decode: 2 samples" in capsys.readouterr().out


def test_odd_letters_of_keys_and_messages_are_written_and_read(tmp_path):
    odd = NullSlot(SampleOrigin("vqa", "s.tar", "half \ud800", 0), "decode", "two\u2028lines\x85")
    with Quarantine(tmp_path, 0) as quarantine:
        quarantine.record(0, [odd, slot("b")])
    assert [(one["key"], one["message"]) for one in read_quarantine(tmp_path)] == [
        ("half ?", odd.message),
        ("b", slot("b").message),
    ]


def append(path, text):
    with path.open("a") as stream:
        stream.write(text)


def test_the_command_counts_each_sample_once(tmp_path, capsys):
    with Quarantine(tmp_path, 0) as quarantine:
        quarantine.record(0, [slot("a"), slot("b"), slot("c", "crash")])
        quarantine.record(5, [slot("held-out")], "eval")
        quarantine.record(10, [slot("held-out")], "eval")
    assert cli.main(["quarantine", str(tmp_path), "--examples", "2"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "decode: 3 samples (vqa 3)",
        "  vqa/vqa-000.tar:a: 그림이 깨졌다 (train step 0)",
        "  vqa/vqa-000.tar:b: 그림이 깨졌다 (train step 0)",
        "  … and 1 more (--json names all)",
        "crash: 1 sample (vqa 1)",
        "  vqa/vqa-000.tar:c: 그림이 깨졌다 (train step 0)",
    ]
    assert cli.main(["quarantine", str(tmp_path), "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["key"], line["times"]) for line in lines] == [("a", 1), ("b", 1), ("c", 1), ("held-out", 2)]
    assert cli.main(["quarantine", str(tmp_path / "nope")]) == ExitCode.CONFIG
    assert "no such directory" in capsys.readouterr().err
