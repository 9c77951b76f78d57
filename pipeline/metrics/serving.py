"""The HTTP server that Prometheus scrapes, on a port that is free."""

from __future__ import annotations

import errno
import resource
import socket
import threading
import time
from contextlib import suppress
from ipaddress import ip_address
from socketserver import TCPServer, ThreadingMixIn
from typing import Any

from prometheus_client import CollectorRegistry, MetricsHandler

from pipeline.config import MetricsConfig
from pipeline.console import tell
from pipeline.errors import SetupError

_PORTS_TRIED = 100
_TAKEN = (errno.EADDRINUSE, errno.EACCES)
_ANYWHERE = ("", "0.0.0.0", "::")  # noqa: S104
_OUTSIDE = "192.0.2.1"  # reserved for documentation; nothing is sent there
_MOST_CONNECTIONS = 64
_LARGEST_SHARE = 1 / 16  # that connections take of the files which the process may have open
_ANSWER_SECONDS = 5.0  # from the connection to the last byte of the answer
_PAUSE_SECONDS = 0.1  # where no connection can be taken


class Server:
    """Serves a registry from a thread of its own.

    It takes the first free port from `metrics.port` plus `local` on, so that the processes of a machine have theirs in
    order; what was taken is told. Whoever connects has 5 s for all of it, and of more than 64 at once the last are sent
    away: what others do there takes no files and no memory that the job needs.

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
        self.port = int(self._server.server_address[1])
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


class _Server(ThreadingMixIn, TCPServer):
    """One thread a connection, none of which is waited for.

    Args:
        family: of the address.
        address: as `socket.bind` takes it.
        registry: what is served.
    """

    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = _MOST_CONNECTIONS

    def __init__(self, family: socket.AddressFamily, address: Any, registry: CollectorRegistry) -> None:
        self.address_family = family
        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._most = _MOST_CONNECTIONS if files < 0 else max(1, min(_MOST_CONNECTIONS, int(files * _LARGEST_SHARE)))
        self._since: dict[socket.socket, float] = {}
        self._lock = threading.Lock()
        super().__init__(address, MetricsHandler.factory(registry))
        threading.Thread(target=self.serve_forever, name="metrics-server", daemon=True).start()

    def get_request(self) -> tuple[socket.socket, Any]:
        """A connection; where none can be taken, as there are no files left, it is asked for again soon."""
        try:
            return super().get_request()
        except OSError:
            time.sleep(_PAUSE_SECONDS)  # it is still there to be taken
            raise

    def verify_request(self, request: Any, _address: Any) -> bool:
        """Whether a connection is answered."""
        with self._lock:
            if len(self._since) >= self._most:
                return False
            self._since[request] = time.monotonic()
            return True

    def service_actions(self) -> None:
        """Twice a second: break off what takes too long. Its thread then finds it ended, and closes it."""
        late = time.monotonic() - _ANSWER_SECONDS
        with self._lock:
            for request, since in self._since.items():
                if since < late:
                    with suppress(OSError):  # its other end has broken it off
                        request.shutdown(socket.SHUT_RDWR)

    def shutdown_request(self, request: Any) -> None:
        """A connection has ended."""
        with self._lock:  # before its file goes to somebody else
            self._since.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Somebody went away, or has sent what is no request: nothing that a job would tell."""


def _open(config: MetricsConfig, ports: list[int], registry: CollectorRegistry) -> _Server:
    problem = ""
    try:
        family, _, _, _, (host, _, *rest) = socket.getaddrinfo(
            config.host or None, ports[0], type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        for port in ports:
            try:
                return _Server(family, (host, port, *rest), registry)
            except OSError as error:
                problem = error.strerror or str(error)
                if error.errno not in _TAKEN:
                    break
    except OSError as error:
        problem = error.strerror or str(error)
    except ValueError:  # of names that no address book could hold: UnicodeError is one
        problem = "not the name of a host"
    raise SetupError(
        f"metrics.host={config.host}, metrics.port={config.port}: {problem}",
        "choose another metrics.port or metrics.host, or set metrics.prometheus=false",
    )


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
