"""A step in bfloat16 on the device beside float32 on the CPU: loss, gradients, compiled blocks, Liger, operations."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tests.engine import tiny
from tests.gpu.conftest import needs_gpu
from vlm_dist.engine.transfer import Transfer
from vlm_dist.loss.labelled import LabelledHead
from vlm_dist.model import compile_blocks, enable_gradient_checkpointing, run_frozen_towers_without_graph
from vlm_dist.model.flops import FlopModel

BATCHES = [tiny.micro_batch(seed, rows=2, tokens=24 + 8 * seed) for seed in range(3)]
#: Of bfloat16, which keeps 8 bits: of the losses, and of all gradients as one vector.
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-2, 4e-2
CUDA = torch.device("cuda")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_tiny_vlm(tmp_path_factory.mktemp("step") / "model")


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """Compiled code is none of the next test's."""
    yield
    torch._dynamo.reset()


def learn(model: nn.Module, device: torch.device) -> tuple[Tensor, Tensor]:
    """Losses [3] and all gradients as one vector, in float32 on the CPU."""
    model.to(device).train()
    head = LabelledHead(model)
    losses = []
    for inputs, labels in BATCHES:
        moved = {name: value.to(device) for name, value in inputs.items()}
        dtype = next(model.parameters()).dtype
        moved["pixel_values"] = moved["pixel_values"].to(dtype)
        with head.giving_loss(labels, -100):
            loss = model(**moved, use_cache=False)["loss"]
        loss.backward()
        losses.append(loss.detach().float().cpu())
    gradients = [p.grad.float().cpu().flatten() for p in model.parameters() if p.grad is not None]
    return torch.stack(losses), torch.cat(gradients)


def assert_close(found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> None:
    assert torch.isfinite(found[1]).all() and len(found[1]) == len(wanted[1]) > 0
    assert ((found[0] - wanted[0]).abs() / wanted[0]).max() < LOSS_TOLERANCE
    assert (found[1] - wanted[1]).norm() / wanted[1].norm() < GRADIENT_TOLERANCE


@pytest.fixture
def reference(directory: Path) -> tuple[Tensor, Tensor]:
    return learn(tiny.load_peft(directory), torch.device("cpu"))


def test_bfloat16_learns_what_float32_learns(
    device: torch.device, directory: Path, reference: tuple[Tensor, Tensor]
) -> None:
    assert_close(learn(tiny.load_peft(directory, torch.bfloat16), device), reference)


def test_float32_learns_the_same(
    device: torch.device, directory: Path, reference: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # of the convolution over patches
    found = learn(tiny.load_peft(directory), device)
    assert (found[1] - reference[1]).norm() / reference[1].norm() < 1e-4
    assert torch.allclose(found[0], reference[0], rtol=1e-5)


def test_checkpointing_and_a_frozen_tower_change_nothing(device: torch.device, directory: Path) -> None:
    found = []
    for is_recomputed in (False, True):
        model = tiny.load_peft(directory, torch.bfloat16)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora" in name and "visual" not in name)
        run_frozen_towers_without_graph(model)
        if is_recomputed:
            enable_gradient_checkpointing(model)
        found.append(learn(model, device))
    assert_close(found[1], found[0])


def test_compiled_blocks_learn_the_same(
    place: str, directory: Path, reference: tuple[Tensor, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "code"))
    model = tiny.load_peft(directory, torch.bfloat16)
    enable_gradient_checkpointing(model)
    compile_blocks(model, "inductor" if place == "cuda" else "aot_eager")  # a CPU's code: tests/engine
    assert_close(learn(model, torch.device(place)), reference)


@needs_gpu
@pytest.mark.skipif(importlib.util.find_spec("liger_kernel") is None, reason="liger-kernel is not installed")
def test_liger_learns_the_same(directory: Path, reference: tuple[Tensor, Tensor]) -> None:
    """What `use_liger_kernel` would change, were it not refused: norms, rotary positions and the MLP, on this model."""
    try:
        from liger_kernel.transformers import apply_liger_kernel_to_qwen2_vl
        from liger_kernel.transformers.model import qwen2_vl  # noqa: F401 - what the call above imports when it is made
    except ImportError as error:
        pytest.skip(f"this liger-kernel does not know this transformers: {error}")
    model = tiny.load_peft(directory, torch.bfloat16)
    before = [type(module).__name__ + module.forward.__qualname__ for module in model.modules()]
    apply_liger_kernel_to_qwen2_vl(model=model.get_base_model(), fused_linear_cross_entropy=False, cross_entropy=False)
    after = [type(module).__name__ + module.forward.__qualname__ for module in model.modules()]
    assert before != after, "Liger has changed nothing"
    assert_close(learn(model, CUDA), reference)


def test_operations_are_those_that_torch_counts(device: torch.device, directory: Path) -> None:
    """On a GPU the kernels of attention are others, which torch counts by formulas of their own."""
    model = tiny.load_peft(directory, torch.bfloat16)
    counted = sum(FlopModel.of(model).count(inputs, labels).hardware for inputs, labels in BATCHES)
    with FlopCounterMode(display=False) as counter:
        learn(model, device)
    seen = {str(name) for by_name in counter.get_flop_counts().values() for name in by_name}
    if not any("attention" in name for name in seen):
        pytest.skip("this torch does not count the attention of this device")
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.02)


def seconds_of(work: Callable[[], Any], device: torch.device) -> float:
    from tests.bench.gpu.machine import median_seconds

    return median_seconds(work, device, repeats=5)


@needs_gpu
def test_a_copy_of_pinned_memory_does_not_wait() -> None:
    """To the device, beside work that is under way there."""
    import time

    batch = torch.randn(64 << 20).pin_memory()
    square = torch.randn(8192, 8192, device=CUDA)
    busy = seconds_of(lambda: square @ square, CUDA)
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(10):
        square @ square
    moved = batch.to(CUDA, non_blocking=True)
    queued = time.perf_counter() - started
    torch.cuda.synchronize()
    assert queued < 5 * busy, "the copy has waited for the device"
    assert torch.equal(moved.cpu(), batch)


@needs_gpu
def test_what_is_copied_ahead_is_what_is_taken() -> None:
    """Made by one stream, used by another, while its memory is asked for by others, too."""
    transfer = Transfer.to(CUDA, torch.bfloat16)
    square = torch.randn(4096, 4096, device=CUDA)
    for number in range(5):
        given = {
            "pixel_values": torch.randn(1 << 22).pin_memory(),
            "input_ids": torch.arange(8).unsqueeze(0).pin_memory(),
            "max_seq_len": number,
        }
        transfer.begin(given)
        for _ in range(10):
            square @ square
        moved = transfer.take(given)
        kept = moved["pixel_values"].clone()
        assert moved["max_seq_len"] == number and moved["input_ids"].is_cuda
        del moved
        torch.full((1 << 22,), torch.nan, device=CUDA, dtype=torch.bfloat16)
        assert torch.equal(kept.cpu(), given["pixel_values"].bfloat16())
