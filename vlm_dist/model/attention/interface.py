"""Attention as transformers' layers call it: borders where they are told, SDPA where they are not."""

# Shapes: T tokens of the row, H heads, K heads of keys and values, D width of one head

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn
from transformers import masking_utils
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vlm_dist.errors import ModelError
from vlm_dist.model.attention.borders import ROW
from vlm_dist.model.attention.kernels import attend
from vlm_dist.model.attention.names import VARLEN, VARLEN_OF_PICTURES
from vlm_dist.model.attention.segments import NO_WINDOW


def varlen_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of each sample of a row over itself; of padded rows, SDPA with their mask.

    Args:
        module: the layer.
        query: [B, H, T, D].
        key: [B, K, T, D].
        value: [B, K, T, D].
        attention_mask: of padded rows.
        dropout: share of the weights that are dropped.
        scaling: of the scores; None: 1 / sqrt(D).
        is_causal: whether tokens see those before them alone; None: as the layer says.
        **kwargs: `cu_seq_lens_q` int32 [N + 1] and `max_length_q` of a pack; `sliding_window`.

    Returns:
        [B, T, H, D], and None.

    Raises:
        ModelError: the model does not hand on the borders, or asks for what is not computed here.
    """
    borders = kwargs.get("cu_seq_lens_q")
    if borders is None or attention_mask is not None:
        if ROW.is_told and attention_mask is None:
            raise ModelError(
                f"{type(module).__name__}: the model does not hand the borders of samples on to its attention; set "
                "loading_params.attn_implementation to sdpa"
            )
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs)
    for name in ("softcap", "s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise ModelError(
                f"{type(module).__name__}: attention with {name} is not computed sample by sample; set "
                "loading_params.attn_implementation to eager"
            )
    causal = is_causal if is_causal is not None else bool(getattr(module, "is_causal", True))
    out = attend(
        query,
        key,
        value,
        borders,
        kwargs.get("max_length_q"),
        is_causal=causal,
        scale=scaling if scaling is not None else query.shape[-1] ** -0.5,
        window=kwargs.get("sliding_window") or NO_WINDOW,
        dropout=dropout,
    )
    return out, None


def varlen_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """No mask where the borders are told; SDPA's where not."""
    if ROW.is_told and kwargs.get("attention_mask") is None:
        return None
    mask: Tensor | None = sdpa_mask(*args, **kwargs)
    return mask


@functools.cache
def leave_rows_unsearched() -> None:
    """Keep transformers from looking for the borders in the positions, where they are told: it asks the device."""
    search = getattr(masking_utils, "find_packed_sequence_indices", None)
    if search is None:  # not needed, and no longer there
        return

    @functools.wraps(search)
    def found(position_ids: Tensor) -> Tensor | None:
        return None if ROW.is_told else search(position_ids)

    masking_utils.find_packed_sequence_indices = found


for _name in (VARLEN, VARLEN_OF_PICTURES):
    ALL_ATTENTION_FUNCTIONS.register(_name, varlen_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(_name, varlen_mask)
