"""Blocks through torch.compile learn what they learn without it, whatever the lengths, and say what goes wrong."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.engine import test_qlora, tiny
from tests.unit.model.zoo import kind, move
from vlm_dist.build.memory_check import MemoryGuard
from vlm_dist.config import PeftConfig
from vlm_dist.errors import ConfigError, ModelError
from vlm_dist.model import (
    attach_adapter,
    check_compilation,
    compile_blocks,
    enable_gradient_checkpointing,
    run_frozen_towers_without_graph,
    try_compiler,
)
from vlm_dist.model.compilation import uncompiled

pytestmark = pytest.mark.engine

#: (rows, tokens) of micro-batches; a single row would be code of its own. The heads have 12 dimensions, too.
SHAPES = [(2, 12), (3, 29), (4, 40), (2, 35), (3, 11), (5, 17), (2, 61), (4, 24)]
LORA = {"vision": "lora", "projector": "lora", "language": "lora"}


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Code of other tests is none of this one's; and what the compiler tells nobody is not formatted for pytest."""
    dynamo: Any = importlib.import_module("torch._dynamo")
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "disabled", True)
    shapes: Any = importlib.import_module("torch.fx.experimental._config")
    before = dynamo.config.recompile_limit, shapes.use_duck_shape
    dynamo.reset()
    yield
    dynamo.reset()
    dynamo.config.recompile_limit, shapes.use_duck_shape = before


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_tiny_vlm(tmp_path_factory.mktemp("compiled") / "model")


class Counting:
    """A backend that counts the graphs that it is given."""

    def __init__(self) -> None:
        from torch._dynamo.testing import CompileCounterWithBackend

        self.backend: Any = CompileCounterWithBackend("aot_eager")

    @property
    def num_graphs(self) -> int:
        return int(self.backend.frame_count)


def batch(number: int, rows: int, tokens: int) -> tiny.Batch:
    """Every second one has padding, with which blocks get a mask."""
    inputs, labels = tiny.micro_batch(number, rows, tokens)
    if number % 2:
        inputs["attention_mask"][0, -3:] = 0
        labels[0, -3:] = -100
    return inputs, labels


def learn(model: nn.Module, batches: list[tiny.Batch]) -> tuple[list[float], dict[str, Tensor]]:
    """Losses, and the gradients of their sum."""
    losses = []
    for inputs, labels in batches:
        loss = tiny.token_loss_sum(model(**inputs, use_cache=False).logits, labels)
        loss.backward()
        losses.append(loss.item())
    return losses, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def check_same(plain: tuple[Any, Any], compiled: tuple[Any, Any]) -> None:
    assert compiled[0] == pytest.approx(plain[0], rel=1e-5)
    assert set(compiled[1]) == set(plain[1])
    for name, gradient in plain[1].items():
        atol = 1e-5 * float(gradient.abs().max())
        torch.testing.assert_close(compiled[1][name], gradient, rtol=1e-5, atol=atol, msg=name)


@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "recomputed"])
def test_all_lengths_learn_the_same_with_the_same_code(directory: Path, recomputed: bool) -> None:
    batches = [batch(number, *shape) for number, shape in enumerate(SHAPES)]
    found = []
    for counting in (None, Counting()):
        model = tiny.load_peft(directory).train()
        names = [name for name, _ in model.named_parameters()]
        if recomputed:
            enable_gradient_checkpointing(model)
        if counting is None:
            found.append(learn(model, batches))
            continue
        assert [str(one) for one in compile_blocks(model, counting.backend)] == [
            "language: 2 of 2 blocks",
            "vision: 0 of 1 blocks (their attention is cut picture by picture)",
        ]
        losses, _ = learn(model, batches[:2])
        first = counting.num_graphs
        assert 2 <= first <= 4  # with and without a mask, for both blocks; a compilation that starts again counts twice
        more, gradients = learn(model, batches[2:])
        assert counting.num_graphs == first  # a length is no reason to compile again
        found.append((losses + more, gradients))
        assert [name for name, _ in model.named_parameters()] == names
        with torch.no_grad(), uncompiled(model.eval()):  # an evaluation runs the blocks as they are
            model(**batches[0][0])
        assert counting.num_graphs == first
    check_same(*found)


@pytest.mark.parametrize("name", ["llava", "gemma3"])
def test_vision_blocks_are_compiled_where_they_take_whole_pictures(name: str) -> None:
    """One family with a mask of its own in the language model, and one without; frozen vision blocks, too."""
    one = kind(name)
    found = []
    for backend in (None, Counting()):
        model = attach_adapter(one.load(), PeftConfig(r=4, lora_alpha=8, lora_dropout=0.0), LORA, seed=3)
        move(model)
        run_frozen_towers_without_graph(model.train())
        enable_gradient_checkpointing(model)
        if backend is not None:
            towers = {told.tower: told for told in compile_blocks(model, backend.backend)}
            assert towers["vision"].num_compiled == towers["vision"].num_blocks > 0
        loss = one.logits(model).square().mean()
        loss.backward()
        found.append(([loss.item()], {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    assert backend is not None and backend.num_graphs >= 2
    check_same(*found)


@test_qlora.needs_bitsandbytes
def test_a_base_in_4_bits_learns_the_same(directory: Path) -> None:
    found = []
    for is_compiled in (False, True):
        packed = test_qlora.packed(directory, torch.float32)
        model = test_qlora.stir(attach_adapter(packed, test_qlora.SETTINGS, LORA))
        if is_compiled:
            compile_blocks(model, "aot_eager")
        found.append(learn(model, [batch(0, 2, 12)]))
    check_same(*found)


def guard() -> MemoryGuard:
    from vlm_dist.config import TrainConfig

    config: Any = type("Config", (), {"train": TrainConfig(torch_compile=True)})()
    return MemoryGuard(config, 2, False, dict, torch.device("cpu"))


def test_a_block_that_is_no_one_graph_ends_the_run_with_its_place(directory: Path) -> None:
    model: Any = tiny.load_peft(directory).train()
    norm = model.get_base_model().model.language_model.layers[0].input_layernorm

    def depends_on_values(hidden: Tensor, forward: Callable[[Tensor], Tensor] = norm.forward) -> Tensor:
        return forward(hidden) if float(hidden.sum()) > 0 else -forward(-hidden)

    norm.forward = depends_on_values
    compile_blocks(model, "aot_eager")
    message = r"train\.torch_compile: step 1: a block .*test_compiled_blocks\.py:\d+: .* set torch_compile: false"
    with pytest.raises(ModelError, match=message), guard().explaining("step 1"):
        learn(model, [batch(0, 1, 12)])
    with pytest.raises(RuntimeError, match="mine"), guard().explaining("step 1"):  # no error of the compiler's
        raise RuntimeError("mine")


def test_what_cannot_work_is_refused_at_once(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="got true under ZeRO-3, which gathers the weights"):
        check_compilation(True, 3)
    check_compilation(True, 2)
    check_compilation(False, 3)
    model: Any = tiny.load_peft(directory)
    model.get_base_model().model.language_model.layers = nn.ModuleList()
    with pytest.raises(ModelError, match="no block of the language model can be compiled"):
        compile_blocks(model, "aot_eager")
    inductor: Any = importlib.import_module("torch._inductor.config")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    with (
        inductor.patch({"cpp.cxx": (None, "/no/such/compiler"), "cpp.vec_isa_ok": None}),
        pytest.raises(ConfigError, match=r"does not work on this machine .* a C\+\+ compiler"),
    ):
        try_compiler("inductor")
    try_compiler("aot_eager")
