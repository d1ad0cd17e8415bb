"""The step that is tried first leaves no trace; and where memory runs out, all ranks end and say what to change."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.numerics.in_process import Seen, run_here
from tests.ranks import Ranks, run_ranks
from tests.tiny_run import TinyRun, make_tiny_run
from vlm_dist.build import RunParts, memory_check
from vlm_dist.config import load_run
from vlm_dist.data.types import MicroBatch
from vlm_dist.engine import Engine
from vlm_dist.errors import ConfigError

pytestmark = pytest.mark.engine

BASIC = ("train.max_steps=3", "train.gradient_checkpointing=false", "data.index_dir=index")
CASES: dict[str, tuple[str, ...]] = {
    "zero1, bfloat16": (
        "deepspeed=ds_configs/zero1.json",
        "train.bf16=true",
        "model.loading_params.torch_dtype=bfloat16",
    ),
    "zero2, packed, dropout": (
        "deepspeed=ds_configs/tiny2.json",
        "train.packing=true",
        "train.pack_max_tokens=300",
        "peft.lora_dropout=0.1",
    ),
    "zero3, recomputed": ("deepspeed=ds_configs/tiny3.json", "train.gradient_checkpointing=true"),
}
TEXT_ONLY = (
    "collator.data_processing.image_data=false",
    "collator.data_processing.video_data=false",
    "collator.message_format.training_messages=[{role: user, content: [{type: text, text: '{question_column}'}]}, "
    "{role: assistant, content: [{type: text, text: '{answer_column}'}]}]",
)


def overrides(name: str, output_dir: str, *more: str) -> tuple[str, ...]:
    return (*BASIC, *CASES.get(name, ()), f"train.output_dir={output_dir}", *more)


def draw(into: list[float], parts: RunParts) -> None:
    """Note the next random numbers of the generators, which come after the check."""
    into += [float(torch.rand(())), float(np.random.rand())]


def with_and_without(ranks: Ranks, run: TinyRun, names: list[str]) -> dict[str, dict[str, Seen]]:
    found: dict[str, dict[str, Seen]] = {}
    for name in names:
        found[name] = {}
        for checked in ("true", "false"):
            folder = f"{name}-{checked}".replace(", ", "-")
            change = f"train.memory_check={checked}"
            drawn: list[float] = []
            torch.manual_seed(0)
            np.random.seed(0)
            first = overrides(name, folder, change, "train.stop_at_step=2")
            seen = run_here(ranks, run, first, gradients=True, prepare=partial(draw, drawn))
            found[name][f"{checked}: start"] = seen
            seen.targets.append(tuple(drawn))
            again = overrides(name, folder, change, "train.resume=auto")
            found[name][f"{checked}: resumed"] = run_here(ranks, run, again, gradients=True)
    return found


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    return make_tiny_run(tmp_path_factory.mktemp("run"), num_images=12, num_clips=4)


@pytest.fixture(scope="module")
def seen(run: TinyRun) -> Any:
    return run_ranks(with_and_without, 2, run, list(CASES), timeout_seconds=280)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("part", ["start", "resumed"])
def test_a_run_is_the_same_to_the_bit_with_and_without(run: TinyRun, seen: Any, name: str, part: str) -> None:
    for rank in seen:
        tried, plain = rank[name][f"true: {part}"], rank[name][f"false: {part}"]
        assert tried.error is plain.error is None
        assert tried.losses == plain.losses and len(plain.losses) == (2 if part == "start" else 1)
        assert tried.targets == plain.targets  # with the next random numbers, where it starts
        for ours, theirs in zip(tried.gradients, plain.gradients, strict=True):
            assert all(np.array_equal(ours[key], theirs[key]) for key in theirs)
    tried, plain = (seen[0][name][f"{checked}: {part}"].state for checked in ("true", "false"))
    assert tried["step"] == plain["step"]
    for key in set(plain) - {"step"}:
        for moment in plain[key]:
            assert np.array_equal(tried[key][moment], plain[key][moment]), (key, moment)


def failing_at(call: str, rank: int | None) -> Callable[[RunParts], None]:
    """Memory runs out in the second call of an engine's verb."""

    def prepare(parts: RunParts) -> None:
        verb, calls = getattr(parts.trainer.engine, call), [0]

        def scarce(*args: Any) -> Any:
            calls[0] += 1
            if calls[0] == 2 and rank in (None, parts.trainer.ranks.rank):
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 4.64 GiB.\nGPU 0 has ...")
            return verb(*args)

        setattr(parts.trainer.engine, call, scarce)

    return prepare


def run_out(ranks: Ranks, run: TinyRun, call: str) -> Seen:
    return run_here(ranks, run, overrides("zero2", f"scarce-{call}"), prepare=failing_at(call, None))


@pytest.mark.parametrize(
    ("call", "expected"),
    [("loss", "step 1: CUDA out of memory"), ("backward", "step 1: CUDA"), ("step", "step 2, optimizer step: CUDA")],
)
def test_later_it_names_the_samples_and_what_to_change(run: TinyRun, call: str, expected: str) -> None:
    for seen in run_ranks(run_out, 2, run, call, timeout_seconds=60):
        assert seen.error is not None and seen.error.startswith("ConfigError: out of memory: " + expected)
        if call != "step":
            assert "samples: images/" in seen.error or "samples: clips/" in seen.error
            assert "the micro-batch has 2 x " in seen.error and "pixel_values" in seen.error
        assert "held between steps on this rank: weights 0.00 GiB" in seen.error
        assert (
            "1. train.per_device_train_batch_size: 2 -> 1 and train.gradient_accumulation_steps: 2 -> 4" in seen.error
        )
        assert "2. train.gradient_checkpointing: true" in seen.error


def test_it_fails_at_minute_one(run: TinyRun) -> None:
    messages = run_ranks(attempt_both, 2, run, timeout_seconds=60)
    for message in messages:
        assert message.startswith("out of memory: memory check before the first step, forward: CUDA out of memory")
        assert "the micro-batch has 2 x 25" in message and "pixel_values" in message


def attempt_both(ranks: Ranks, run: TinyRun) -> str:
    """Both ranks run out alike, as they do where the micro-batch is the same."""
    loss = Engine.loss

    def scarce(engine: Engine, *args: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 4.64 GiB.")

    Engine.loss = scarce  # type: ignore[method-assign]
    try:
        run_here(ranks, run, overrides("zero2", "first", "train.memory_check=true"))
    except ConfigError as error:
        return str(error)
    finally:
        Engine.loss = loss  # type: ignore[method-assign]
    raise AssertionError("it fits")


def worst(run: TinyRun, *changes: str) -> MicroBatch:
    from vlm_dist.build.data import make_processor

    config = load_run(run.config, [*BASIC, *changes])
    sources: list[Any] = [SimpleNamespace(columns=("image", "video", "question", "answer"))]
    processor, family = make_processor(config)
    return memory_check.make_worst_case(
        config, sources, [], processor, family, config.train.per_device_train_batch_size
    )


def test_the_largest_micro_batch_is_as_large_as_the_caps(run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run.directory)
    batch = worst(run, "train.per_device_train_batch_size=3")
    assert (
        batch.labels.shape[0] == 3 and 0.9 * 256 <= batch.labels.shape[1] <= 260
    )  # the other tower's dummy comes behind
    text_only = worst(run, *TEXT_ONLY)
    assert 0.9 * 256 <= text_only.labels.shape[1] <= 256 and "pixel_values" not in text_only.inputs
    few = worst(run, "train.packing=true", "train.pack_max_tokens=600", "train.pack_max_patches=64")
    many = worst(run, "train.packing=true", "train.pack_max_tokens=600")
    for packed in (few, many):
        assert packed.labels.shape[0] == 1 and 0.9 * 600 <= packed.labels.shape[1] <= 664
    assert num_patches(few) <= 64 * 1.1 < num_patches(many)


def num_patches(batch: MicroBatch) -> int:
    return sum(value.shape[0] for key, value in batch.inputs.items() if key.startswith("pixel_values"))


def test_advice_follows_the_configuration(run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run.directory)

    def advice(*changes: str, stage: int = 2, offloaded: bool = False) -> str:
        config = load_run(run.config, changes)
        guard = memory_check.MemoryGuard(config, stage, offloaded, dict, torch.device("cpu"))
        return "\n".join(guard.advice())

    first = advice("train.per_device_train_batch_size=8", "train.gradient_accumulation_steps=2", "peft.r=64")
    assert "per_device_train_batch_size: 8 -> 4 and train.gradient_accumulation_steps: 2 -> 4" in first
    assert "peft.r: 64 -> 32 and peft.lora_alpha: 16 -> 8" in first
    last = advice(
        "train.per_device_train_batch_size=1",
        "train.packing=true",
        "train.pack_max_tokens=8192",
        "peft.r=8",
        stage=3,
        offloaded=True,
    )
    assert "per_device" not in last and "pack_max_tokens: 8192 -> 4096" in last
    assert "peft.r" not in last and "zero3" not in last


def test_an_evaluation_has_advice_and_samples_of_its_own(run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run.directory)
    config = load_run(run.config, ["train.per_device_train_batch_size=8", "peft.r=64"])
    guard = memory_check.MemoryGuard(config, 2, False, dict, torch.device("cpu"))
    guard.progress.at("evaluation", step=7, samples=["heldout/0.tar:3"])
    with pytest.raises(ConfigError) as caught, guard.explaining("evaluation at step 7"):
        raise MemoryError
    message = str(caught.value)
    assert "samples heldout/0.tar:3" in message
    assert "1. train.per_device_eval_batch_size: 4 -> 2" in message
    for useless in ("per_device_train_batch_size", "gradient_checkpointing", "peft.r:"):
        assert useless not in message


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_that_is_too_small_is_told(run: TinyRun) -> None:
    message = run_ranks(check_on_gpu, 1, run)[0]
    assert "memory check before the first step" in message and "GiB of the GPU" in message


def check_on_gpu(ranks: Ranks, run: TinyRun) -> str:
    torch.cuda.set_per_process_memory_fraction(2e-4)  # 16 MB: the weights and little else
    with pytest.raises(ConfigError) as caught:
        run_here(ranks, run, overrides("zero2", "gpu"))
    return str(caught.value)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("[enforce fail] can't allocate memory: tried 8 bytes")])
def test_the_machines_own_memory_is_told_too(run: TinyRun, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run.directory)
    config = load_run(run.config, [])
    guard = memory_check.MemoryGuard(config, 2, False, dict, torch.device("cpu"))
    with pytest.raises(ConfigError, match="out of memory: here"), guard.explaining("here"):
        raise error
    with pytest.raises(RuntimeError, match="shape"), guard.explaining("here"):
        raise RuntimeError("shape mismatch")
