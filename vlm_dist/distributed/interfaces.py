"""Which network interface leads to the other nodes.

NCCL and gloo choose for themselves: gloo what the node's own name resolves to (on many systems 127.0.1.1, which no
other node can reach), NCCL the first that is up. So where there is a choice it is made by asking the kernel for the way
to the node that all ranks meet at.
"""

from __future__ import annotations

import ipaddress
import socket
from dataclasses import dataclass
from pathlib import Path

#: Made by container runtimes and virtual machines on the node itself: no other node is behind them.
LOCAL_PREFIXES = ("docker", "br-", "veth", "virbr", "cni", "flannel", "cali", "podman", "lxc", "tunl", "kube")


@dataclass(frozen=True)
class Interface:
    """A network interface that is up.

    Attributes:
        name: such as eth0.
        addresses: IPv4 and IPv6, without link-local ones.
        megabits: speed of the link per second; 0 where the driver does not tell.
    """

    name: str
    addresses: tuple[str, ...]
    megabits: int = 0

    @property
    def is_local(self) -> bool:
        """Whether it can't lead to another node."""
        return self.name == "lo" or self.name.startswith(LOCAL_PREFIXES)

    def __str__(self) -> str:
        return f"{self.name} ({', '.join(self.addresses)})"


@dataclass(frozen=True)
class Choice:
    """What to tell NCCL and gloo.

    Attributes:
        interface: its name; None: leave it to them.
        told: one line for the user; empty where nothing was to be chosen.
    """

    interface: str | None
    told: str = ""


def find_interfaces() -> list[Interface]:
    """Interfaces of this node that are up and have an address, loopback included."""
    import psutil

    speeds = psutil.net_if_stats()
    found = []
    for name, addresses in psutil.net_if_addrs().items():
        if name not in speeds or not speeds[name].isup:
            continue
        usable = [a.address.partition("%")[0] for a in addresses if a.family in (socket.AF_INET, socket.AF_INET6)]
        usable = [address for address in usable if not ipaddress.ip_address(address).is_link_local]
        if usable:
            found.append(Interface(name, tuple(usable), speeds[name].speed))
    return found


def address_towards(host: str) -> str | None:
    """This node's own address on the way to a host, as the kernel routes it; sends nothing. None: there is no way."""
    try:
        candidates = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)
    except OSError:
        return None
    for family, kind, protocol, _, target in candidates:
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.connect(target)
                return str(probe.getsockname()[0])
        except OSError:
            continue
    return None


def own_name_is_loopback() -> bool:
    """Whether this node's name leads to itself alone, as 127.0.1.1 in /etc/hosts does."""
    try:
        found = socket.getaddrinfo(socket.gethostname(), None)
    except OSError:
        return True  # not known at all: gloo would fall back to the loopback interface
    return all(ipaddress.ip_address(str(entry[4][0]).partition("%")[0]).is_loopback for entry in found)


def choose_interface(interfaces: list[Interface], towards: str | None, *, loopback_name: bool, master: str) -> Choice:
    """Pick the interface for the traffic between nodes.

    Args:
        interfaces: of this node.
        towards: own address on the way to the master, from `address_towards`.
        loopback_name: from `own_name_is_loopback`.
        master: name or address that the ranks meet at, for messages.
    """
    outside = [interface for interface in interfaces if not interface.is_local]
    if not outside or (len(outside) == 1 and not loopback_name):
        return Choice(None)
    if len(outside) == 1:
        return Choice(
            outside[0].name, f"{outside[0]} carries the traffic between nodes: this node's name is loopback's"
        )
    on_the_way = next((interface for interface in outside if towards in interface.addresses), None)
    names = ", ".join(str(interface) for interface in outside)
    if on_the_way is None:
        return Choice(
            None,
            f"this node has several network interfaces ({names}), and the way to {master} does not tell which one "
            "leads to the other nodes; NCCL and gloo choose. If they hang at start: export NCCL_SOCKET_IFNAME and "
            "GLOO_SOCKET_IFNAME",
        )
    told = f"{on_the_way} carries the traffic between nodes, as the way to {master} does; of {names}"
    faster = max(outside, key=lambda interface: interface.megabits)
    if on_the_way.megabits and faster.megabits > on_the_way.megabits:
        told += (
            f". {faster.name} is faster ({faster.megabits:,} against {on_the_way.megabits:,} Mbit/s): if it leads to "
            f"the other nodes, export NCCL_SOCKET_IFNAME={faster.name} GLOO_SOCKET_IFNAME={faster.name}"
        )
    return Choice(on_the_way.name, told)


def has_infiniband(root: Path = Path("/sys/class/infiniband")) -> bool:
    """Whether there are InfiniBand or RoCE adapters, which NCCL finds by itself."""
    return root.is_dir() and any(root.iterdir())
