"""The benchmark of the count of operations: what it compares, and that it sees a formula that is off."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from tests.bench.flops import AIM, SETTINGS, Setting, batch_of, body, deviations
from tests.bench.report import Report
from tests.unit.families.subjects import subject
from vlm_dist.model import flop_parts


def setting(words: str) -> Setting:
    return next(one for one in SETTINGS if words in one.name)


def test_each_setting_has_the_batch_that_it_says() -> None:
    one = subject("qwen2_vl")
    padded, packed, clips = (batch_of(one, setting(words)) for words in ("projector", "without a mask", "clips"))
    assert padded is not None and packed is not None and clips is not None
    assert padded.num_computed_tokens > padded.num_tokens and padded.inputs["attention_mask"].shape[0] == 3
    assert packed.inputs["cu_seq_lens"].numel() == 4 and "attention_mask" not in packed.inputs
    assert "pixel_values_videos" in clips.inputs
    paligemma = subject("paligemma")
    assert [batch_of(paligemma, setting(words)) for words in ("behind a mask", "without a mask", "clips")] == [None] * 3


@pytest.mark.parametrize("words", ["without a mask", "everywhere, clips"])
def test_a_formula_that_is_off_is_seen(words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    one = subject("qwen2_vl")
    kept, recomputed = deviations(one, setting(words))
    assert abs(kept) < 0.01 and abs(recomputed) < 0.01
    own = flop_parts.model_parts

    def without_backward(base: object) -> object:
        products, attentions = own(base)
        return tuple(replace(product, has_input_gradient=False) for product in products), attentions

    monkeypatch.setattr("vlm_dist.model.flops.model_parts", without_backward)
    assert all(found < -AIM for found in deviations(one, setting(words)))


def test_the_page_tells_what_is_missed(capsys: pytest.CaptureFixture[str]) -> None:
    report = Report()
    report.add("a/one", 0.5, "% off", AIM)
    report.add("b/one", 7.25, "% off", AIM)
    report.summarise()
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["summary"] == {"met": ["a/one"], "missed": ["b/one"]}
    page = body(report, ["| a | +0.50% |"])
    assert "Met by 1 of 2; the largest deviation is 7.25 % (b/one)" in page.replace("\n", " ")
