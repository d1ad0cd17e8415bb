"""Two networks with a cable between them, for two ranks on one machine; needs root."""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

NAMES = ("chaos-0", "chaos-1")
ADDRESSES = ("10.77.13.1", "10.77.13.2")
DEVICE = "cable"

#: Run by rank 1: from now on packets are lost, and nobody is told.
CUT = f"ip link set {DEVICE} down"

_NEW_NETWORK = 0x40000000  # CLONE_NEWNET


@contextmanager
def two_networks() -> Iterator[None]:
    """Make them, and take them away."""
    _remove()
    for name in NAMES:
        _ip("netns", "add", name)
    try:
        ends = ("type", "veth", "peer", "name", DEVICE, "netns", NAMES[1])
        _ip("link", "add", DEVICE, "netns", NAMES[0], *ends)
        for name, address in zip(NAMES, ADDRESSES, strict=True):
            _ip("-n", name, "address", "add", f"{address}/24", "dev", DEVICE)
            _ip("-n", name, "link", "set", DEVICE, "up")
            _ip("-n", name, "link", "set", "lo", "up")
        yield
    finally:
        _remove()


def enter(rank: int) -> None:
    """Move this process, and what it will start, to the network of a rank."""
    handle = os.open(f"/run/netns/{NAMES[rank]}", os.O_RDONLY)
    try:
        if ctypes.CDLL(None, use_errno=True).setns(handle, _NEW_NETWORK):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), NAMES[rank])
    finally:
        os.close(handle)
    os.environ.update(MASTER_ADDR=ADDRESSES[0], GLOO_SOCKET_IFNAME=DEVICE)


def _remove() -> None:
    for name in NAMES:
        subprocess.run(["ip", "netns", "del", name], stderr=subprocess.DEVNULL, check=False)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)
