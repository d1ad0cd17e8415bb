"""Which attention implementations compute what a family means."""

from __future__ import annotations

from vlm_dist.errors import ConfigError
from vlm_dist.families.family import Family


def check_attention(family: Family, implementation: str | None) -> None:
    """Refuse attention without a mask where a family's mask says more than where samples end.

    Args:
        family: of the model.
        implementation: `attn_implementation`; None is the model's own choice.

    Raises:
        ConfigError: with the reason.
    """
    if implementation is None:
        return
    reason = None
    if implementation == "varlen" and family.packing is None:
        reason = family.packing_refusal
    elif "flash" in implementation:
        reason = family.flash_refusal
    if reason is not None:
        raise ConfigError(
            f"loading_params.attn_implementation: {implementation} is wrong for models of the family {family.name}: "
            f"{reason}; set it to null"
        )
