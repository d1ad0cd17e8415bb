"""What was skipped can be read afterwards."""

import json

from vlm_dist.data.quarantine import Quarantine, read_quarantine
from vlm_dist.data.types import NullSlot, SampleOrigin


def slot(key, null_class="decode"):
    return NullSlot(SampleOrigin("vqa", "vqa-000.tar", key), null_class, "그림이 깨졌다")


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
        "class": "decode",
        "message": "그림이 깨졌다",
        "step": 7,
        "rank": 3,
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
