"""peft_config.yaml in whole runs: full towers are saved, resumed and started from."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from typing import Any

import pytest

from tests.tiny_run import TinyRun
from tests.unit.test_key_effects.registry import shows

pytestmark = pytest.mark.e2e

COMMON = {"train.lr_scheduler_type": "constant", "train.learning_rate": 3e-3, "peft.lora_dropout": 0.0}
FULL = {"peft.towers.projector": "full", "peft.towers_learning_rate.projector": 1e-3, "train.max_steps": 4}
WHOLE_MODEL = {"peft.towers": {"vision": "full", "projector": "full", "language": "full"}, "train.weight_decay": 0.1}
AT_START = {"train.eval_on_start": True, "train.max_steps": 1}

VARIANTS: dict[str, dict[str, Any]] = {
    "whole": FULL | {"train.eval_steps": 4},
    "first": FULL | {"train.output_dir": "probe-halves", "train.stop_at_step": 2},
    "second": FULL | {"train.output_dir": "probe-halves", "train.resume": "auto"},
    "anew": FULL | AT_START | {"peft.adapter": "probe-whole/adapter"},
    "no_adapter": WHOLE_MODEL | {"train.max_steps": 2, "train.eval_steps": 2, "train.save_steps": 1},
    "no_adapter_anew": WHOLE_MODEL | AT_START | {"peft.adapter": "probe-no_adapter/adapter"},
    "fresh": AT_START,
    "tokens": {
        "model.processor_params.new_special_tokens": ["<digit>", "<|im_end|>"],
        "peft.modules_to_save": ["embed_tokens", "lm_head"],
        "train.max_steps": 2,
        "train.save_steps": 1,
    },
}


@pytest.fixture(scope="module")
def seen(tiny_run: TinyRun) -> dict[str, Any]:
    variants = tiny_run.directory / "peft-variants.json"
    variants.write_text(json.dumps({name: COMMON | changes for name, changes in VARIANTS.items()}))
    ended = tiny_run.command([sys.executable, "-m", "tests.unit.test_key_effects.probe", str(variants)])
    assert ended.exit_code == 0, ended.output[-3000:]
    line = next(line for line in ended.stdout.splitlines() if line.startswith("PROBE "))
    return json.loads(line.removeprefix("PROBE ")) | {"output": ended.output}


def evaluated(tiny_run: TinyRun, output_dir: str) -> float:
    (record,) = tiny_run.metrics(output_dir, "eval")
    return record["images/loss"]


@shows("peft.towers.projector")
def test_full_weights_are_resumed_bit_for_bit(seen: dict[str, Any], tiny_run: TinyRun) -> None:
    assert tiny_run.losses("probe-halves") == tiny_run.losses("probe-whole")
    config = json.loads((tiny_run.directory / "probe-whole" / "adapter" / "adapter_config.json").read_text())
    assert {name.rpartition(".")[2] for name in config["modules_to_save"]} == {"ln_q", "0", "2"}
    listing = (tiny_run.directory / "probe-whole" / "trained_modules.txt").read_text()
    assert "model.visual.merger.mlp.*.weight" in listing and "language_model.layers.*.mlp.up_proj" in listing
    assert re.search(r"projector +full .* 0\.001\n", seen["output"])


@shows("model.processor_params.new_special_tokens")
def test_new_tokens_are_saved_with_the_adapter(seen: dict[str, Any], tiny_run: TinyRun) -> None:
    from safetensors.torch import load_file
    from transformers import AutoProcessor

    (rows,) = re.findall(r"1 new special tokens; the vocabulary has (\d+) rows", seen["output"])
    saved = load_file(tiny_run.directory / "probe-tokens" / "adapter" / "adapter_model.safetensors")
    (embedding,) = [weight for key, weight in saved.items() if key.endswith("embed_tokens.weight")]
    assert embedding.shape[0] == int(rows)
    tokenizer = AutoProcessor.from_pretrained(tiny_run.directory / "probe-tokens" / "processor").tokenizer
    assert tokenizer("<digit>")["input_ids"] == [int(rows) - 1]


@shows("peft.adapter")
def test_a_run_starts_from_what_another_trained(seen: dict[str, Any], tiny_run: TinyRun) -> None:
    fresh = evaluated(tiny_run, "probe-fresh")
    for name in ("whole", "no_adapter"):
        assert evaluated(tiny_run, f"probe-{name}_anew" if name == "no_adapter" else "probe-anew") == pytest.approx(
            evaluated(tiny_run, f"probe-{name}"), rel=1e-6
        )
        assert abs(evaluated(tiny_run, f"probe-{name}") - fresh) > 1e-3
    assert "started from probe-whole/adapter: " in seen["output"]


@pytest.mark.usefixtures("seen")
def test_without_lora_weights_are_saved_by_name(tiny_run: TinyRun) -> None:
    from safetensors import safe_open

    final = tiny_run.directory / "probe-no_adapter" / "adapter"
    assert [path.name for path in final.iterdir()] == ["trained_weights.safetensors"]
    with safe_open(final / "trained_weights.safetensors", framework="pt") as file:
        assert {"lm_head.weight", "model.visual.patch_embed.proj.weight"} <= set(file.keys())


@pytest.mark.usefixtures("seen")
def test_an_adapter_is_started_from_under_zero_3_on_two_ranks(tiny_run: TinyRun) -> None:
    changes = COMMON | FULL | AT_START | {"deepspeed": "ds_configs/tiny3.json", "train.output_dir": "two"}
    changes |= {"peft.adapter": "probe-whole/checkpoint-4"}
    ended = tiny_run.train(*(f"{key}={json.dumps(value)}" for key, value in changes.items()), processes=2)
    assert ended.exit_code == 0, ended.output[-3000:]
    assert evaluated(tiny_run, "two") == pytest.approx(evaluated(tiny_run, "probe-whole"), rel=1e-5)


@pytest.mark.usefixtures("seen")
@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (["peft.r=4"], "r: 8 there, 4 here. To start from it, set peft: {r: 8}"),
        (["peft.towers.projector=lora"], "weights that this run does not train"),
        (["peft.target_modules=[q_proj]"], "weights that this run does not train"),
        (["peft.adapter=nowhere"], "nowhere is no directory with adapter_config.json"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(tiny_run: TinyRun, changes: list[str], expected: str) -> None:
    given = ["peft.adapter=probe-whole/adapter", "peft.towers.projector=full", "train.output_dir=refused", *changes]
    ended = tiny_run.train(*given)
    assert ended.exit_code != 0
    assert expected in ended.output.replace("\n", " "), ended.output[-2000:]
    assert "Traceback" not in ended.output


@shows("peft.quantization")
@pytest.mark.usefixtures("seen")
def test_the_base_is_packed_or_the_run_refused(tiny_run: TinyRun) -> None:
    """A packed base computes other logits; without the library that packs it, the run ends before loading anything."""
    refused = tiny_run.train("peft.quantization=nf4", "train.output_dir=packed3", "deepspeed=ds_configs/tiny3.json")
    assert refused.exit_code != 0 and "nf4 does not work under ZeRO-3" in refused.output
    ended = tiny_run.train(
        "peft.quantization=nf4", "train.output_dir=packed", "train.max_steps=1", "train.eval_steps=1"
    )
    if importlib.util.find_spec("bitsandbytes") is None:
        assert ended.exit_code != 0 and "needs bitsandbytes: pip install 'vlm-dist[qlora]'" in ended.output
        return
    assert ended.exit_code == 0, ended.output[-3000:]
    assert 1e-4 < abs(evaluated(tiny_run, "packed") - evaluated(tiny_run, "probe-fresh")) < 1
