"""Parameters that ZeRO-3 has partitioned, whole for a moment."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn


def gathered(parameter: nn.Parameter) -> AbstractContextManager[Any]:
    """A parameter whole, to be changed by all ranks alike; PEFT names DeepSpeed so that we need not."""
    if not hasattr(parameter, "ds_id"):
        return nullcontext()
    from peft.utils.integrations import gather_params_ctx

    context: AbstractContextManager[Any] = gather_params_ctx(parameter)
    return context
