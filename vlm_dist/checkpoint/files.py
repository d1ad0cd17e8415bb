"""Writing the files of a checkpoint, each hashed on its way to the disk.

A tensor file is what safetensors reads. It is written here, because the library first copies everything into one
buffer and holds the interpreter's lock while it writes, which the training loop would feel; and because the hash of
what was meant is worth more than that of what can be read back.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

_CODES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_ALIGNMENT = 8
_CHUNK_BYTES = 1 << 24


class FileSet:
    """Files of one directory, and what is known of them.

    Args:
        directory: exists.

    Attributes:
        facts: per file name its `bytes` and `sha256`.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.facts: dict[str, dict[str, Any]] = {}

    def write_text(self, name: str, text: str) -> None:
        """Write a text file in UTF-8."""
        with (self._directory / name).open("wb") as file:
            self._finish(name, _Hashed(file).write(text.encode("utf-8")))

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Write a JSON file for people, too; equal content has equal bytes."""
        self.write_text(name, json.dumps(content, indent=2, sort_keys=True) + "\n")

    def write_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Write a safetensors file.

        Args:
            name: of the file.
            tensors: floating ones on the CPU, of any layout.
        """
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for key, tensor in tensors.items():
            start, end = end, end + tensor.numel() * tensor.element_size()
            header[key] = {
                "dtype": _CODES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [start, end],
            }
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % _ALIGNMENT)
        with (self._directory / name).open("wb") as file:
            hashed = _Hashed(file)
            hashed.write(len(encoded).to_bytes(8, "little") + encoded)
            for tensor in tensors.values():
                if tensor.numel():
                    hashed.write(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data)
            self._finish(name, hashed)

    def adopt(self, path: Path, facts: Mapping[str, Any]) -> None:
        """Move a file here that was written elsewhere.

        Args:
            path: on the same file system.
            facts: its `bytes` and `sha256`.
        """
        path.rename(self._directory / path.name)
        self.facts[path.name] = dict(facts)

    def _finish(self, name: str, hashed: _Hashed) -> None:
        self.facts[name] = {"bytes": hashed.num_bytes, "sha256": hashed.digest.hexdigest()}


class _Hashed:
    """Hashes what it writes; both leave the interpreter's lock to others."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.digest = hashlib.sha256()
        self.num_bytes = 0

    def write(self, content: bytes | memoryview) -> _Hashed:
        for start in range(0, len(content), _CHUNK_BYTES):
            chunk = content[start : start + _CHUNK_BYTES]
            self._file.write(chunk)
            self.digest.update(chunk)
        self.num_bytes += len(content)
        return self
