"""What offloading needs compiled: once on each machine, before anybody waits in a collective."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlm_dist.engine.cpu_adam import prepare_cpu_adam
from vlm_dist.engine.nvme import prepare_async_io
from vlm_dist.engine.runtime import prepare_deepspeed


def prepare_native_ops(ds_config: Mapping[str, Any]) -> None:
    """Compile what a configuration needs; nothing without offloading. Local; minutes the first time, else a second.

    Args:
        ds_config: from `load_deepspeed_json`, or merged.

    Raises:
        ConfigError: weights cannot be kept on NVMe here. An optimizer that cannot be compiled is replaced.
    """
    prepare_deepspeed()
    prepare_cpu_adam(ds_config)
    prepare_async_io(ds_config)
