"""Where DeepSpeed's C++ is compiled, on the machine and at the time that it is first needed."""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch


@contextmanager
def own_build_directory() -> Iterator[None]:
    """A directory for this kind of CPU and this torch, in which one process at a time compiles.

    Torch's cache knows neither: on a home directory that several kinds of machines share, code that was compiled for
    one would end the processes of another. And torch waits without end for a lock that a killed compilation left.
    """
    default = Path.home() / ".cache" / "torch_extensions"
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or default) / f"vlm_dist-{_machine()}"
    root.mkdir(parents=True, exist_ok=True)
    before = os.environ.get("TORCH_EXTENSIONS_DIR")
    os.environ["TORCH_EXTENSIONS_DIR"] = str(root)
    try:
        with (root / "compiling").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            for left in root.glob("*/lock"):  # torch's own: whoever made it was killed, else it would hold ours
                left.unlink(missing_ok=True)
            yield
    finally:
        if before is None:
            del os.environ["TORCH_EXTENSIONS_DIR"]
        else:
            os.environ["TORCH_EXTENSIONS_DIR"] = before


def _machine() -> str:
    """What compiled code depends on: the CPU's instructions, torch and Python."""
    flags = ""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:
        flags = platform.processor()
    about = f"{platform.machine()} {flags} {torch.__version__} {platform.python_version()}"
    return hashlib.sha256(about.encode()).hexdigest()[:12]
