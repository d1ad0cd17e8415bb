"""`export verify`: proofs that an adapter is what was trained, that others load it, and that it does something."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlm_dist.checkpoint.layout import ADAPTER_WEIGHTS, TRAINED_WEIGHTS, list_checkpoints, seems_whole, sha256_of
from vlm_dist.errors import CheckpointError, ExitCode, ModelError, VlmDistError
from vlm_dist.export.apart import loads_by_peft_alone
from vlm_dist.export.opening import Origin, lora_layers, open_base, with_adapter
from vlm_dist.export.samples import Example, examples
from vlm_dist.observability.findings import Finding, Level

#: Two sums of the same numbers in float32, in another order, over some hundred layers.
MERGE_TOLERANCE = 1e-3


def verify(origin: Origin, merged: Path | None = None) -> Iterator[Finding]:
    """Prove, one thing after the other; what fails is a problem, and the others are looked at all the same.

    Args:
        origin: of the adapter.
        merged: directory that `merge` has written; None: it is merged in memory alone.
    """
    yield from _files(origin)
    yield from _contents(origin)
    opened = open_base(origin)
    shown = list(examples(origin, opened.processor, opened.family))
    yield Finding(Level.OK, "examples", "; ".join(example.name for example in shown))
    bare = _logits(opened.model, shown)
    try:
        model = with_adapter(origin, opened.model)
    except CheckpointError as error:
        yield _problem("loading", str(error))
        return
    if origin.has_adapter:
        layers = dict(lora_layers(model))
        yield Finding(
            Level.OK, "loading", f"PEFT finds a place for all {len(origin.point.shapes):,} weights, in {len(layers):,} "
            "layers with LoRA"
        )  # fmt: skip
        yield from loads_by_peft_alone(origin)
    adapted = _logits(model, shown)
    yield from _changes(bare, adapted, shown)
    if origin.has_adapter:
        sum_of_both = model.merge_and_unload(safe_merge=True)
        sum_of_both.tie_weights()
        yield _same(adapted, _logits(sum_of_both, shown), bare, "merged in memory")
    else:
        sum_of_both = model
    if merged is not None:
        yield from _merged_directory(merged, origin, sum_of_both)


def _files(origin: Origin) -> Iterator[Finding]:
    """Hashes, and the checkpoint that has the same."""
    for name, digest in origin.hashes.items():
        yield Finding(Level.OK, name, f"sha256 {digest}")
    weights = next(name for name in (ADAPTER_WEIGHTS, TRAINED_WEIGHTS) if name in origin.hashes)
    same = [
        path.name
        for _, path in list_checkpoints(origin.run_dir)
        if path != origin.path and seems_whole(path) and _recorded(path, weights) == origin.hashes[weights]
    ]
    if same:
        yield Finding(Level.OK, "checkpoint", f"{same[0]} recorded the same hash of {weights} when it was written")


def _recorded(checkpoint: Path, name: str) -> str | None:
    info = json.loads((checkpoint / "training_state.json").read_text(encoding="utf-8"))
    found: str | None = info["files"].get(name, {}).get("sha256")
    if found is None or sha256_of(checkpoint / name) != found:
        return None
    return found


def _contents(origin: Origin) -> Iterator[Finding]:
    """Values: finite, and every LoRA B moved from the zeros that it starts with."""
    try:
        tensors = origin.point.read()
    except CheckpointError as error:
        yield _problem("values", str(error))
        return
    ends = [name for name in tensors if ".lora_B." in name]
    still = [name for name in ends if not bool(tensors[name].any())]
    if ends and len(still) == len(ends):
        yield _problem("values", f"all {len(ends)} LoRA B matrices are zero: nothing was learned")
    elif still:
        yield Finding(
            Level.WARNING,
            "values",
            f"{len(still)} of {len(ends)} LoRA B matrices are zero, e.g. {still[0]}: these layers have learned nothing",
            "their tower saw no data (no pictures, no clips)? then freeze it: peft.towers",
            details="\n".join(still),
        )
    else:
        yield Finding(Level.OK, "values", f"{len(tensors):,} tensors, all finite, no LoRA B is zero")


def _logits(model: Any, shown: Sequence[Example]) -> list[Tensor]:
    """Float32 logits of each example, [T, V]."""
    with torch.no_grad():
        return [model(**example.inputs, use_cache=False).logits[0].float() for example in shown]


def _changes(bare: Sequence[Tensor], adapted: Sequence[Tensor], shown: Sequence[Example]) -> Iterator[Finding]:
    deltas = [float((one - other).abs().max()) for one, other in zip(adapted, bare, strict=True)]
    told = ", ".join(f"{delta:.3g}" for delta in deltas)
    if not all(torch.isfinite(one).all() for one in adapted):
        yield _problem("effect", "with the adapter some logits are not finite")
    elif not all(deltas):
        still = next(example.name for example, delta in zip(shown, deltas, strict=True) if not delta)
        yield _problem("effect", f"the adapter does not change the logits of {still}")
    else:
        yield Finding(Level.OK, "effect", f"the adapter changes the logits of every example, by up to {told}")


def _same(adapted: Sequence[Tensor], merged: Sequence[Tensor], bare: Sequence[Tensor], what: str) -> Finding:
    """Compare with the size of the logits themselves, and with what the adapter does to them."""
    delta = max(float((one - other).abs().max()) for one, other in zip(adapted, merged, strict=True))
    scale = max(float(one.abs().max()) for one in adapted)
    effect = max(float((one - other).abs().max()) for one, other in zip(adapted, bare, strict=True))
    bound = MERGE_TOLERANCE * scale
    found = f"{what} = adapter: logits differ by at most {delta:.3g} of {scale:.3g} (bound {bound:.3g}; the adapter "
    found += f"changes them by {effect:.3g})"
    return Finding(Level.OK, "merge", found) if delta <= min(bound, max(effect, 1e-12)) else _problem("merge", found)


def _merged_directory(path: Path, origin: Origin, expected: Any) -> Iterator[Finding]:
    """Every weight of a merged directory is the float32 sum, rounded once: compared bit by bit."""
    from transformers import AutoModelForImageTextToText

    try:
        loaded: Any = AutoModelForImageTextToText.from_pretrained(str(path), dtype="auto", output_loading_info=True)
    except (OSError, ValueError, RuntimeError) as error:
        yield _problem("merged", f"{path} cannot be loaded by transformers: {error}")
        return
    found, info = loaded
    tied = set(getattr(found, "all_tied_weights_keys", None) or ())
    lacking = sorted(set(info["missing_keys"]) - tied)
    if lacking or info["unexpected_keys"]:
        extra = sorted(info["unexpected_keys"])
        yield _problem("merged", f"{path}: missing {lacking[:3]}, unexpected {extra[:3]}")
        return
    ours, differing = dict(expected.named_parameters()), []
    for name, parameter in found.named_parameters():
        wanted = ours.get(name)
        if wanted is None or wanted.shape != parameter.shape or not torch.equal(wanted.to(parameter.dtype), parameter):
            differing.append(name)
    if differing:
        yield _problem(
            "merged",
            f"{path}: {len(differing)} of {len(ours)} weights are not base + adapter, e.g. {differing[0]}: it was made "
            f"of another adapter or another base than {origin.path} and {origin.config.model_id}",
        )
    else:
        yield Finding(
            Level.OK, "merged", f"{path}: all {len(ours):,} weights are base + adapter, rounded once, bit by bit"
        )


def _problem(what: str, found: str) -> Finding:
    return Finding(Level.PROBLEM, what, found, exit_code=ExitCode.CHECKPOINT)


def verified(origin: Origin, merged: Path | None, on_error: Callable[[VlmDistError], Finding]) -> list[Finding]:
    """All findings; an error that ends the proofs is the last one.

    Args:
        origin: of the adapter.
        merged: see `verify`.
        on_error: makes a finding of it.
    """
    found: list[Finding] = []
    try:
        for finding in verify(origin, merged):
            found.append(finding)
    except ModelError as error:
        found.append(on_error(error))
    return found
