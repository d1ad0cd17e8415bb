"""What differs between model families, as rows of a table; no model code, no loading."""

from vlm_dist.families.attention import check_attention
from vlm_dist.families.family import Family
from vlm_dist.families.own import choose_family
from vlm_dist.families.table import FAMILIES, GENERIC, family_for

__all__ = ["FAMILIES", "GENERIC", "Family", "check_attention", "choose_family", "family_for"]
