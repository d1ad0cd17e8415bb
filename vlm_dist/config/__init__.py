"""The config room: one typed schema per YAML file, strict loading, laws between keys, and the batch arithmetic.

    cfg = load_run(Path("configs/demo.yaml"), ["train.learning_rate=1e-4"])

Names no torch, and takes a fraction of a second to import: the launcher uses it on a login node.
"""

from vlm_dist.config.arithmetic import BatchArithmetic, resolve_batch, resolve_interval
from vlm_dist.config.data import DataConfig, DataSource
from vlm_dist.config.load import Drafted, draft_run, load_run
from vlm_dist.config.peft import PeftConfig, TowerPolicies
from vlm_dist.config.run import DEFAULT_RUN_FILE, SECTIONS, RunConfig
from vlm_dist.config.train import TrainConfig
from vlm_dist.config.vlm_collator import VlmCollatorConfig
from vlm_dist.config.vlm_model import LoadingParams, ModelClassEntry, ProcessorParams, VlmModelConfig

__all__ = [
    "DEFAULT_RUN_FILE",
    "SECTIONS",
    "BatchArithmetic",
    "DataConfig",
    "DataSource",
    "Drafted",
    "LoadingParams",
    "ModelClassEntry",
    "PeftConfig",
    "ProcessorParams",
    "RunConfig",
    "TowerPolicies",
    "TrainConfig",
    "VlmCollatorConfig",
    "VlmModelConfig",
    "draft_run",
    "load_run",
    "resolve_batch",
    "resolve_interval",
]
