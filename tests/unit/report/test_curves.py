"""Curves tell the truth: gaps stay gaps, extremes survive thinning, totals are of what counts."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.unit.report.runs import make_run, train_line, write_lines
from vlm_dist.report.comparison import differing_settings, final_figures, flattened
from vlm_dist.report.curves import make_charts
from vlm_dist.report.evaluations import held_out_loss
from vlm_dist.report.figures import axes_of, chart_figure, isolated
from vlm_dist.report.points import Clock, running_mean, thinned
from vlm_dist.report.run_files import read_run


def test_thinning_keeps_extremes_and_gaps():
    values = np.sin(np.arange(50_000) / 700)
    values[12_345], values[23_456], values[40_000:40_010] = 99, -99, np.nan
    rows = thinned(values, 1000)
    assert len(rows) <= 1000 + 2 and {0, 12_345, 23_456, 40_000, 49_999} <= set(rows.tolist())
    assert thinned(values[:1000], 1000).tolist() == list(range(1000))


def test_means_leave_out_what_is_not_known():
    values = np.asarray([1.0, 3.0, np.nan, 5.0])
    assert running_mean(values, 3).tolist()[:2] == [2.0, 2.0]
    assert np.isnan(running_mean(values, 3)[2])


def test_what_was_not_recorded_is_a_gap(tmp_path):
    lines = [train_line(step) for step in (1, 2, 3, 7, 8)]
    lines[1]["loss"] = None
    run = read_run(make_run(tmp_path, lines))
    loss = next(chart for chart in make_charts([run]) if chart.key == "loss").curves[0]
    assert [None if np.isnan(y) else round(4 / y) for y in loss.points.y] == [1, None, 3, None, 7, 8]
    figure = chart_figure(make_charts([run])[0], [run], "step", axes_of([run]))
    assert figure.data[0].y == (4.0, None, pytest.approx(4 / 3, rel=1e-5), None, pytest.approx(4 / 7, rel=1e-5), 0.5)
    assert not figure.data[0].connectgaps


def test_a_point_between_two_gaps_is_seen():
    assert isolated(np.asarray([1.0, np.nan, 2.0, np.nan, 3.0, 4.0])) == [True, False, True, False, False, False]


def test_time_and_tokens_are_counted_over_windows(tmp_path):
    run = read_run(make_run(tmp_path, [train_line(10, num_window_steps=10), train_line(15, num_window_steps=5)]))
    clock = Clock(run.train)
    assert clock.tokens.tolist() == [20_000, 30_000] and clock.samples.tolist() == [200, 300]
    assert (clock.at([0, 9, 10, 15])["time"] * 3600).tolist() == [0, 0, 20, 30]


def test_several_runs_have_a_table_of_final_figures(tmp_path):
    first = make_run(tmp_path / "first", [train_line(1), train_line(2, mfu=0.4)])
    second = make_run(tmp_path / "second", [train_line(1), train_line(2, loss=0.5), train_line(3, loss=None)])
    for path, loss in ((first, 1.5), (second, 0.75)):
        with (path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"kind": "eval", "step": 2, "images/loss": loss, "clips/loss": 2.0}) + "\n")
    rows = {row.name: row for row in final_figures([read_run(first), read_run(second)])}
    assert rows["steps"].cells == ("2 of 40 (5%)", "3 of 40 (8%)")
    assert rows["loss, last line"].cells == ("2.0000", "0.5000") and rows["loss, last line"].best == {1}
    assert rows["held-out loss, last"].cells == ("1.7500", "1.3750")
    assert rows["held-out loss of clips, last"].best == frozenset()  # they are equal
    assert rows["MFU"].cells == ("40.0%", "-")


def test_settings_that_differ_are_listed_and_places_are_not():
    base = {"train": {"lr": 1, "output_dir": "a"}, "data": {"train": [{"path": "x", "where": {}}]}}
    other = {"train": {"lr": 2, "output_dir": "b", "new": None}, "data": {"train": [{"path": "y", "where": {}}]}}
    rows = {row.name: row.cells for row in differing_settings([base, other])}
    assert rows == {"train.lr": ("1", "2"), "train.new": ("-", "null"), "data.train[0].path": ("x", "y")}
    assert flattened({"a": {"b": [1, 2]}}) == {"a.b": [1, 2]}


def test_superseded_attempts_are_pieces_of_their_own(tmp_path):
    make_run(tmp_path, [train_line(step) for step in range(1, 7)])
    write_lines(tmp_path / "metrics_superseded.jsonl", [train_line(3), train_line(4), train_line(3), train_line(4)])
    loss = make_charts([read_run(tmp_path)])[0]
    assert [curve.kind for curve in loss.curves] == ["line", "faint"]
    assert np.isnan(loss.curves[1].points.y).tolist() == [False, False, True, False, False]


def test_the_loss_over_all_samples_is_that_of_held_out_data():
    assert held_out_loss({"step": 1, "a/loss": 1.0, "b/loss": 3.0, "overall/loss": 1.5, "a/exact_match": 0.2}) == 1.5
    assert held_out_loss({"step": 1, "a/loss": 1.0, "b/loss": 3.0}) == 2.0
    assert np.isnan(held_out_loss({"step": 1, "a/loss": None})) and np.isnan(held_out_loss({"step": 1}))
