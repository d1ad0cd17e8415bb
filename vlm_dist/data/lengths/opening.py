"""Which predictions of lengths a run plans with: counts where all samples are counted, else estimates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from vlm_dist.config.vlm_collator import VlmCollatorConfig
from vlm_dist.data.lengths.calibration import MeasureText, TextCalibration, calibrate
from vlm_dist.data.lengths.costs import LengthModel
from vlm_dist.data.lengths.estimate import BatchKeys, FactLengths
from vlm_dist.data.lengths.processor_lengths import CountsVisual, ProcessorLengths
from vlm_dist.data.lengths.token_store import ExactLengths, TokenStore
from vlm_dist.data.types import Source
from vlm_dist.errors import CheckpointError, ConfigError, DataError
from vlm_dist.families import Family

LengthKind = Literal["exact", "estimate"]


@dataclass(frozen=True)
class LengthChoice:
    """What one process decides for all.

    Attributes:
        kind: "exact" or "estimate".
        calibrations: of the text of each source, for estimates.
        checks: of the counts of each source, by shard.
    """

    kind: LengthKind
    calibrations: tuple[TextCalibration, ...] = ()
    checks: tuple[tuple[int, ...], ...] | None = None


def choose_lengths(
    setting: Literal["auto", "exact", "estimate"],
    sources: Sequence[Source],
    stores: Sequence[TokenStore],
    measure_text: MeasureText,
    planned_with: str | None = None,
    decides_order: bool = True,
) -> LengthChoice:
    """Choose, and calibrate estimates on a few samples.

    Args:
        setting: `data.lengths`; "auto" counts on counts where all samples have them.
        sources: of the run.
        stores: of each source.
        measure_text: counts the tokens of a text.
        planned_with: digest of the lengths that the checkpoint to continue was planned with; a run goes on as it began.
        decides_order: lengths decide which samples a step has, not its cut alone: then a run must go on as it began.

    Raises:
        ConfigError: counts are wanted, but there are none.
        CheckpointError: the checkpoint was planned with the other kind.
        DataError: the storage fails.
    """
    before: LengthKind | None = None
    if planned_with is not None:
        before = next((kind for kind in ("exact", "estimate") if planned_with.startswith(f"{kind}:")), None)
    if decides_order and setting != "auto" and before not in (None, setting):
        words = {"exact": "counted lengths", "estimate": "estimated lengths"}
        raise CheckpointError(
            f"the checkpoint was planned with {words[before or 'exact']}, but data.lengths is {setting}: the order of "
            f"the samples would be another one. Set data.lengths: {before} (or auto) to continue it, or start a new run"
        )
    kind: LengthKind | None = before if setting == "auto" else setting
    if kind != "estimate":
        pairs = list(zip(sources, stores, strict=True))
        checks = [store.checks(source) for source, store in pairs]
        if None not in checks:
            return LengthChoice("exact", checks=tuple(one for one in checks if one is not None))
        if setting == "exact" or (kind == "exact" and decides_order):
            counts = {source.name: store.num_uncounted(source) for source, store in pairs}
            listed = ", ".join(f"{name}: {count} samples are left" for name, count in counts.items() if count)
            why = "data.lengths is exact" if setting == "exact" else "the checkpoint was planned with counted lengths"
            raise ConfigError(
                f"{why}, but not all tokens have been counted ({listed}); count them with\n"
                "  vlm-dist shards tokens RUN.yaml\n"
                "(counts belong to one processor, chat template and collator config: a change of these needs new ones)"
            )
    return LengthChoice("estimate", tuple(calibrate(source, measure_text) for source in sources))


def open_lengths(
    choice: LengthChoice,
    sources: Sequence[Source],
    stores: Sequence[TokenStore],
    counter: CountsVisual,
    family: Family,
    config: VlmCollatorConfig,
) -> LengthModel:
    """Make the model that was chosen.

    Raises:
        DataError: this process does not see the counts that the choosing one saw.
    """
    if choice.kind == "exact":
        for source, store in zip(sources, stores, strict=True):
            if not store.has_files(source):
                raise DataError(
                    f"{source.name}: rank 0 sees token counts of all its shards, but this process does not; "
                    "data.index_dir must be the same directory on all nodes"
                )
        return ExactLengths(
            sources,
            stores,
            BatchKeys(family, config.video_processing),
            choice.checks,
            config.text_processing.max_length,
            family.patches_per_token,
        )
    prints = "/".join(store.fingerprint for store in stores)
    return ProcessorLengths(sources, choice.calibrations, counter, family, config, prints)


def fact_lengths(sources: Sequence[Source], family: Family, config: VlmCollatorConfig) -> LengthModel:
    """The cheapest model, for plans that ask for nothing but batch keys."""
    return FactLengths(sources, BatchKeys(family, config.video_processing))
