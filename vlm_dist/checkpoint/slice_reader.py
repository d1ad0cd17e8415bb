"""Reading masters and moments from the files of a sliced checkpoint, wherever they were cut.

A file has, for each run of elements of a parameter that its rank owned, three flat tensors: `master/NAME/START`,
`exp_avg/NAME/START` and `exp_avg_sq/NAME/START`, START being the first element of the flattened parameter.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vlm_dist.engine import NamedState
from vlm_dist.errors import CheckpointError

#: Parts of a parameter's state, as prefixes of the keys in a checkpoint's tensor files.
PARTS = ("master", "exp_avg", "exp_avg_sq")

_SLICE = re.compile(r"training_state-\d{5}-of-\d{5}\.safetensors")


def slice_name(rank: int, world_size: int) -> str:
    """Name of one rank's file, counted from 1 as the hub's models are."""
    return f"training_state-{rank + 1:05d}-of-{world_size:05d}.safetensors"


def is_slice(name: str) -> bool:
    """Whether a file of a checkpoint is one rank's."""
    return _SLICE.fullmatch(name) is not None


class SliceReader:
    """Reads elements of parameters from the files of a sliced checkpoint.

    Args:
        path: of the checkpoint.
        info: the content of its training_state.json.

    Raises:
        CheckpointError: the files cannot be read, or do not hold all elements.
    """

    def __init__(self, path: Path, info: Mapping[str, Any]) -> None:
        self._path = path
        self.shapes = {name: torch.Size(shape) for name, shape in info["shapes"].items()}
        self._files: dict[str, Any] = {}
        self._places: dict[str, list[tuple[int, int, str]]] = {name: [] for name in self.shapes}
        prefix = f"{PARTS[0]}/"
        try:
            for name in sorted(info["files"]):
                if not is_slice(name):
                    continue
                file = safe_open(path / name, framework="pt")
                self._files[name] = file
                for key in file.keys():  # noqa: SIM118 - not a mapping
                    if key.startswith(prefix):
                        parameter, _, start = key.removeprefix(prefix).rpartition("/")
                        count = file.get_slice(key).get_shape()[0]
                        self._places[parameter].append((int(start), int(start) + count, name))
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise CheckpointError(f"{path}: its slices cannot be read: {error!r}") from error
        for parameter, shape in self.shapes.items():
            places = sorted(self._places[parameter])
            ends = [0, *(end for _, end, _ in places)]
            if [start for start, _, _ in places] != ends[:-1] or ends[-1] != shape.numel():
                raise CheckpointError(f"{path}: its slices do not hold all elements of {parameter}")
            self._places[parameter] = places

    def read(self, name: str, start: int, num_elements: int) -> NamedState:
        """Elements of one flattened parameter: float32 [num_elements] for each part.

        Raises:
            CheckpointError: the file cannot be read.
        """
        end = start + num_elements
        places = self._places[name]
        runs: list[list[Tensor]] = [[] for _ in PARTS]
        try:
            for first, last, file in places[max(0, bisect_right(places, (start, end, "~")) - 1) :]:
                if first >= end:
                    break
                begin, stop = max(start, first) - first, min(end, last) - first
                if begin >= stop:
                    continue
                for part, found in zip(PARTS, runs, strict=True):
                    found.append(self._files[file].get_slice(f"{part}/{name}/{first}")[begin:stop])
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{self._path}: its slices cannot be read: {error!r}") from error
        return NamedState(*(found[0] if len(found) == 1 else torch.cat(found) for found in runs))

    def read_whole(self, name: str) -> NamedState:
        """One parameter in its shape."""
        shape = self.shapes[name]
        state = self.read(name, 0, shape.numel())
        return NamedState(*(getattr(state, part).view(shape) for part in PARTS))
