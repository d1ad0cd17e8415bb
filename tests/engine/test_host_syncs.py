"""Where a step asks the device for a value, and waits for it: nowhere of our own, and of others where it is known.

On a CPU such a call costs nothing, so that nobody would notice a new one. What is counted are the operators that bring
a value to the host, or need one to know the shape of their result. `Tensor.tolist` and `Tensor.cpu` are not seen: on a
CPU they are no operators.
"""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.engine import tiny
from tests.ranks import Ranks, run_ranks
from tests.unit.test_trainer import feed, make, ranks  # noqa: F401
from vlm_dist.model import load_rope_index

pytestmark = pytest.mark.engine

STAGES = (1, 2, 3)
_SYNCING = frozenset({"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique_consecutive"})
_SYNCING_BY_MASK = frozenset({"index", "index_put", "index_put_"})

#: place -> why it is there.
KNOWN = {
    # on values that are on the host: no device is asked
    "vlm_dist/loss/labelled.py labelled_positions": "labels stay on the CPU until their positions are known",
    # the model's own forward, once or more for each micro-batch
    "qwen2_vl/modeling_qwen2_vl.py get_placeholder_mask": "as many image tokens as features?",
    "utils/import_utils.py torch_compilable_check": "the answer to it",
    "transformers/masking_utils.py _ignore_causal_mask_sdpa": "is there no padding, so that no mask is needed?",
    # DeepSpeed's optimizer step, a few for each step: it skips an update that is not finite, by a branch
    "zero/stage_1_and_2.py _optimizer_step": "the gradient's norm, by which it scales",
    "zero/stage_1_and_2.py has_overflow": "not finite on any rank?",
    "zero/stage3.py step_with_gradscaler": "the gradient's norm",
    "runtime/bf16_optimizer.py step": "the gradient's norm",
    "runtime/utils.py is_invalid_grad_norm": "not finite?",
    "runtime/utils.py clip_tensors_by_global_norm": "larger than the limit?",
}


class HostSyncs(TorchDispatchMode):
    """Notes who asks for values."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in _SYNCING or (name in _SYNCING_BY_MASK and _has_mask(args[1])):
            self.places.append(place())
        return func(*args, **(kwargs or {}))


def _has_mask(indices: Sequence[Any]) -> bool:
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)


def place(own: str = __file__) -> str:
    """The innermost function that is neither torch's nor in the file of the test."""
    for frame in reversed(traceback.extract_stack(limit=60)):
        path = Path(frame.filename)
        if "torch" not in path.parts and path not in (Path(__file__), Path(own), Path(warnings.__file__)):
            start = path.parts.index("vlm_dist") if "vlm_dist" in path.parts else -2
            return f"{'/'.join(path.parts[start:])} {frame.name}"
    return "nobody"


@contextmanager
def noted() -> Iterator[list[str]]:
    with HostSyncs() as mode:
        yield mode.places


def numbered(directory: Path, inputs: dict[str, Any], labels: torch.Tensor) -> tiny.Batch:
    """With the positions that workers give to one row."""
    tokens = {key: inputs[key][0] for key in ("input_ids", "mm_token_type_ids")}
    return inputs | {"position_ids": load_rope_index(str(directory))(tokens, inputs).unsqueeze(1)}, labels


def steps(group: Ranks, directory: Path) -> dict[tuple[int, bool], list[str]]:
    """Of the third step at each stage, in float32 and bfloat16."""
    found = {}
    for stage in STAGES:
        for bf16 in (False, True):
            engine = tiny.make_engine(directory, tiny.ds_config(stage, group.world_size, bf16=bf16))
            batches = [numbered(directory, *tiny.micro_batch(index)) for index in range(2)]
            total = tiny.num_targets(batches)
            for _ in range(3):
                with noted() as places:
                    for inputs, labels in batches:
                        engine.backward(engine.loss(inputs, labels), total)
                    engine.step()
                found[stage, bf16] = places
            engine.close()
    return found


def test_a_step_waits_for_the_device_where_it_is_known_and_nowhere_else(tmp_path: Path) -> None:
    [found] = run_ranks(steps, 1, tiny.save_tiny_vlm(tmp_path / "model"), timeout_seconds=200)
    for case, places in found.items():
        assert set(places) <= KNOWN.keys(), case
        assert len([place for place in places if "modeling_qwen2_vl" not in place]) <= 14, case  # no more often, either
    assert {place for places in found.values() for place in places} == KNOWN.keys()


def test_the_loop_around_it_asks_for_nothing_in_steps_without_a_line(ranks: Any) -> None:  # noqa: F811
    """With a stand-in for the engine, which asks by itself."""
    trainer, engine, _, _ = make(ranks, feed(0, 6), num_steps=8, stop_at_step=6, logging_steps=0)
    with noted() as places:
        trainer.run()
    assert engine.calls.count("step") == 6
    assert [place for place in places if place.startswith("vlm_dist/")] == []


@pytest.mark.parametrize(
    "ask",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.any()),
        lambda x: float(x[0]),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: torch.equal(x, x),
        lambda x: torch.where(x > 0),
    ],
)
def test_what_asks_for_a_value_is_seen(ask: Any) -> None:
    with noted() as places:
        ask(torch.ones(3))
    assert len(places) >= 1


def test_what_asks_for_none_is_not() -> None:
    with noted() as places:
        x = torch.ones(3)
        torch.where(x > 0, x, 0.0)[torch.tensor([0, 2])].sum().masked_fill(torch.tensor(True), 0)
    assert places == []
