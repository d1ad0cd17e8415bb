"""Weights on an NVMe disk: what has to be there, looked up before anything is loaded.

DeepSpeed itself finds out in the middle of the start, on each rank for itself, and in words of a compiler.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vlm_dist.engine.build_directory import own_build_directory
from vlm_dist.errors import ConfigError

_PROGRAM = "#include <libaio.h>\nint main() { return io_submit(0, 0, 0); }\n"


def uses_nvme(zero: Mapping[str, Any]) -> bool:
    """Whether a zero_optimization section keeps anything on NVMe."""
    sections = (zero.get(key) for key in ("offload_optimizer", "offload_param"))
    return any(isinstance(section, Mapping) and section.get("device") == "nvme" for section in sections)


def check_nvme(key: str, offload: Mapping[str, Any], problem: Callable[[str, str], None]) -> None:
    """Check one offload section whose device is "nvme". Local: each node has a disk of its own.

    Args:
        key: offload_param or offload_optimizer.
        offload: the section.
        problem: takes a dotted key and what is wrong with it.
    """
    dotted = f"zero_optimization.{key}"
    if key == "offload_optimizer":
        problem(
            f"{dotted}.device",
            'is "nvme", which is not supported: between steps the moments would lie where no checkpoint reaches them, '
            'and LoRA has 12 bytes of them per trainable parameter; use "cpu"',
        )
        return
    path = offload.get("nvme_path")
    if path is None:
        problem(f"{dotted}.nvme_path", "is missing: the directory on the NVMe disk, such as /local_nvme")
        return
    if not Path(path).is_dir():
        problem(f"{dotted}.nvme_path", f"is {path!r}, which is not a directory on this node")
    elif not os.access(path, os.W_OK | os.X_OK):
        problem(f"{dotted}.nvme_path", f"is {path!r}, where this user may not write")
    elif (missing := missing_for_aio()) is not None:
        problem(f"{dotted}.device", f'is "nvme", for which {missing}')


def prepare_async_io(ds_config: Mapping[str, Any]) -> None:
    """Compile DeepSpeed's asynchronous reads, if the configuration keeps weights on NVMe. Local.

    Raises:
        ConfigError: they cannot be compiled.
    """
    if not uses_nvme(ds_config["zero_optimization"]):
        return
    try:
        with own_build_directory():
            from deepspeed.ops.op_builder import AsyncIOBuilder

            AsyncIOBuilder().load(verbose=False)
    except Exception as error:
        raise ConfigError(
            f'zero_optimization.offload_param.device is "nvme", for which DeepSpeed\'s async_io could not be compiled '
            f'here: {str(error).splitlines()[0]}; use "cpu"'
        ) from error


def missing_for_aio() -> str | None:
    """What DeepSpeed's asynchronous reads cannot be compiled without; None if all is there."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        return "a C++ compiler is missing on this node (Debian: apt install g++)"
    if shutil.which("ninja") is None:
        return "ninja is missing on this node (pip install ninja)"
    with tempfile.TemporaryDirectory() as directory:
        source = Path(directory) / "probe.cpp"
        source.write_text(_PROGRAM, encoding="utf-8")
        flags = [*os.environ.get("CFLAGS", "").split(), *os.environ.get("LDFLAGS", "").split()]
        command = [compiler, str(source), "-o", str(source.with_suffix("")), *flags, "-laio"]
        if subprocess.run(command, capture_output=True, check=False).returncode:  # noqa: S603 - the user's own compiler
            return "libaio is missing on this node (Debian: apt install libaio-dev, Red Hat: libaio-devel)"
    return None
