"""Starting from what an earlier run trained (`peft.adapter`): an adapter of ours or of PEFT's, or weights by name.

It is read on rank 0 alone and goes through the engine's masters, so that it works at any ZeRO stage, and a float32
adapter is not rounded on its way. Nothing of the run that made it is continued: no moments, no position.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from vlm_dist.checkpoint.adapter import saved_names
from vlm_dist.checkpoint.earlier_tokens import check_new_tokens
from vlm_dist.checkpoint.layout import ADAPTER_CONFIG, ADAPTER_WEIGHTS, TRAINED_WEIGHTS
from vlm_dist.config import PeftConfig
from vlm_dist.distributed.failures import agree_on_failure
from vlm_dist.distributed.group import Ranks
from vlm_dist.engine import Engine, NamedState, TrainableState
from vlm_dist.errors import CheckpointError, ConfigError

log = logging.getLogger(__name__)

#: What makes the adapter's function; the keys have the same names in PEFT's file and in peft_config.yaml.
_SETTINGS = ("r", "lora_alpha", "use_rslora", "use_dora", "bias")
#: What PEFT knows and we do not train.
_UNSUPPORTED = ("rank_pattern", "alpha_pattern", "layer_replication", "target_parameters", "trainable_token_indices")
#: Starts that leave the base as it is; the others move a part of it into the adapter.
_PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")


@dataclass(frozen=True)
class StartingPoint:
    """An adapter on disk, without its tensors.

    Attributes:
        path: its directory.
        config: content of adapter_config.json; None: weights by name, that were trained without an adapter.
        shapes: of the tensors, by key of the file.
    """

    path: Path
    config: Mapping[str, Any] | None
    shapes: Mapping[str, tuple[int, ...]]

    @property
    def file(self) -> Path:
        """Where the tensors are."""
        return self.path / (TRAINED_WEIGHTS if self.config is None else ADAPTER_WEIGHTS)

    @classmethod
    def open(cls, path: Path) -> StartingPoint:
        """Read everything but the tensors.

        Raises:
            CheckpointError: there is no adapter, or it cannot be read.
        """
        has_adapter = (path / ADAPTER_CONFIG).is_file()
        if not has_adapter and not (path / TRAINED_WEIGHTS).is_file():
            raise CheckpointError(
                f"peft.adapter: {path} is no directory with {ADAPTER_CONFIG} and {ADAPTER_WEIGHTS}, nor with "
                f"{TRAINED_WEIGHTS}; name a run's adapter/ or checkpoint-<step>/"
            )
        if has_adapter and not (path / ADAPTER_WEIGHTS).is_file():
            raise CheckpointError(
                f"peft.adapter: {path} has no {ADAPTER_WEIGHTS}; an older .bin file is a pickle, which is not read: "
                "load it with PEFT and save it again"
            )
        try:
            config = json.loads((path / ADAPTER_CONFIG).read_text(encoding="utf-8")) if has_adapter else None
            if not isinstance(config, dict | None):
                raise ValueError(f"{ADAPTER_CONFIG} holds a {type(config).__name__}, expected a mapping")
            point = cls(path, config, {})
            with safe_open(point.file, framework="pt") as file:
                shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
            return cls(path, config, shapes)
        except (OSError, ValueError, SafetensorError) as error:
            raise CheckpointError(f"peft.adapter: {path} cannot be read: {error}") from error

    def check_settings(self, settings: PeftConfig) -> None:
        """Refuse an adapter of another form than peft_config.yaml says; the error has the lines that fit.

        Raises:
            ConfigError: they differ.
        """
        if self.config is None:
            return
        given = self.config
        kind = str(given.get("peft_type", "LORA")).removeprefix("PeftType.")
        if kind != "LORA":
            raise ConfigError(f"peft.adapter: {self.path} is of type {kind}, expected LORA")
        extra = [key for key in _UNSUPPORTED if given.get(key)]
        if extra:
            raise ConfigError(f"peft.adapter: {self.path} has {', '.join(extra)}, which is not yet supported")
        start = given.get("init_lora_weights", True)
        if start not in _PLAIN_STARTS:
            raise ConfigError(
                f"peft.adapter: {self.path} was started with init_lora_weights {start!r}, which changes the base model "
                "too; save it with PEFT's path_initial_model_for_weight_conversion first"
            )
        differing = [
            (key, given[key], getattr(settings, key))
            for key in _SETTINGS
            if key in given and given[key] != getattr(settings, key)
        ]
        if differing:
            lines = "; ".join(f"{key}: {theirs!r} there, {ours!r} here" for key, theirs, ours in differing)
            values = ", ".join(f"{key}: {json.dumps(theirs)}" for key, theirs, _ in differing)
            raise ConfigError(
                f"peft.adapter: {self.path} is another adapter than peft_config.yaml describes: {lines}. "
                f"To start from it, set peft: {{{values}}}"
            )

    def parameter_names(self, model: nn.Module) -> dict[str, str]:
        """Key of the file -> name of the parameter that it starts.

        Raises:
            ConfigError: it holds what this run does not train, or lacks LoRA that this run has.
        """
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        names = saved_names(model, trained)
        stray = sorted(set(self.shapes) - set(names))
        lacking = sorted(key for key, name in names.items() if ".lora_" in name and key not in self.shapes)
        where = f"peft.adapter: {self._other_base(model)}{self.path}"
        if stray:
            raise ConfigError(
                f"{where} holds {len(stray)} of {len(self.shapes)} weights that this run does not "
                f"train, e.g. {stray[0]}: the result would lack them. {self._advice()}"
            )
        if lacking:
            raise ConfigError(
                f"{where} lacks {len(lacking)} LoRA weights of this run, e.g. {lacking[0]}. {self._advice()}"
            )
        for key, shape in self.shapes.items():
            parameter = trained[names[key]]
            ours = tuple(getattr(parameter, "ds_shape", parameter.shape))
            if shape != ours:
                raise ConfigError(f"{where}: {key} has shape {shape}, in the model it has {ours}{_rows(shape, ours)}")
        if other := self._other_base(model):
            log.warning("peft.adapter: %sIts weights fit; if the two are not the same, its start is noise", other)
        return {key: names[key] for key in self.shapes}

    def read(self) -> dict[str, Tensor]:
        """The tensors in float32, by key of the file.

        Raises:
            CheckpointError: the file cannot be read, or holds values that are no numbers.
        """
        try:
            with safe_open(self.file, framework="pt") as file:
                tensors = {key: file.get_tensor(key).float() for key in self.shapes}
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"peft.adapter: {self.file} cannot be read: {error}") from error
        broken = [key for key, tensor in tensors.items() if not torch.isfinite(tensor).all()]
        if broken:
            raise CheckpointError(
                f"peft.adapter: {self.file} holds NaN or infinity in {len(broken)} of {len(tensors)} weights, e.g. "
                f"{broken[0]}: the run that wrote it had diverged; start from an earlier checkpoint of it"
            )
        return tensors

    def _other_base(self, model: Any) -> str:
        """A sentence where the adapter says that it was trained on another model; directories may have moved."""
        theirs = (self.config or {}).get("base_model_name_or_path")
        ours = getattr(model, "name_or_path", None)
        if not theirs or not ours or Path(str(theirs)).name == Path(str(ours)).name:
            return ""
        return f"it was trained on {theirs}, but this run's model is {ours}. "

    def _advice(self) -> str:
        """What of peft_config.yaml has to fit, in the adapter's own words."""
        if self.config is None:
            return "It was trained without an adapter: give the same towers policy full, and no tower lora."
        targets = self.config.get("target_modules")
        told = f"{len(targets)} names" if isinstance(targets, list) and len(targets) > 6 else json.dumps(targets)
        whole = self.config.get("modules_to_save")
        also = f" and {len(whole)} modules_to_save" if whole else ""
        return (
            f"Its target_modules are {told}{also}: towers, target_modules and modules_to_save must mean the same "
            "modules"
        )


def _rows(theirs: tuple[int, ...], ours: tuple[int, ...]) -> str:
    """What a matrix of the vocabulary with another number of rows means."""
    if len(ours) != 2 or theirs[1:] != ours[1:]:
        return ""
    return (
        "; if this is the vocabulary, processor_params.new_special_tokens must list the tokens of the run that made "
        "it, in its order"
    )


def open_starting_point(settings: PeftConfig, ranks: Ranks, processor: Any) -> StartingPoint | None:
    """Look at `peft.adapter`, before the model is loaded. Collective: every rank calls this; only rank 0 reads.

    Args:
        settings: peft_config.yaml.
        ranks: this process among its peers.
        processor: of this run.

    Raises:
        CheckpointError: on every rank: it cannot be read.
        ConfigError: on every rank: it has another form than peft_config.yaml says, or other new special tokens.
    """
    point = None
    with agree_on_failure(ranks):
        if ranks.is_main and settings.adapter is not None:
            point = StartingPoint.open(settings.adapter)
            point.check_settings(settings)
            check_new_tokens(point, processor)
    shared: StartingPoint | None = ranks.broadcast_object(point)
    return shared


def start_from(point: StartingPoint, engine: Engine, names: Mapping[str, str], ranks: Ranks) -> None:
    """Put its weights into the engine's masters, before the first step. Collective: every rank calls this.

    Args:
        point: to start from.
        engine: new.
        names: from `StartingPoint.parameter_names`.
        ranks: this process among its peers.

    Raises:
        CheckpointError: on every rank: the file cannot be read.
    """
    fresh = engine.collect_trainable()
    start: TrainableState | None = None
    with agree_on_failure(ranks):
        if fresh is not None:
            masters: dict[str, Tensor] = {}
            for key, tensor in point.read().items():
                if not torch.equal(masters.setdefault(names[key], tensor), tensor):
                    raise CheckpointError(
                        f"peft.adapter: {point.path}: {key} shares its weight with another module in this model, but "
                        "not in the adapter"
                    )
            parameters = {
                name: NamedState(masters.get(name, state.master), state.exp_avg, state.exp_avg_sq)
                for name, state in fresh.parameters.items()
            }
            start = TrainableState(0, parameters, loss_scaler=fresh.loss_scaler)
    engine.restore_trainable(start)
