"""The run file, and the whole resolved configuration of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field

from vlm_dist.config.data import DataConfig
from vlm_dist.config.masking import MASK, without_secrets
from vlm_dist.config.peft import PeftConfig
from vlm_dist.config.section import Name, PathField, Section
from vlm_dist.config.train import TrainConfig
from vlm_dist.config.vlm_collator import VlmCollatorConfig
from vlm_dist.config.vlm_model import ModelClassEntry, VlmModelConfig
from vlm_dist.config.yaml_document import dump_yaml

#: Section -> its schema; the order is that of reports.
SECTIONS: dict[str, type[Section]] = {
    "model": VlmModelConfig,
    "collator": VlmCollatorConfig,
    "train": TrainConfig,
    "peft": PeftConfig,
    "data": DataConfig,
}

_TITLE = f"""\
# The resolved configuration of a run: all values, wherever they came from. A run may start from this file.
# Secrets in paths of data (passwords, signatures) were left out: where {MASK} stands, write the path again first.
"""

#: What is used when no run file is named.
DEFAULT_RUN_FILE = Path("configs/run.yaml")


class ConfigFiles(Section):
    """The five files of a run, relative to its run file."""

    model: Name = "vlm_model_config.yaml"
    collator: Name = "vlm_collator_config.yaml"
    train: Name = "train_config.yaml"
    peft: Name = "peft_config.yaml"
    data: Name = "data_config.yaml"


class RunFile(Section):
    """A run: a model, five files, a DeepSpeed JSON, and what differs from the files."""

    model: Name | None = None  # required; null here so that everything else is checked without it
    configs: ConfigFiles = Field(default_factory=ConfigFiles)
    deepspeed: Name = "../ds_configs/zero2.json"
    overrides: dict[str, Any] = Field(default_factory=dict)


class RunConfig(Section):
    """Everything that decides a run, checked; the attributes are the keys of the YAML files.

    Attributes:
        model_id: hub id or local directory.
        deepspeed: DeepSpeed's own JSON.
        notices: what is legal, but worth a line before the run; not part of the configuration itself.
    """

    model_id: Name
    deepspeed: PathField
    model: VlmModelConfig = Field(default_factory=VlmModelConfig)
    collator: VlmCollatorConfig = Field(default_factory=VlmCollatorConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    peft: PeftConfig = Field(default_factory=PeftConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    notices: tuple[str, ...] = Field(default=(), exclude=True)

    @property
    def model_entry(self) -> ModelClassEntry:
        """The classes of this run's model."""
        return self.model.entry(self.model_id)

    def dump(self) -> dict[str, Any]:
        """All values, defaults included, as YAML knows them; without the secrets in paths of data."""
        return without_secrets(self.model_dump(mode="json"))

    def to_yaml(self) -> str:
        """The resolved configuration as text; `load_run` reads such a file as well as a run file."""
        return _TITLE + dump_yaml(self.dump())

    def write(self, path: Path) -> None:
        """Write `to_yaml()` to a file."""
        path.write_text(self.to_yaml(), encoding="utf-8")
