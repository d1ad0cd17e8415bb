"""Safetensors files read and written one tensor at a time, so that a conversion needs the memory of one tensor."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from vlm_dist.errors import ModelError

_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies.

    Attributes:
        file: that has it.
        name: in the file.
        dtype: as the format writes it, such as "BF16".
        shape: of the tensor.
        offset: of its first byte in the file.
    """

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def num_bytes(self) -> int:
        """Size of its values."""
        return math.prod(self.shape) * _DTYPES[self.dtype].itemsize

    def read(self) -> Tensor:
        """Read its values.

        Raises:
            ModelError: the file ends before they do.
        """
        data = bytearray(self.num_bytes)
        with self.file.open("rb") as stream:
            stream.seek(self.offset)
            if stream.readinto(data) != len(data):
                raise ModelError(f"{self.file} ends in the midst of {self.name}. Copy or download it again.")
        return (
            torch.frombuffer(data, dtype=_DTYPES[self.dtype]).reshape(self.shape) if data else torch.empty(self.shape)
        )


def stored_tensors(file: Path) -> list[StoredTensor]:
    """What a safetensors file has, in the order of the file.

    Raises:
        ModelError: it is damaged, or has integers or quantised weights.
    """
    try:
        with file.open("rb") as stream:
            (size,) = struct.unpack("<Q", stream.read(8))
            if size > _MAX_HEADER_BYTES:
                raise ValueError("its header is too large")
            header: dict[str, Any] = json.loads(stream.read(size))
        header.pop("__metadata__", None)
        found = [
            StoredTensor(file, name, entry["dtype"], tuple(entry["shape"]), 8 + size + entry["data_offsets"][0])
            for name, entry in header.items()
        ]
    except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise ModelError(f"{file} is damaged ({error!r}). Copy or download it again.") from error
    strange = sorted({tensor.dtype for tensor in found} - set(_DTYPES))
    if strange:
        raise ModelError(
            f"{file} has weights of type {', '.join(strange)}; only whole floating-point ones are converted"
        )
    return sorted(found, key=lambda tensor: tensor.offset)


class TensorWriter:
    """Writes one safetensors file whose tensors are announced first and then come one by one, in that order.

    Args:
        file: to write.
        announced: name, dtype and shape of each.
    """

    def __init__(self, file: Path, announced: Iterable[tuple[str, str, tuple[int, ...]]]) -> None:
        self._pending = list(announced)
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        position = 0
        for name, dtype, shape in self._pending:
            end = position + math.prod(shape) * _DTYPES[dtype].itemsize
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
            position = end
        encoded = json.dumps(header).encode()
        encoded += b" " * (-len(encoded) % 8)
        self._next = 0
        self._stream = file.open("wb")
        self._stream.write(struct.pack("<Q", len(encoded)) + encoded)

    def write(self, name: str, tensor: Tensor) -> None:
        """Write the next announced tensor."""
        expected, dtype, shape = self._pending[self._next]
        if (name, _DTYPES[dtype], shape) != (expected, tensor.dtype, tuple(tensor.shape)):
            raise ValueError(f"announced was {expected} {dtype} {shape}, not {name} {tensor.dtype} {tensor.shape}")
        self._stream.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
        self._next += 1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._stream:
            if error is None:
                if self._next != len(self._pending):
                    raise ValueError(f"{len(self._pending) - self._next} announced tensors were not written")
                self._stream.flush()
                os.fsync(self._stream.fileno())
