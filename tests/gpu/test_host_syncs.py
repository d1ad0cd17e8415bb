"""Where a step waits for the GPU, by CUDA's own account: nowhere of our own.

`tests/engine/test_host_syncs.py` finds the operators that would, on any machine; here what is no operator is seen, too:
`Tensor.tolist`, copies to the host. What transformers and DeepSpeed wait for is printed, most frequent first.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine import tiny
from tests.engine.test_host_syncs import numbered, place
from tests.gpu.conftest import needs_gpu
from tests.ranks import Ranks, run_ranks

_WORDS = "synchronizing CUDA operation"


@contextmanager
def noted() -> Iterator[list[str]]:
    """Within, the place of each wait that torch warns of."""
    places: list[str] = []

    def note(message: Any, *args: Any, **kwargs: Any) -> None:
        if _WORDS in str(message):
            places.append(place(__file__))

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        yield places


def steps(ranks: Ranks, directory: Path, stage: int) -> list[str]:
    """Of the third step, copies of the next micro-batch included."""
    engine = tiny.make_engine(directory, tiny.ds_config(stage, ranks.world_size, bf16=True))
    made = [numbered(directory, *tiny.micro_batch(index, tokens=24)) for index in range(2)]
    batches = [({name: value.pin_memory() for name, value in inputs.items()}, labels) for inputs, labels in made]
    total = tiny.num_targets(made)
    for _ in range(3):
        with noted() as places:
            torch.cuda.set_sync_debug_mode("warn")
            try:
                for index, (inputs, labels) in enumerate(batches):
                    loss = engine.loss(inputs, labels)
                    if index + 1 < len(batches):
                        engine.copy_ahead(batches[index + 1][0])
                    engine.backward(loss, total)
                engine.step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
    engine.close()
    return places


@needs_gpu
@pytest.mark.parametrize("stage", [2, 3])
def test_nothing_of_ours_waits_for_the_device(tmp_path: Path, stage: int, capsys: pytest.CaptureFixture[str]) -> None:
    [places] = run_ranks(steps, 1, tiny.save_tiny_vlm(tmp_path / "model"), stage, timeout_seconds=200)
    with capsys.disabled():
        for where, count in Counter(places).most_common():
            print(f"ZeRO-{stage}: waits {count} times a step: {where}")
    assert [where for where in places if where.startswith("vlm_dist/")] == []


def test_a_warning_is_given_its_place() -> None:
    module: dict[str, Any] = {}
    exec(compile("def ask(warn): warn()", "/x/vlm_dist/engine/asking.py", "exec"), module)
    with noted() as places:
        module["ask"](lambda: warnings.warn(f"called a {_WORDS}", stacklevel=1))
        module["ask"](lambda: warnings.warn("called for something else", stacklevel=1))
    assert places == ["vlm_dist/engine/asking.py ask"]
