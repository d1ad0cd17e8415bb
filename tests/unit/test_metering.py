"""What is measured, against what, and which adapters are kept: from the configuration."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vlm_dist.build import metering
from vlm_dist.checkpoint.retention import Best, write_best


def config(**train: Any) -> Any:
    defaults = {"device_peak_tflops": None, "precision": "bfloat16", "metric_for_best_model": "eval_loss"}
    return SimpleNamespace(train=SimpleNamespace(**(defaults | train)))


@pytest.mark.parametrize(
    ("settings", "device", "name", "expected"),
    [
        ({}, "cuda", "NVIDIA H100 80GB HBM3", 989.4e12),
        ({"precision": "float16"}, "cuda", "NVIDIA A100-SXM4-80GB", 312e12),
        ({"precision": "float32"}, "cuda", "NVIDIA A100-SXM4-80GB", None),  # the table is of 16 bits
        ({}, "cuda", "Somebody's first GPU", None),
        ({}, "cpu", "", None),
        ({"device_peak_tflops": 1.5}, "cpu", "", 1.5e12),
        ({"device_peak_tflops": 500.0, "precision": "float32"}, "cuda", "NVIDIA H100 80GB HBM3", 500e12),
    ],
)
def test_what_a_device_can_do(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], device: str, name: str, expected: float | None
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert metering.device_peak_flops(config(**settings), torch.device(device)) == expected


@pytest.mark.parametrize(
    ("asked", "kept"),
    [
        ("none", []),
        ("final", [("adapter", 9, ["final"])]),
        ("best", [("checkpoint-6", 6, ["best"])]),
        ("all", [("checkpoint-3", 3, []), ("adapter", 9, ["final"]), ("checkpoint-6", 6, ["best"])]),
    ],
)
def test_adapters_are_kept_as_asked(tmp_path: Path, asked: str, kept: list[tuple[str, int, list[str]]]) -> None:
    seen: list[tuple[str, int, list[str]]] = []
    log: Any = SimpleNamespace(
        log_adapter=lambda path, files, step, aliases: seen.append((path.name, step, list(aliases)))
    )
    run = config(output_dir=tmp_path, wandb_artifacts=asked)
    (tmp_path / "checkpoint-6").mkdir()
    write_best(tmp_path, Best(6, "eval_loss", 0.5), greater_is_better=False)
    metering.keep_each_adapter(run, log)(3, tmp_path / "checkpoint-3")
    metering.keep_adapters(run, log, tmp_path / "adapter", 9)
    assert seen == kept


def test_towers_have_their_own_rates_where_they_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    def factors(*rates: float | None) -> dict[str, float]:
        names = ("vision", "projector", "language", "head", "all")
        rows = [SimpleNamespace(tower=t, learning_rate=r) for t, r in zip(names, (*rates, None), strict=True)]
        monkeypatch.setattr(metering, "tower_table", lambda *arguments: rows)
        nothing = SimpleNamespace(model_dump=dict)
        run = SimpleNamespace(
            peft=SimpleNamespace(towers=nothing, towers_learning_rate=nothing), train=SimpleNamespace(learning_rate=1)
        )
        return metering.tower_factors(run, None, 1e-4)  # type: ignore[arg-type]

    assert factors(1e-4, 1e-4, 1e-4, None) == {}
    assert factors(1e-5, None, 1e-4, None) == {"vision": pytest.approx(0.1), "language": pytest.approx(1)}
