"""Ports on loopback for a server that needs ten of them."""

from __future__ import annotations

import random
import socket
from contextlib import suppress
from pathlib import Path

from pipeline.errors import SetupError

HOST = "127.0.0.1"
_SERVICES = ("s3", "master", "volume", "filer", "admin")


def ports(first: int) -> dict[str, int]:
    """Every port of a server whose S3 port is `first`, by option."""
    http = {f"{service}.port": first + i for i, service in enumerate(_SERVICES)}
    grpc = {f"{service}.port.grpc": first + 10 + i for i, service in enumerate(_SERVICES)}
    grpc["admin.port.grpc"] = http["admin.port"] + 10_000  # where the server's own worker looks for it
    return http | grpc


def choose() -> int:
    """A first port whose whole set is free. Raises SetupError when there is none."""
    for _ in range(100):
        first = random.randrange(15_000, 30_000, 20)  # noqa: S311 - below the ports that outgoing connections take
        if all(map(is_free, ports(first).values())):
            return first
    raise SetupError(f"no 10 free ports on {HOST} between 15000 and 40000", "stop some other servers, then try again")


def is_free(port: int) -> bool:
    """Whether a server could listen there now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server will: connections may linger
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


def remove_sockets(first: int) -> None:
    """The server opens local sockets by the number of each port, and leaves some behind."""
    for port in ports(first).values():
        for path in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):  # noqa: S108 - its choice of folder
            with suppress(OSError):
                path.unlink()
