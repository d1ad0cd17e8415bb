"""`train.torch_compile` through the command line: the same curve and checkpoint, and a word where it cannot be."""

from __future__ import annotations

import pytest
from safetensors.torch import load_file

from tests.tiny_run import TinyRun, make_tiny_run
from vlm_dist.errors import ExitCode

pytestmark = pytest.mark.e2e

SHORT = ("train.max_steps=4", "peft.lora_dropout=0.0")
#: Needs no compiler, and takes the same way up to the code that would be generated.
COMPILED = (*SHORT, "train.torch_compile=true", "train.torch_compile_backend=aot_eager")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    return make_tiny_run(tmp_path_factory.mktemp("compiled"), num_images=20, num_clips=4)


def test_a_compiled_run_stops_and_goes_on_as_the_plain_one(run: TinyRun) -> None:
    plain = run.train(*SHORT, "train.output_dir=plain", "train.eval_steps=4")
    assert plain.exit_code == 0, plain.output[-3000:]
    first = run.train(*COMPILED, "train.output_dir=compiled", "train.stop_at_step=2", "train.memory_check=true")
    assert first.exit_code == 0, first.output[-3000:]
    assert "torch.compile (aot_eager): language: 2 of 2 blocks; vision: 0 of 1 blocks" in first.output
    rest = run.train(
        *COMPILED,
        "train.output_dir=compiled",
        "train.resume=auto",
        "train.eval_steps=4",
        "train.predict_with_generate=true",
    )
    assert rest.exit_code == 0, rest.output[-3000:]
    assert "resumed from" in rest.output
    assert run.losses("compiled") == pytest.approx(run.losses("plain"), rel=1e-5)
    evaluated = [run.metrics(name, "eval")[-1] for name in ("plain", "compiled")]
    assert evaluated[1]["images/loss"] == pytest.approx(evaluated[0]["images/loss"], rel=1e-5)
    adapters = [
        load_file(run.directory / name / "adapter" / "adapter_model.safetensors") for name in ("plain", "compiled")
    ]
    assert set(adapters[0]) == set(adapters[1])
    assert sorted(adapters[0]) == sorted(key for key in adapters[1] if "_orig_mod" not in key)


def test_a_machine_without_a_compiler_says_so_before_the_start(run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/no/such/compiler")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(run.directory / "code"))
    ended = run.train(*SHORT, "train.output_dir=none", "train.torch_compile=true")
    assert ended.exit_code == ExitCode.CONFIG, ended.output[-3000:]
    assert "train.torch_compile: torch.compile does not work on this machine" in ended.output
    assert "Traceback" not in ended.output and "LoRA modules" not in ended.output
    refused = run.train(*COMPILED, "train.output_dir=none", "deepspeed=ds_configs/tiny3.json")
    assert refused.exit_code == ExitCode.CONFIG, refused.output[-3000:]
    assert "train.torch_compile: got true under ZeRO-3" in refused.output
