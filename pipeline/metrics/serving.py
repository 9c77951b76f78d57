"""The HTTP server that Prometheus scrapes, on a port that is free."""

from __future__ import annotations

import errno
import socket
from ipaddress import ip_address
from typing import Any

from prometheus_client import CollectorRegistry, start_http_server

from pipeline.config import MetricsConfig
from pipeline.console import tell
from pipeline.errors import SetupError

_PORTS_TRIED = 100
_TAKEN = (errno.EADDRINUSE, errno.EACCES)
_ANYWHERE = ("", "0.0.0.0", "::")  # noqa: S104
_OUTSIDE = "192.0.2.1"  # reserved for documentation; nothing is sent there


class Server:
    """Serves a registry from a thread of its own.

    It takes the first free port from `metrics.port` plus `local` on, so that the processes of a machine have theirs in
    order; what was taken is told.

    Args:
        config: where to.
        registry: what is served.
        local: this process's number on its machine.

    Raises:
        SetupError: the address is none of this machine's.
    """

    def __init__(self, config: MetricsConfig, registry: CollectorRegistry, local: int = 0) -> None:
        self._host = config.host
        first = config.port + local if config.port else 0
        ports = [*range(first, min(first + _PORTS_TRIED, 65536)), 0] if first else [0]
        self._server = _open(config, ports, registry)
        self.port = int(self._server.server_port)
        if self.port != first and first:
            tell(f"metrics: port {first} of {self._host} is taken: they are served at {self.port}")

    @property
    def address(self) -> str:
        """For a person on this machine."""
        return f"http://{_bracketed(self._host)}:{self.port}/metrics"

    @property
    def target(self) -> str:
        """For a Prometheus, HOST:PORT; of a server on every interface with this machine's own address."""
        host = _own_address(self._host) if self._host in _ANYWHERE else self._host
        return f"{_bracketed(host)}:{self.port}"

    @property
    def targets(self) -> tuple[str, ...]:
        """`target`, and by what else a Prometheus on this machine may come here."""
        is_every = self._host in _ANYWHERE
        return (self.target, *(f"{name}:{self.port}" for name in ("127.0.0.1", "localhost") if is_every))

    @property
    def is_loopback(self) -> bool:
        """Whether other machines cannot come here."""
        return ip_address(str(self._server.server_address[0])).is_loopback

    def close(self) -> None:
        """Serve no more."""
        self._server.shutdown()
        self._server.server_close()


def _open(config: MetricsConfig, ports: list[int], registry: CollectorRegistry) -> Any:
    for port in ports:
        try:
            return start_http_server(port, config.host, registry)[0]
        except OSError as error:
            problem = error
            if isinstance(error, socket.gaierror) or error.errno not in _TAKEN:
                break
    raise SetupError(
        f"metrics.host={config.host}, metrics.port={config.port}: {problem.strerror}",
        "choose another metrics.port or metrics.host, or set metrics.prometheus=false",
    ) from problem


def _own_address(anywhere: str) -> str:
    """That of the interface which leads outside; the host's name where none does."""
    family, outside = (socket.AF_INET6, "2001:db8::1") if anywhere == "::" else (socket.AF_INET, _OUTSIDE)
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((outside, 9))
            return str(probe.getsockname()[0])
    except OSError:
        return socket.gethostname()


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
