"""How many tokens a byte of text becomes, measured on a few samples of each source."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlm_dist.data.types import Source
from vlm_dist.errors import SkipSample, VlmDistError

log = logging.getLogger(__name__)

#: Counts the tokens of a sample's text, template included; of an empty sample where it is given None.
MeasureText = Callable[[Mapping[str, Any] | None], int]

#: Few rows of few shards: a shard on the other side of a network is fetched as a whole.
NUM_SHARDS = 2
ROWS_PER_SHARD = 32

#: Three of four samples are at most as long as estimated: packs that turn out too long lose samples.
QUANTILE = 0.75
DEFAULT_TOKENS_PER_BYTE = 1 / 3.5


@dataclass(frozen=True, slots=True)
class TextCalibration:
    """Tokens of a sample's text: `template_tokens + tokens_per_byte x text_bytes`.

    Attributes:
        template_tokens: of the chat template, the system prompt and whatever else is in every sample.
        tokens_per_byte: of the text that the facts know.
        num_rows: samples that this was measured on; 0: assumed.
    """

    template_tokens: int
    tokens_per_byte: float
    num_rows: int


def calibrate(source: Source, measure_text: MeasureText) -> TextCalibration:
    """Measure a source: the same rows, and so the same result, in every process.

    Raises:
        DataError: the storage fails.
    """
    template_tokens = _template_tokens(measure_text)
    rows = calibration_rows(source.shard_sizes)
    facts = source.facts(np.asarray(rows, dtype=np.int64))
    slopes = []
    for row, num_bytes in zip(rows, facts["text_bytes"].tolist(), strict=True):
        if num_bytes < 1:
            continue
        try:
            num_tokens = measure_text(source.read(row).fields)
        except SkipSample:
            continue  # the run will count it; here there are others
        except (VlmDistError, OSError):
            raise
        except Exception as error:  # noqa: BLE001 - an odd sample is a null slot in training, and no reason to end here
            log.debug("row %d of %s cannot be measured: %r", row, source.name, error)
            continue
        slopes.append(max(0, num_tokens - template_tokens) / num_bytes)
    if not slopes:
        return TextCalibration(template_tokens, DEFAULT_TOKENS_PER_BYTE, 0)
    slope = float(np.quantile(slopes, QUANTILE, method="higher"))
    return TextCalibration(template_tokens, float(f"{slope:.6g}"), len(slopes))


def calibration_rows(shard_sizes: Sequence[int]) -> list[int]:
    """Choose the rows to measure: spread over the first shard and one from the middle."""
    starts = np.concatenate([[0], np.cumsum(shard_sizes)]).tolist()
    filled = [shard for shard, size in enumerate(shard_sizes) if size]
    chosen = sorted({filled[i * len(filled) // NUM_SHARDS] for i in range(NUM_SHARDS)}) if filled else []
    rows = []
    for shard in chosen:
        count = min(ROWS_PER_SHARD, shard_sizes[shard])
        rows += [starts[shard] + i * shard_sizes[shard] // count for i in range(count)]
    return rows


def _template_tokens(measure_text: MeasureText) -> int:
    try:
        return measure_text(None)
    except SkipSample:  # a template that refuses empty texts
        return 0


def text_tokens(calibration: TextCalibration, text_bytes: Any) -> Any:
    """Estimate the tokens of texts of so many bytes: int64, in the shape of `text_bytes`."""
    estimate = calibration.template_tokens + np.asarray(text_bytes, dtype=np.float64) * calibration.tokens_per_byte
    return np.maximum(np.ceil(estimate), 1).astype(np.int64)
