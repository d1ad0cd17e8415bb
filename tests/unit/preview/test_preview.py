"""What a preview tells is what training gets: the same tensors, the planner's own figures, every source."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from tests.e2e.faulty_decoder import CRASHES, FaultyMaterialiser
from tests.e2e.media import CHINA
from tests.preview_run import EVIL_NAME, EVIL_QUESTION, KOREAN_ANSWER, write_preview_run
from vlm_dist.cli.main import main
from vlm_dist.data.plan.measure import measure
from vlm_dist.data.types import NullSlot
from vlm_dist.errors import ConfigError
from vlm_dist.preview.batching import measure_modes
from vlm_dist.preview.choosing import choose_samples
from vlm_dist.preview.lengths import even_rows, measure_lengths
from vlm_dist.preview.opening import OpenRun, open_run
from vlm_dist.preview.pixels import pictures_of_tensors
from vlm_dist.preview.preview import Preview, make_preview
from vlm_dist.preview.samples import view_samples
from vlm_dist.preview.terminal import print_preview
from vlm_dist.preview.tokens import TokenReader


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    directory = tmp_path_factory.mktemp("preview")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        yield write_preview_run(directory)


@pytest.fixture(scope="module")
def run(run_file: Path) -> OpenRun:
    return open_run(run_file)


@pytest.fixture(scope="module")
def preview(run_file: Path) -> Preview:
    return make_preview(run_file, count=16, num_workers=0)


def printed(preview: Preview, colours: bool) -> str:
    stream = io.StringIO()
    print_preview(preview, Console(file=stream, width=200, force_terminal=colours, highlight=False, _environ={}))
    return stream.getvalue()


@pytest.mark.parametrize("overrides", [(), ("train.packing=true",)])
def test_what_is_shown_is_the_micro_batch_of_training(run_file: Path, overrides: tuple[str, ...]) -> None:
    run = open_run(run_file, overrides)
    chosen = choose_samples(run, 16)
    for job in {id(one.job): one.job for one in chosen}.values():
        trained = run.materialise["train"](job)
        batch, told = run.materialise["train"].look_inside(job)
        assert torch.equal(batch.labels, trained.labels)
        assert all(
            torch.equal(torch.as_tensor(batch.inputs[name]), torch.as_tensor(one))
            for name, one in trained.inputs.items()
        )
        assert [one.origin for one in told if not isinstance(one, NullSlot)] == trained.origins
        for inside in told:
            if isinstance(inside, NullSlot):
                continue
            own = slice(inside.start, inside.start + len(inside.answers))
            assert torch.equal(trained.labels[inside.row, own] != -100, inside.answers)
    samples = view_samples(run, chosen, 0)
    assert len(samples.views) == 16
    assert {view.is_packed for view in samples.views if view.error is None} == {bool(overrides)}
    assert sum(view.num_targets for view in samples.views) > 0 and samples.prompt_share == 0


def test_held_out_samples_come_as_evaluation_has_them(run: OpenRun) -> None:
    samples = view_samples(run, choose_samples(run, 4, held_out=True), 0)
    assert {view.origin.source for view in samples.views} == {"talks", "clips"}
    assert samples.views[0].origin.key == "1"


def test_a_few_samples_have_one_of_every_source(run: OpenRun) -> None:
    for seed in (None, 0, 1):
        assert {one.ref.source for one in choose_samples(run, 3, seed=seed)} == {0, 1, 2}
    with pytest.raises(ConfigError, match=r"--step 99: the run has steps 0 to"):
        choose_samples(run, 3, step=99)


def test_what_cannot_be_used_says_why(preview: Preview) -> None:
    (torn,) = [view for view in preview.samples.views if view.error is not None]
    assert torn.error_class == "decode" and "torn.jpg" in (torn.error or "")
    assert preview.remarks[0].level == "bad" and "1 of 16 samples cannot be used" in preview.remarks[0].text


def test_what_kills_its_decoder_is_shown_too(run_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import vlm_dist.build.data

    flower = Path("media/flower.jpg").read_bytes()
    monkeypatch.setattr(vlm_dist.build.data, "Materialiser", FaultyMaterialiser)
    with Path("media/flower.jpg").open("ab") as stream:
        stream.write(CRASHES)
    try:
        run = open_run(run_file)
        samples = view_samples(run, choose_samples(run, 16))
    finally:
        Path("media/flower.jpg").write_bytes(flower)
    crashed = [view for view in samples.views if view.error_class == "crash"]
    assert {view.origin.key for view in crashed} == {"2", "7"}
    assert len([view for view in samples.views if view.error is None]) == 13


def test_loss_on_prompts_is_told_first(run_file: Path) -> None:
    preview = make_preview(run_file, ["collator.label_masking.mask_input_tokens=false"], count=4, num_workers=0)
    told = [remark for remark in preview.remarks if "of the loss is on tokens of prompts" in remark.text]
    assert [remark.level for remark in told] == ["warn"] and "mask_input_tokens is false" in told[0].text
    assert preview.samples.prompt_share > 0.1


def test_tokens_come_whole_and_in_order(run: OpenRun) -> None:
    reader, tokenizer = TokenReader(run.tokenizer), run.tokenizer
    text = f"<|im_start|>user\nHm:  {KOREAN_ANSWER}\ttwo  spaces\n<|im_end|>\n"
    ids = tokenizer(text)["input_ids"]
    pad = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    ids = [*ids[:2], *[pad] * 300, *ids[2:]]
    is_visual = [number == pad for number in ids]
    has_loss = [place > 310 for place in range(len(ids))]
    pieces = reader.pieces(ids, has_loss, has_loss, is_visual)
    assert "".join(piece.text for piece in pieces if piece.kind != "visual") == text
    assert [(piece.text, piece.count) for piece in pieces if piece.kind == "visual"] == [("<|image_pad|>", 300)]
    assert not any("\ufffd" in piece.text for piece in pieces)
    assert [piece.first for piece in pieces] == np.cumsum([0, *(piece.count for piece in pieces)])[:-1].tolist()
    assert all(piece.has_loss == any(has_loss[piece.first : piece.first + piece.count]) for piece in pieces)


def test_the_picture_is_the_one_in_the_tensor(run: OpenRun) -> None:
    made = run.processor.image_processor(images=[Image.fromarray(CHINA)], return_tensors="pt")
    ((shown,),) = pictures_of_tensors(dict(made), run.processor, "image")
    height, width = shown.shape[:2]
    wanted = np.asarray(Image.fromarray(CHINA).resize((width, height), Image.Resampling.BICUBIC))
    assert np.abs(shown.astype(int) - wanted.astype(int)).mean() < 2
    tile = torch.zeros((1, 3, 8, 12))
    assert pictures_of_tensors({"pixel_values": tile}, run.processor, "image")[0][0].shape == (8, 12, 3)
    assert pictures_of_tensors({"pixel_values": torch.zeros(7, 13)}, run.processor, "image") == []


def test_modes_are_measured_by_the_planner(run: OpenRun) -> None:
    modes = {mode.mode: mode for mode in measure_modes(run)}
    own = modes[run.plan.settings.mode]
    steps = [run.plan.step(index) for index in range(run.plan.steps_per_epoch)]
    assert own.is_own and own.figures == measure(run.plan, steps, 1)
    assert modes["packing"].figures is not None and modes["padding"].figures is not None
    assert modes["packing"].figures.padding_share == 0 < modes["padding"].figures.padding_share


def test_lengths_of_all_sources(run: OpenRun) -> None:
    lengths = measure_lengths(run, [1.0, 1.0, 1.0])
    assert [len(source.tokens) for source in lengths.sources] == [7, 2, 7]
    assert not lengths.are_exact and not lengths.is_sampled and lengths.max_length == 512
    assert lengths.sources[0].num_at_limit >= 1 and lengths.sources[2].patches_at(1.0) == 0


def test_counted_lengths_say_what_becomes_of_samples(run_file: Path) -> None:
    own_index = "data.index_dir=counted"
    assert main(["shards", "tokens", str(run_file), "--set", own_index, "--workers", "0"]) == 0
    preview = make_preview(run_file, [own_index], count=1, num_workers=0)
    assert preview.lengths.are_exact and "counted" in preview.lengths_intro
    assert preview.lengths.outcomes == {"made smaller": 0, "cut": 1, "too long": 0, "unusable": 0}
    assert "max_length 512, of 16 samples: 1 cut" in [remark.text for remark in preview.remarks]


def test_padding_that_is_learned_is_told(run_file: Path) -> None:
    preview = make_preview(run_file, ["collator.label_masking.mask_pad_token=false"], count=4, num_workers=0)
    assert "padding carries loss, too (label_masking.mask_pad_token is false)" in [one.text for one in preview.remarks]
    assert [view.pads_have_loss for view in preview.samples.views] == [
        view.row_tokens > view.num_tokens for view in preview.samples.views
    ]


def test_of_huge_data_an_even_share_of_few_shards_is_looked_at() -> None:
    class Huge:
        shard_sizes = (10_000, 0, *([10_000] * 5_000))

        def __len__(self) -> int:
            return sum(self.shard_sizes)

    rows = even_rows(Huge(), max_samples=1000, max_shards=10)  # type: ignore[arg-type]
    assert len(rows) == 1000 and len(set(rows.tolist())) == 1000 and rows.min() == 0 and rows.max() > 40_000_000
    assert len({row // 10_000 for row in rows.tolist()}) == 10


def test_on_a_terminal_loss_is_seen_with_colours_and_without(preview: Preview) -> None:
    plain, coloured = printed(preview, colours=False), printed(preview, colours=True)
    assert f"⟦{KOREAN_ANSWER}<|im_end|>⟧" in plain and "\x1b[" not in plain
    assert "\x1b[" in coloured and "⟦" not in coloured
    for text in (EVIL_NAME, EVIL_QUESTION, "<|image_pad|> x ", "torn.jpg", "at 0.00, 0.", "group_by_length", "⟦"):
        assert text in plain
