"""Which attention implementations compute what a family means."""

from __future__ import annotations

from vlm_dist.errors import ConfigError
from vlm_dist.families.family import Family


def check_attention(family: Family, implementation: str | None) -> None:
    """Refuse flash attention where it would drop part of a family's mask, without a word.

    Args:
        family: of the model.
        implementation: `attn_implementation`; None is the model's own choice.

    Raises:
        ConfigError: with the reason.
    """
    if implementation is None or "flash" not in implementation or family.flash_refusal is None:
        return
    raise ConfigError(
        f"loading_params.attn_implementation: {implementation} is wrong for models of the family {family.name}: "
        f"{family.flash_refusal}; set it to null"
    )
