"""Other families than the demo's through the real command line: known by three lines, or by their classes alone."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoTokenizer, GenerationConfig

from tests.e2e.preloaded import Preloaded
from tests.tiny_run import Finished, TinyRun, write_configs
from tests.unit.families.page import FAMILIES_SHOWN, read_page
from tests.unit.families.zoo import CHECKPOINTS
from tests.unit.families.zoo.originals import ORIGINALS
from vlm_dist.build import make_materialisers, make_processor, open_sources_alone
from vlm_dist.config import load_run
from vlm_dist.data.shards.writer import ShardWriter
from vlm_dist.data.types import MicroBatch, MicroBatchJob, SampleRef
from vlm_dist.demo.digits import encode_clip, encode_png

pytestmark = pytest.mark.e2e

#: All but those that need code of their authors.
FAMILIES = [*(name for name in FAMILIES_SHOWN if name in CHECKPOINTS), "internvl2"]
STEPS = 40
ANSWER = "it is 7"
IMAGES = "{name: images, type: tar, path: data/images, columns: {image: png}}"
CLIPS = "{name: clips, type: tar, path: data/clips, columns: {video: mp4}}"
#: Some entry of the shipped vlm_model_config.yaml has the classes of these; the others are added to it by three lines.
BY_CLASSES_ALONE = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava", "internvl", "paligemma")
#: What ends an answer, beside the tokenizer's own end of a text: as in the generation_config.json of what is published.
ENDS = {
    "gemma3": "<end_of_turn>",
    "idefics2": "<end_of_utterance>",
    "idefics3": "<end_of_utterance>",
    "smolvlm": "<end_of_utterance>",
}
#: Tiny Gemma's norms hold its layers small beside its tied embeddings: LoRA does not get past the prompt's last token.
FULL = {"gemma3": "peft.towers={vision: lora, projector: lora, language: full}"}
THREE_LINES = """
    "{directory}":
        model_class: "{model_class}"
        processor_class: "{processor_class}"
        import_path: "transformers"
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """Shards with pictures and clips, a model of each family, and vlm_model_config.yaml with those that need lines."""
    torch.set_num_threads(1)
    directory = tmp_path_factory.mktemp("families")
    write_configs(directory, torch.float32)
    write_data(directory / "data")
    known = directory / "configs" / "vlm_model_config.yaml"
    top, bottom = known.read_text().split("# Arguments of the model's from_pretrained", 1)
    for name in FAMILIES:
        checkpoint = (CHECKPOINTS | ORIGINALS)[name]
        model = checkpoint.save(directory / "models" / name)
        if name in ENDS:
            tokenizer = AutoTokenizer.from_pretrained(model)
            ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(ENDS[name])]
            GenerationConfig(eos_token_id=ends, pad_token_id=tokenizer.pad_token_id).save_pretrained(model)
        if name not in BY_CLASSES_ALONE:
            top += THREE_LINES.format(
                directory=f"models/{name}",
                model_class=checkpoint.entry.model_class,
                processor_class=checkpoint.entry.processor_class,
            )
    known.write_text(f"{top}\n# Arguments of the model's from_pretrained{bottom}")
    return TinyRun(directory)


def write_data(directory: Path) -> None:
    """Eight pictures of different sizes and eight clips, all with the same question and the same answer."""
    rng = np.random.default_rng(0)
    text = {"question": "Which digit?", "answer": ANSWER, "image": None, "video": None}
    for name in ("images", "clips"):
        with ShardWriter(directory / name, prefix=name, max_samples=16) as writer:
            for number in range(8):
                shape = (int(rng.integers(20, 90)), int(rng.integers(20, 90)), 3)
                if name == "images":
                    media = {"png": encode_png(rng.integers(0, 255, shape, dtype=np.uint8))}
                else:
                    frames = [rng.integers(0, 255, (56, 56, 3), dtype=np.uint8) for _ in range(4)]
                    media = {"mp4": encode_clip(frames)}
                writer.write({"__key__": f"{number:06d}", "json": text, **media})


def cache_of(run: TinyRun) -> dict[str, str]:
    """Where checkpoints in their authors' own format are converted to."""
    return {"VLM_DIST_CACHE": str(run.directory / "cache")}


def kinds_of(name: str) -> tuple[str, ...]:
    """What a family is shown: pictures and clips where it takes both in one run, clips rather than pictures else."""
    if read_page()[name, "image + video"][0] == "yes":
        return ("image", "video")
    return ("video",) if read_page()[name, "video"][0] == "yes" else ("image",)


def overrides_of(name: str, *more: str) -> list[str]:
    kinds = kinds_of(name)
    sources = ", ".join(one for kind, one in (("image", IMAGES), ("video", CLIPS)) if kind in kinds)
    return [
        f"model_id=models/{name}",
        f"collator.data_processing.image_data={str('image' in kinds).lower()}",
        f"collator.data_processing.video_data={str('video' in kinds).lower()}",
        "collator.text_processing.max_length=1024",
        f"data.train=[{sources}]",
        f"data.eval=[{sources}]",
        f"train.output_dir={name}",
        f"train.max_steps={STEPS}",
        "train.per_device_train_batch_size=4",
        "train.gradient_accumulation_steps=1",
        "train.gradient_checkpointing=false",
        "train.learning_rate=2e-2",
        "train.lr_scheduler_type=constant",
        "peft.lora_dropout=0",
        *([FULL[name]] if name in FULL else []),
        "train.predict_with_generate=true",
        "train.generation_max_new_tokens=12",
        *more,
    ]


def train(run: TinyRun, process: Preloaded, overrides: list[str]) -> Finished:
    command = ["--config", str(run.config)]
    for override in overrides:
        command += ["--set", override]
    ended = process.run("vlm_dist.train", command, run.directory, cache_of(run), timeout_seconds=120)
    assert ended.exit_code == 0, ended.output
    assert "Traceback" not in ended.output
    return ended


def first_batch(run: TinyRun, overrides: list[str]) -> MicroBatch:
    """One micro-batch of the run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(run.directory)
        patch.setenv("VLM_DIST_CACHE", cache_of(run)["VLM_DIST_CACHE"])
        config = load_run(run.config, overrides)
        sources = open_sources_alone(config, "train")
        processor, family = make_processor(config)
        make = make_materialisers(config, sources, [], processor, family)
        return make(MicroBatchJob(0, 0, tuple(SampleRef(number, 0) for number in range(len(sources)))))


def check_adapter(run: TinyRun, name: str, adapter: Path) -> None:
    """PEFT and transformers alone load what was trained, and it makes a difference to pictures and text."""
    batch = first_batch(run, overrides_of(name))
    assert not batch.null_slots
    source = run.directory / "models" / name
    if name in ORIGINALS:
        (source,) = {file.parent for file in run.directory.glob("cache/converted/*/model*.safetensors")}
    base = AutoModelForImageTextToText.from_pretrained(source, dtype=torch.float32).eval()
    with torch.no_grad():
        before = base(**batch.inputs, use_cache=False).logits
        loaded = PeftModel.from_pretrained(base, adapter).eval()
        after = loaded(**batch.inputs, use_cache=False).logits
        assert (after - before).abs().max() > 1e-2
        for key, weight in loaded.named_parameters():
            assert "lora_B" not in key or weight.abs().max() > 0, key


@pytest.mark.parametrize("name", FAMILIES)
def test_it_learns_to_answer(run: TinyRun, process: Preloaded, name: str) -> None:
    """What generation begins with is what training has before an answer, and it ends where an answer ended."""
    train(run, process, overrides_of(name, f"train.eval_steps={STEPS}"))
    losses = list(run.losses(name).values())
    assert len(losses) == STEPS and all(map(math.isfinite, losses))
    assert losses[-1] < losses[0] / 3, losses
    (evaluation,) = run.metrics(name, "eval")
    matches = {key: one for key, one in evaluation.items() if key.endswith("exact_match") and "overall" not in key}
    assert len(matches) == len(kinds_of(name))
    assert set(matches.values()) == {1.0}, matches
    check_adapter(run, name, run.directory / name / "adapter")


def test_a_run_over_pictures_and_clips_resumes(run: TinyRun, process: Preloaded) -> None:
    for output_dir, stop in (("whole", 4), ("resumed", 2), ("resumed", 4)):
        more = (f"train.output_dir={output_dir}", f"train.stop_at_step={stop}", "train.resume=auto")
        train(run, process, overrides_of("internvl", *more))
    assert list(run.losses("whole")) == [1, 2, 3, 4]
    assert run.losses("resumed") == run.losses("whole")
