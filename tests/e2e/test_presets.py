"""The run files of configs/presets: each is sound, and those that differ in kind train on tiny stand-ins."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.tiny_run import ROOT, TinyRun, make_tiny_run
from vlm_dist.config import load_run
from vlm_dist.engine import load_deepspeed_json

PRESETS = sorted((ROOT / "configs" / "presets").glob("*.yaml"))
#: What a preset may be told: nothing that it could have avoided.
EXPECTED = ("device_map: auto has no effect", "no held-out samples: no evaluation", "packing wins, as it pads nothing")
FIVE_MODELS = {
    "Qwen/Qwen2-VL-2B-Instruct",
    "llava-hf/llava-1.5-7b-hf",
    "OpenGVLab/InternVL2-2B",
    "google/paligemma-3b-pt-448",
    "microsoft/Phi-3-vision-128k-instruct",
}


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_a_preset_is_sound(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    config = load_run(path)
    surprising = [line for line in config.notices if not any(known in line for known in EXPECTED)]
    assert not surprising
    load_deepspeed_json(config.deepspeed)
    first = path.read_text().splitlines()[0]
    assert f"configs/presets/{path.name}" in first  # the command that runs it
    assert re.match(r"# (RUN_FILE=\S+ sbatch|deepspeed --num_gpus 8 -m|python -m) ", first)


def test_there_is_one_for_every_model_and_kind() -> None:
    configs = {path.stem: load_run(path) for path in PRESETS}
    assert {config.model_id for config in configs.values()} >= FIVE_MODELS
    assert {"image", "video", "mixed", "debug_single_gpu", "eight_gpus", "multi_node"} <= set(configs)
    assert len({config.train.output_dir for config in configs.values()}) == len(configs)  # none continues another


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    made = make_tiny_run(tmp_path_factory.mktemp("presets"), num_images=12, num_clips=12)
    lines = [json.dumps({"question": f"What is {number}?", "answer": str(number)}) for number in range(12)]
    (made.directory / "data" / "text.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return made


IMAGES = "{name: pictures, type: tar, path: data/images, columns: {image: png}}"
CLIPS = "{name: clips, type: tar, path: data/clips, columns: {video: mp4}}"
TEXT = "{name: text, type: jsonl, path: data/text.jsonl}"
ENTRY = "{model_class: Qwen2VLForConditionalGeneration, processor_class: Qwen2VLProcessor, import_path: transformers}"


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("name", "sources", "processes"),
    [("image", [IMAGES], 0), ("video", [CLIPS], 0), ("mixed", [IMAGES, CLIPS, TEXT], 0), ("multi_node", [IMAGES], 2)],
)
def test_a_preset_trains(run: TinyRun, name: str, sources: list[str], processes: int) -> None:
    tiny = TinyRun(run.directory)
    command = tiny.train_command(
        "model_id=model",
        f"model.model_classes.model={ENTRY}",
        "model.loading_params.torch_dtype=float32",
        "train.bf16=false",
        "train.report_to=none",
        "train.logging_steps=1",
        "train.stop_at_step=2",
        "train.max_steps=4",
        f"data.train=[{', '.join(sources)}]",
        "data.eval=[]",
        "train.metric_for_best_model=null",
        processes=processes,
    )
    command[command.index("--config") + 1] = f"configs/presets/{name}.yaml"
    finished = tiny.command(command)
    assert finished.exit_code == 0, finished.output
    assert [record["step"] for record in tiny.metrics(f"runs/{name}")] == [1, 2]
    assert all(record["loss"] for record in tiny.metrics(f"runs/{name}"))
