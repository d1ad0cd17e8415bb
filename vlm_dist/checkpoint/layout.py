"""What a checkpoint looks like on disk, and whether one can be trusted.

output_dir/
    checkpoint-<step>/
        adapter_config.json, adapter_model.safetensors   PEFT's format, in the training dtype
        trained_weights.safetensors                      instead of these two, if all was trained in full: by name
        training_state.safetensors                       float32 masters and moments by parameter name
        training_state-00001-of-00004.safetensors, ...   instead, where each rank writes its own: see `slice_reader`
        training_state.json                              everything else, and the hash of every other file
        resolved_config.yaml
        COMPLETE                                         the hash of training_state.json, written last
    best_checkpoint.json                                 which of them is the best, by which metric
    adapter/                                             the final adapter
"""

from __future__ import annotations

import hashlib
import json
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from vlm_dist.checkpoint.slice_reader import PARTS, SliceReader
from vlm_dist.engine import NamedState, TrainableState
from vlm_dist.errors import CheckpointError

FORMAT = 1
#: With a file of each rank.
SLICED_FORMAT = 2
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
TRAINED_WEIGHTS = "trained_weights.safetensors"
#: What is trained, in the form in which it is used: those of these that there are.
ADAPTER_FILES = (ADAPTER_CONFIG, ADAPTER_WEIGHTS, TRAINED_WEIGHTS)
TRAINING_TENSORS = "training_state.safetensors"
TRAINING_STATE = "training_state.json"
RESOLVED_CONFIG = "resolved_config.yaml"
COMPLETE = "COMPLETE"
FINAL_ADAPTER = "adapter"

_HASHING_THREADS = 8
_NAME = re.compile(r"checkpoint-(\d+)")


def checkpoint_name(step: int) -> str:
    """Directory name of a checkpoint."""
    return f"checkpoint-{step}"


def list_checkpoints(output_dir: Path) -> list[tuple[int, Path]]:
    """Step and path of all checkpoint directories, complete or not, newest first."""
    if not output_dir.is_dir():
        return []
    found = [(_NAME.fullmatch(path.name), path) for path in output_dir.iterdir() if path.is_dir()]
    return sorted(((int(match[1]), path) for match, path in found if match), reverse=True)


def sha256_of(path: Path) -> str:
    """Hex digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def seems_whole(path: Path) -> bool:
    """Whether a checkpoint is complete and its files have their sizes; reads no tensors, as `Checkpoint.open` does."""
    try:
        info = json.loads((path / TRAINING_STATE).read_text(encoding="utf-8"))
        sizes = {name: facts["bytes"] for name, facts in info["files"].items()}
        return (path / COMPLETE).is_file() and all((path / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def is_adapter(path: Path) -> bool:
    """Whether a directory holds what is published at the end of a run, and nothing else."""
    ours = {ADAPTER_CONFIG, ADAPTER_WEIGHTS, TRAINED_WEIGHTS}
    return path.is_dir() and {entry.name for entry in path.iterdir()} <= ours


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint.

    Attributes:
        path: its directory.
        step: steps that were done when it was written (the position in the plan).
        info: the content of training_state.json: `plan`, `global_batch_size`, `optimizer`, `scheduler`, `versions`,
            and what else the run wrote into it.
        resolved_config: YAML text of the configuration that it was written with.
        owner: rank on whose node it is; 0 also where all ranks see the same disk.
    """

    path: Path
    step: int
    info: dict[str, Any] = field(repr=False)
    resolved_config: str = field(default="", repr=False)
    owner: int = 0

    @classmethod
    def open(cls, path: Path) -> Checkpoint:
        """Verify a checkpoint, every file's hash included.

        Raises:
            CheckpointError: it is missing, incomplete or damaged; says which file and how.
        """
        if not path.is_dir():
            there = ", ".join(str(other) for _, other in list_checkpoints(path.parent)) or "none"
            raise CheckpointError(
                f"{path}: no such checkpoint; there are: {there}; auto takes the newest of output_dir"
            )
        if inside := [str(other) for _, other in list_checkpoints(path)]:
            raise CheckpointError(f"{path} is no checkpoint, but has some: name one of {', '.join(inside)}")
        if not (path / COMPLETE).exists() and not (path / TRAINING_STATE).exists():
            raise CheckpointError(
                f"{path} is no checkpoint of this program: it has neither {TRAINING_STATE} nor {COMPLETE}"
            )
        if not (path / COMPLETE).is_file():
            raise CheckpointError(f"{path}: incomplete: there is no {COMPLETE} file, so it was not written to its end")
        try:
            wanted = (path / COMPLETE).read_text(encoding="ascii").strip()
            if sha256_of(path / TRAINING_STATE) != wanted:
                raise CheckpointError(f"{path}: damaged: {TRAINING_STATE} is not what {COMPLETE} says")
            info = json.loads((path / TRAINING_STATE).read_text(encoding="utf-8"))
            if info["format"] not in (FORMAT, SLICED_FORMAT):
                known = f"{FORMAT} and {SLICED_FORMAT}"
                raise CheckpointError(f"{path}: format {info['format']}, this version reads formats {known}")
            for name, facts in info["files"].items():
                size = (path / name).stat().st_size
                if size != facts["bytes"]:
                    raise CheckpointError(f"{path}: damaged: {name} has {size} bytes instead of {facts['bytes']}")
            with ThreadPoolExecutor(_HASHING_THREADS) as pool:  # hashing leaves the interpreter's lock to others
                digests = dict(
                    zip(info["files"], pool.map(lambda name: sha256_of(path / name), info["files"]), strict=True)
                )
            for name, facts in info["files"].items():
                if digests[name] != facts["sha256"]:
                    raise CheckpointError(f"{path}: damaged: the content of {name} does not match its hash")
            return cls(path, int(info["step"]), info, (path / RESOLVED_CONFIG).read_text(encoding="utf-8"))
        except OSError as error:
            raise CheckpointError(f"{path}: damaged: {error}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path}: damaged: {TRAINING_STATE} cannot be read ({error!r})") from error

    @property
    def is_sliced(self) -> bool:
        """Whether each rank has written a file of its own."""
        return bool(self.info["format"] == SLICED_FORMAT)

    def open_slices(self) -> SliceReader:
        """The files of the ranks.

        Raises:
            CheckpointError: they cannot be read.
        """
        return SliceReader(self.path, self.info)

    def read_trainable(self) -> TrainableState:
        """Masters, moments and the optimizer's step.

        Raises:
            CheckpointError: the file cannot be read, or does not hold what training_state.json promises.
        """
        if self.is_sliced:
            slices = self.open_slices()
            return self._with_optimizer({name: slices.read_whole(name) for name in slices.shapes})
        try:
            tensors = load_file(self.path / TRAINING_TENSORS)
            prefix = f"{PARTS[0]}/"
            names = [key.removeprefix(prefix) for key in tensors if key.startswith(prefix)]
            parameters = {name: NamedState(*(tensors[f"{part}/{name}"] for part in PARTS)) for name in names}
        except (OSError, SafetensorError, KeyError) as error:
            raise CheckpointError(f"{self.path}: {TRAINING_TENSORS} cannot be read: {error!r}") from error
        return self._with_optimizer(parameters)

    def _with_optimizer(self, parameters: dict[str, NamedState]) -> TrainableState:
        optimizer = self.info["optimizer"]
        return TrainableState(
            step=int(optimizer["step"]),
            parameters=parameters,
            hyperparameters=optimizer["hyperparameters"],
            loss_scaler=optimizer["loss_scaler"],
        )
