"""How much of each source an epoch has."""

from __future__ import annotations

from collections.abc import Sequence


def repeats_of_weights(weights: Sequence[float], sizes: Sequence[int]) -> list[float]:
    """Turn weights into passes over each source per epoch.

    An epoch has as many samples as the sources together, shared out in proportion to the weights: a source with more
    than its share of the samples is not used up by one epoch (the next goes on where it stopped), one with less is
    used several times.

    Args:
        weights: one per source, above 0; only their proportions count.
        sizes: samples of each source.

    Returns:
        One `repeat` per source.
    """
    share = sum(sizes) / sum(weights)
    return [weight * share / size if size else 1.0 for weight, size in zip(weights, sizes, strict=True)]
