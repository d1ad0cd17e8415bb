"""The page and the terminal's form: nothing from the data becomes markup, and the size is bounded."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import time

from rich.console import Console

from tests.unit.report.runs import at, make_run, started, train_line, write_lines
from vlm_dist.cli import main
from vlm_dist.report.answers import choose_answers
from vlm_dist.report.environment import describe_life, describe_ranks
from vlm_dist.report.html import short, write_page
from vlm_dist.report.lines import Lines
from vlm_dist.report.report import make_report
from vlm_dist.report.run_files import read_run
from vlm_dist.report.terminal import print_report, sparkline

EVIL = '</script><img src=x onerror="alert(1)">'


def evil_run(directory):
    lines = [train_line(step, **{f"{EVIL}/loss": 1.0, f"{EVIL}/token_share": 0.5}) for step in range(1, 5)]
    evaluation = {"kind": "eval", "time": at(3), "step": 3, f"{EVIL}/loss": 2.0, f"{EVIL}/{EVIL}": 0.5}
    failed = {"event": "failed", "time": at(9), "step": 4, "error": EVIL, "message": EVIL}
    make_run(directory, [*lines, evaluation], [started(0, host=EVIL, resumed_from=EVIL), failed])
    (directory / "resolved_config.yaml").write_text(json.dumps({"model_id": EVIL, EVIL: [EVIL]}))
    life = {"life": EVIL, "host": EVIL, "command": EVIL, "devices": [{"device": EVIL, "ranks": [EVIL]}, 3],
            "versions": {EVIL: EVIL}, "job": {EVIL: EVIL}, "world_size": EVIL}  # fmt: skip
    (directory / "environment.json").write_text(json.dumps({"lives": [life]}))
    (directory / "best_checkpoint.json").write_text(json.dumps({"step": 1, "metric": EVIL, "value": 1}))
    skipped = {"source": EVIL, "shard": EVIL, "key": EVIL, "class": EVIL, "message": EVIL, "step": 1, "rank": 0,
               "purpose": EVIL}  # fmt: skip
    write_lines(directory / "quarantine" / "rank-00000.jsonl", [skipped])
    said = dict.fromkeys(("source", "shard", "key", "prompt", "prediction", "reference"), EVIL)
    write_lines(directory / "predictions" / "step-3.jsonl", [said | {"match": False}])
    return directory


def test_nothing_from_the_data_becomes_markup(tmp_path):
    runs = [evil_run(tmp_path / "<b>one"), evil_run(tmp_path / "two")]
    for chosen in (runs[:1], runs):
        page = tmp_path / "page.html"
        write_page(make_report(chosen), page)
        text = page.read_text()
        assert "<img src=x" not in text and "<b>one" not in text and text.count("&lt;img src=x") > 10


def test_answers_are_judged_by_what_the_file_says(tmp_path):
    def answers(rows):
        run = make_run(tmp_path, [train_line(1)])
        write_lines(
            run / "predictions" / "step-8.jsonl",
            [{"key": str(n), "prediction": "a", **row} for n, row in enumerate(rows)],
        )
        found = choose_answers(read_run(run))
        assert found is not None
        return found.criterion, sorted(one.key for one in found.right), sorted(one.key for one in found.wrong)

    assert answers([{"match": True}, {"match": False}]) == ("exact match", ["0"], ["1"])
    assert answers([{"exact_match": 1.0, "anls": 0.1}, {"exact_match": 0.0}])[1:] == (["0"], ["1"])
    assert answers([{"anls": 0.7}, {"anls": 0.2}, {"anls": None}]) == ("anls of at least 0.5", ["0"], ["1", "2"])
    assert answers([{"wer": 0.2}, {"wer": 1.3}]) == ("wer of at most 0.5", ["0"], ["1"])
    assert answers([{}])[0] == "the file does not say which are right"


def test_control_characters_do_not_reach_the_terminal(tmp_path):
    run = make_run(tmp_path, [train_line(1)], [started(0, host="a\x1b[31mred\x07")])
    out = io.StringIO()
    print_report(make_report([run], with_pictures=False), Console(file=out, width=100))
    assert "\x1b" not in out.getvalue() and "red" in out.getvalue() and "loss" in out.getvalue()


def test_an_empty_run_is_a_page_too(tmp_path):
    run = make_run(tmp_path / "run", [])
    write_page(make_report([run]), tmp_path / "page.html")
    assert "No step is on record yet." in (tmp_path / "page.html").read_text()
    print_report(make_report([run, make_run(tmp_path / "b", [train_line(1)])]), Console(file=io.StringIO()))


def test_a_long_run_is_read_fast_and_its_page_stays_small(tmp_path):
    lines = [train_line(step, **{"a/loss": 1.0 + step % 7, "b/loss": 2.0}) for step in range(1, 10_001)]
    run = make_run(tmp_path / "run", lines)
    began = time.process_time()
    write_page(make_report([run]), tmp_path / "page.html")
    assert time.process_time() - began < 6  # 1.5 s on a machine that has nothing else to do
    assert (tmp_path / "page.html").stat().st_size < 8 * 2**20


def test_the_command_writes_a_page_and_names_what_is_wrong(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_run(
        tmp_path / "run", [train_line(1), train_line(2)], [started(0), {"event": "done", "time": at(5), "step": 2}]
    )
    assert main(["report", "run", "run", "-o", "pages/page.html", "--x", "tokens"]) == 0
    assert "wrote pages/page.html" in capsys.readouterr().out
    assert 'value="tokens" checked' in (tmp_path / "pages" / "page.html").read_text()
    assert main(["report", "run", "--terminal"]) == 0
    said = capsys.readouterr().out
    assert "run  done" in said and not (tmp_path / "report.html").exists()
    assert main(["report", "run", "nowhere"]) == 3
    assert "nowhere: no such directory" in capsys.readouterr().err


def test_torch_is_not_imported(tmp_path):
    make_run(tmp_path / "run", [train_line(1)])
    code = (
        "import sys; from vlm_dist.cli import main; "
        f"main(['report', {str(tmp_path / 'run')!r}, '--terminal', '-o', {str(tmp_path / 'page.html')!r}]); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_small_forms():
    assert sparkline(Lines([train_line(s, loss=s if s != 3 else None) for s in (1, 2, 3, 4)])["loss"]) == "▁▃ █"
    assert [short(n) for n in (12, 99_999, 1_234_567, 4.5e9)] == ["12", "99,999", "1.23 M", "4.5 G"]
    assert describe_ranks([3, 0, 1, 2, 8, "x"]) == "0-3, 8"
    assert describe_life({}, 4).title == "start 4 on - UTC"
