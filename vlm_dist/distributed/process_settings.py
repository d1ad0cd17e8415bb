"""Environment variables that a rank needs, and that its launcher has not set.

Set before torch is imported, as OpenMP reads its variable when it is loaded. What somebody has set stays as it is.
"""

from __future__ import annotations

import os
import socket
import stat
import tempfile
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from pathlib import Path

from vlm_dist.distributed.environment import Topology
from vlm_dist.distributed.interfaces import (
    Choice,
    address_towards,
    choose_interface,
    find_interfaces,
    own_name_is_loopback,
)

#: Threads for one operation on the CPU; more do not help the sizes that training has there.
MAX_OMP_THREADS = 16


@dataclass(frozen=True)
class Surroundings:
    """What values are made from.

    Attributes:
        topology: this process among its peers.
        cores: that this process may use.
        shares_cores: the other ranks of the node may use the same ones.
        cache: a directory on this node for what is made at run time; None: there is none that can be trusted.
        network: interface for the traffic between nodes.
    """

    topology: Topology
    cores: int
    shares_cores: bool
    cache: Path | None
    network: Choice


@dataclass(frozen=True)
class Setting:
    """A variable, when it is set, and why.

    Attributes:
        name: of the variable.
        value: for a process; None: it stays unset.
        why: for the manual.
    """

    name: str
    value: Callable[[Surroundings], str | None]
    why: str


def _omp_threads(around: Surroundings) -> str | None:
    if around.topology.local_world_size == 1:
        return None
    ranks = around.topology.local_world_size if around.shares_cores else 1
    return str(max(1, min(around.cores // ranks // 2, MAX_OMP_THREADS)))


def _node_cache(folder: str) -> Callable[[Surroundings], str | None]:
    def value(around: Surroundings) -> str | None:
        if around.cache is None or not around.topology.has_several_nodes:
            return None
        return str(around.cache / folder)

    return value


def _interface(around: Surroundings) -> str | None:
    return around.network.interface


#: What is set, in this order; docs/launching.md explains each.
SETTINGS = (
    Setting(
        "OMP_NUM_THREADS",
        _omp_threads,
        "several ranks on a node: half of a rank's share of the cores, at most 16. Unset, every rank starts a thread "
        "per core of the node, and they fight with each other and with the data workers",
    ),
    Setting(
        "NCCL_SOCKET_IFNAME",
        _interface,
        "several nodes, where a node has several interfaces: the one on the way to MASTER_ADDR. NCCL takes the first",
    ),
    Setting(
        "GLOO_SOCKET_IFNAME",
        _interface,
        "the same for gloo, which takes the one that the node's own name resolves to, often 127.0.1.1",
    ),
    Setting(
        "TORCH_EXTENSIONS_DIR",
        _node_cache("torch_extensions"),
        "several nodes: compiled operators of DeepSpeed. In a home directory that nodes share they would wait for each "
        "other's locks, or load what was compiled for another CPU",
    ),
    Setting(
        "TRITON_CACHE_DIR",
        _node_cache("triton"),
        "several nodes: compiled kernels; renames in a shared home directory fail when two nodes meet",
    ),
    Setting(
        "HF_MODULES_CACHE",
        _node_cache("hf_modules"),
        "several nodes: code of models with trust_remote_code, which every rank copies there and imports",
    ),
)


def settle(environ: MutableMapping[str, str], topology: Topology) -> list[str]:
    """Set what is missing in the environment of this process.

    Args:
        environ: `os.environ`; changed.
        topology: of this process.

    Returns:
        What the user should know, as lines; for the first rank of a node to tell.
    """
    unset = {setting.name for setting in SETTINGS if not environ.get(setting.name)}
    around = Surroundings(
        topology=topology,
        cores=len(os.sched_getaffinity(0)),
        # srun binds each task to cores of its own, where it was told how many
        shares_cores=not (topology.launcher == "slurm" and environ.get("SLURM_CPUS_PER_TASK")),
        cache=_private_directory(environ) if topology.has_several_nodes else None,
        network=_probe(topology, environ),
    )
    for setting in SETTINGS:
        value = setting.value(around)
        if setting.name in unset and value is not None:
            environ[setting.name] = value
    return [f"{socket.gethostname()}: {around.network.told}"] if around.network.told else []


def _probe(topology: Topology, environ: MutableMapping[str, str]) -> Choice:
    if not topology.has_several_nodes or topology.rendezvous is None:
        return Choice(None)
    given = [environ.get(name) for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")]
    if any(given):
        # NCCL's form may be a prefix, a list or an exclusion, which gloo does not know
        plain = next((name for name in given if name and name.replace("-", "").isalnum()), None)
        return Choice(plain if plain in {interface.name for interface in find_interfaces()} else None)
    master = topology.rendezvous[0]
    return choose_interface(
        find_interfaces(), address_towards(master), loopback_name=own_name_is_loopback(), master=master
    )


def _private_directory(environ: MutableMapping[str, str]) -> Path | None:
    """A directory on this node that nobody else can write to: code is loaded from it."""
    root = Path(environ.get("SLURM_TMPDIR") or tempfile.gettempdir()) / f"vlm-dist-{os.getuid()}"
    try:
        root.mkdir(mode=0o700, exist_ok=True)
        found = root.lstat()
    except OSError:
        return None
    is_ours = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022
    return root if is_ours else None
