"""How long rows and packs are made, so that a model sees few lengths instead of nearly as many as there are batches."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from vlm_dist.config.vlm_collator import TextProcessing
from vlm_dist.data.types import PackBudget


@dataclass(frozen=True, slots=True)
class LengthBuckets:
    """Rounds lengths up, and never above what was allowed before.

    Attributes:
        multiple_of: that lengths become; 1: they stay what they are.
        max_length: tokens of a sample, a multiple too.
    """

    multiple_of: int = 1
    max_length: int = sys.maxsize

    @classmethod
    def of(cls, settings: TextProcessing) -> LengthBuckets:
        """As `text_processing` says."""
        return cls(settings.pad_to_multiple_of or 1, settings.max_length)

    def row(self, longest: int) -> int:
        """Length of padded rows of which the longest has so many tokens.

        Samples have at most max_length. A dummy picture behind the samples may go beyond: then nothing is rounded, and
        the row is no longer than it would be without.
        """
        return self._up(longest, self.max_length)

    def pack(self, num_tokens: int, budget: PackBudget) -> int:
        """Length of a pack of so many tokens; see `row` for what a dummy does."""
        return self._up(num_tokens, max(self.pack_limit(budget), self.max_length))

    def pack_limit(self, budget: PackBudget) -> int:
        """Tokens of the longest pack of several samples: the budget with its headroom, in whole multiples."""
        return int(budget.max_tokens * (1 + budget.headroom)) // self.multiple_of * self.multiple_of

    def _up(self, length: int, limit: int) -> int:
        rounded = -(-length // self.multiple_of) * self.multiple_of
        return rounded if rounded <= limit else length
