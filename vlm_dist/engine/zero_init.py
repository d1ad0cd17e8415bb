"""Loading a model so that under ZeRO-3 no rank ever holds all of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

from vlm_dist.engine.host_memory import freed_memory_goes_back
from vlm_dist.engine.runtime import init_deepspeed_comm

#: transformers finds the ZeRO-3 configuration through a weak reference in one of its globals. It has to stay alive for
#: as long as the model: `from_pretrained` partitions by it, and `generate` keeps the ranks in step by it.
_alive: list[Any] = []


@contextmanager
def zero_init_context(ds_config: Mapping[str, Any]) -> Iterator[None]:
    """Around loading the model and attaching the adapter. Collective under ZeRO-3: every rank loads the same model.

    Under ZeRO-3 `from_pretrained` partitions each module as it is loaded. Below it nothing happens. The adapter must be
    attached with `autocast_adapter_dtype=False`: with True it would stay float32 under ZeRO-3 and be bfloat16 with
    float32 masters elsewhere, so that the same run would differ between the stages.

    Args:
        ds_config: from `merge_deepspeed_config`; values that follow from the model may still be missing.
    """
    release_zero_init()
    is_partitioned = ds_config["zero_optimization"]["stage"] == 3
    if is_partitioned:
        init_deepspeed_comm()  # partitioning is a collective
        from transformers.integrations.deepspeed import HfDeepSpeedConfig

        _alive.append(HfDeepSpeedConfig(dict(ds_config)))  # type: ignore[no-untyped-call]
    try:
        with freed_memory_goes_back() if is_partitioned else nullcontext():
            yield
    except BaseException:
        release_zero_init()
        raise


def release_zero_init() -> None:
    """Forget the ZeRO-3 configuration: what is loaded from now on is loaded whole."""
    if _alive:
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()  # type: ignore[no-untyped-call]
        _alive.clear()
        from deepspeed.utils import groups

        groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None  # of hpZ; a second model would be refused
