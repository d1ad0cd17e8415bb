"""A thin, typed layer over DeepSpeed: the only room that names it."""

from vlm_dist.engine.deepspeed_json import load_deepspeed_json
from vlm_dist.engine.device_time import DeviceTimer
from vlm_dist.engine.engine import Engine
from vlm_dist.engine.garbage_collection import GarbageCollection
from vlm_dist.engine.merge import DerivedValue, merge_deepspeed_config
from vlm_dist.engine.native_ops import prepare_native_ops
from vlm_dist.engine.nonfinite import NonfiniteSteps
from vlm_dist.engine.outcome import StepOutcome
from vlm_dist.engine.runtime import init_deepspeed_comm, prepare_deepspeed
from vlm_dist.engine.slices import ParameterSlice, ReadElements, SlicedState
from vlm_dist.engine.trainable_state import NamedState, TrainableState
from vlm_dist.engine.zero_init import zero_init_context

__all__ = [
    "DerivedValue",
    "DeviceTimer",
    "Engine",
    "GarbageCollection",
    "NamedState",
    "NonfiniteSteps",
    "ParameterSlice",
    "ReadElements",
    "SlicedState",
    "StepOutcome",
    "TrainableState",
    "init_deepspeed_comm",
    "load_deepspeed_json",
    "merge_deepspeed_config",
    "prepare_deepspeed",
    "prepare_native_ops",
    "zero_init_context",
]
