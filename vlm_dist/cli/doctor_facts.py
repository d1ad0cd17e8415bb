"""What a node is like: facts that are gathered on every node of a run, and compared on one. Starts nothing heavy."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import socket
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vlm_dist.config import RunConfig

#: Must be the same on all nodes.
PACKAGES = ("vlm-dist", "torch", "transformers", "peft", "deepspeed", "datasets", "webdataset", "decord", "wandb")

#: To measure how fast shards are read: so much, or for so long.
READ_BYTES, READ_SECONDS = 256 << 20, 2.0


@dataclass(frozen=True)
class SourceFacts:
    """One path of a source in local files.

    Attributes:
        path: as it is configured.
        num_shards: files that it leads to.
        num_bytes: of all of them.
    """

    path: str
    num_shards: int
    num_bytes: int


@dataclass(frozen=True)
class NodeFacts:
    """One node. Sizes in bytes, rates in bytes per second; None: not found out.

    Attributes:
        host: its name.
        versions: package -> version; "" where it is not installed.
        cuda: that torch was built for; "" for a build without.
        nccl: version in torch; "" for a build without.
        driver: of the GPUs.
        gpus: name and memory of each.
        stock_deepspeed: what to say about the `deepspeed` command; "" when it is ours.
        cores: that this process may use.
        memory_bytes: of the node.
        shm_bytes: size of /dev/shm; None: there is none.
        open_files: soft limit.
        locked_bytes: soft limit; -1: none.
        has_infiniband: there are adapters.
        free_bytes: place -> free space.
        sources: what is there of the run's data.
        read_rate: of its shards, not from memory.
        interface: what was said about the choice of one; "" where there was none.
    """

    host: str
    versions: dict[str, str]
    cuda: str = ""
    nccl: str = ""
    driver: str = ""
    gpus: tuple[tuple[str, int], ...] = ()
    stock_deepspeed: str = ""
    cores: int = 0
    memory_bytes: int = 0
    shm_bytes: int | None = None
    open_files: int = 0
    locked_bytes: int = -1
    has_infiniband: bool = False
    free_bytes: dict[str, int] = field(default_factory=dict)
    sources: tuple[SourceFacts, ...] = ()
    read_rate: float | None = None
    interface: str = ""


def gather_facts(config: RunConfig | None, interface: str = "") -> NodeFacts:
    """Look at this node.

    Args:
        config: of the run that is to start; None: the node alone.
        interface: what was said about the choice of one.
    """
    import psutil
    import torch

    from launcher.entry_point_check import stock_deepspeed_notice
    from vlm_dist.distributed.interfaces import has_infiniband

    is_cuda = torch.cuda.is_available()
    devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count() if is_cuda else 0)]
    files = _shard_files(config)
    return NodeFacts(
        host=socket.gethostname(),
        versions={"python": platform.python_version()} | {package: _version(package) for package in PACKAGES},
        cuda=torch.version.cuda or "",
        nccl=".".join(map(str, torch.cuda.nccl.version())) if is_cuda else "",
        driver=_driver(),
        gpus=tuple((device.name, device.total_memory) for device in devices),
        stock_deepspeed=stock_deepspeed_notice() or "",
        cores=len(os.sched_getaffinity(0)),
        memory_bytes=psutil.virtual_memory().total,
        shm_bytes=shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else None,  # noqa: S108
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        locked_bytes=resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
        has_infiniband=has_infiniband(),
        free_bytes=_free(config),
        sources=tuple(
            SourceFacts(path, len(found), sum(file.stat().st_size for file in found)) for path, found in files.items()
        ),
        interface=interface,
        read_rate=read_rate([file for found in files.values() for file in found]),
    )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _driver(path: Path = Path("/proc/driver/nvidia/version")) -> str:
    try:
        words = path.read_text(encoding="utf-8").splitlines()[0].split()
    except (OSError, IndexError):
        return ""
    return next((word for word in words if word[0].isdigit() and "." in word), "")


def existing_parent(path: Path) -> Path:
    """The path itself, or the nearest directory above it that is there."""
    path = path.absolute()
    while not path.is_dir():
        path = path.parent
    return path


def _free(config: RunConfig | None) -> dict[str, int]:
    places = {"temporary directory": Path(tempfile.gettempdir())}
    if config is not None:
        places["output_dir"] = config.train.output_dir
    return {name: shutil.disk_usage(existing_parent(path)).free for name, path in places.items()}


def _shard_files(config: RunConfig | None) -> dict[str, list[Path]]:
    """Path of a source -> its files; remote ones and pipes are left out."""
    from launcher.preflight import find_files

    sources = (*config.data.train, *config.data.eval) if config is not None else ()
    paths = [
        path for source in sources for path in ([source.path] if isinstance(source.path, str) else source.path or [])
    ]
    return {path: find_files(path) for path in paths if "://" not in path and not path.startswith("pipe:")}


def read_rate(files: Sequence[Path]) -> float | None:
    """Bytes per second of reading from the front of some files, each dropped from the page cache first."""
    done, began = 0, time.monotonic()
    for file in files:
        try:
            with file.open("rb", buffering=0) as stream:
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                while chunk := stream.read(4 << 20):
                    done += len(chunk)
                    if done >= READ_BYTES or time.monotonic() - began > READ_SECONDS:
                        return done / (time.monotonic() - began)
        except OSError:
            continue  # that it cannot be read is found where files are counted by size
    seconds = time.monotonic() - began
    return done / seconds if done and seconds > 0 else None
