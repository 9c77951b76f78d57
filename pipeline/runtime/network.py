"""Which network interface leads to the other machines of a run."""

from __future__ import annotations

import ipaddress
import os
import socket
import time
from typing import Any

import psutil

from pipeline.console import tell
from pipeline.errors import LatheError, SetupError

VARIABLE = "LATHE_INTERFACE"
"""Names the interface, where the one that leads to rank 0's machine is not wanted."""
_LIBRARIES = {"GLOO_SOCKET_IFNAME": "{}", "NCCL_SOCKET_IFNAME": "={}"}  # NCCL takes eth1 for all that begin like it
_PATIENCE_SECONDS = 900.0  # as long as torch's agents wait for each other
_PAUSE_SECONDS = 2.0
_ANY_PORT = 9


def choose_interface(master: str) -> None:
    """Tell gloo and NCCL the interface, where the user has not; before the process group, on each rank.

    By itself gloo takes the address that this machine's name has, often one of loopback, and the others wait for it.

    Args:
        master: name or address of rank 0's machine.

    Raises:
        SetupError: there is no such interface, or no way to rank 0's machine.
    """
    if all(os.environ.get(name) for name in _LIBRARIES):
        return
    chosen = os.environ.get(VARIABLE) or interface_to(master)
    known = psutil.net_if_addrs()
    if chosen not in known:
        raise SetupError(
            f"{VARIABLE}={chosen} is no network interface of {socket.gethostname()}",
            f"take one of {', '.join(sorted(known))}, or unset it",
        )
    for name, form in _LIBRARIES.items():
        if not os.environ.get(name):
            os.environ[name] = form.format(chosen)


def interface_to(host: str) -> str:
    """The interface by which this machine reaches another one, or that has the address where it is this machine's.

    The kernel chooses it, so that all of its routing counts; nothing is sent.

    Raises:
        SetupError: no route leads there.
        LatheError: the host has no address.
    """
    problem = ""
    for family, place in wait_for_address(host):
        try:
            with socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.connect(place)
                own = ipaddress.ip_address(probe.getsockname()[0])
        except OSError as error:
            problem = f": {error.strerror}"
            continue
        if own.is_loopback and not _is_loopback(host):  # a distribution's line in /etc/hosts
            problem = f": it is {place[0]} there, which no other machine can reach"
            continue
        for interface, addresses in psutil.net_if_addrs().items():
            if any(known.family == family and ipaddress.ip_address(known.address) == own for known in addresses):
                return interface
    raise SetupError(
        f"no network interface of {socket.gethostname()} leads to MASTER_ADDR={host}{problem}",
        f"give the address by which other machines reach that one, or name the interface: {VARIABLE}=eth0",
    )


def wait_for_address(host: str, patience: float = _PATIENCE_SECONDS) -> list[tuple[socket.AddressFamily, Any]]:
    """The addresses of a host, each with its family, as sockets take them.

    Its name may be unknown at first: pods have theirs only once they are placed.

    Args:
        host: name or address.
        patience: seconds that the name may take to appear.

    Raises:
        LatheError: it has not, or is none.
    """
    deadline, told = time.monotonic() + patience, False
    while True:
        try:
            found = socket.getaddrinfo(host, _ANY_PORT, type=socket.SOCK_DGRAM)
            return [(family, place) for family, _, _, _, place in found]
        except (socket.gaierror, UnicodeError) as error:
            if isinstance(error, UnicodeError) or time.monotonic() >= deadline:
                why = getattr(error, "strerror", None) or "it is no name of a machine"
                raise LatheError(
                    f"MASTER_ADDR={host} has no address on {socket.gethostname()}: {why}",
                    "name the machine of node 0 as the others know it, or give its address",
                ) from error
        if not told:
            tell(f"MASTER_ADDR={host} has no address yet: waiting for it, {patience:.0f} s at most")
            told = True
        time.sleep(_PAUSE_SECONDS)


def _is_loopback(host: str) -> bool:
    """Whether it is meant: all nodes are on this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
