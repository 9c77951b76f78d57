"""How ranks find each other: backend, interface, ports; and where the metrics are served."""

from __future__ import annotations

import errno
import os
import socket

import psutil
import torch
import torch.distributed as dist

from pipeline.config import MetricsConfig, TrainConfig
from pipeline.errors import SetupError
from pipeline.operate.doctor.finding import Check, Doubt
from pipeline.operate.doctor.world import World

_INTERFACES = ("LATHE_INTERFACE", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
_TAKEN = (errno.EADDRINUSE, errno.EACCES)


def train_checks(config: TrainConfig, world: World) -> list[Check]:
    """Of a run of several ranks."""
    return [
        Check("backend", lambda: backend(on_gpu=torch.cuda.is_available())),
        Check("interface", interface),
        Check("master-port", lambda: master_port(world)),
        Check("metrics-port", lambda: metrics_port(config.metrics, world.local_ranks)),
    ]


def backend(*, on_gpu: bool) -> str:
    """Whether torch was built with what the ranks talk by. Raises SetupError."""
    wanted = ["gloo", "nccl"] if on_gpu else ["gloo"]  # flags and counts travel by gloo in any case
    there = {"gloo": dist.is_available() and dist.is_gloo_available(), "nccl": dist.is_available() and _has_nccl()}
    if lacking := [name for name in wanted if not there[name]]:
        raise SetupError(
            f"torch {torch.__version__} was built without {' and '.join(lacking)}", "install a release from pytorch.org"
        )
    if not on_gpu:
        return "gloo"
    return f"nccl {'.'.join(map(str, torch.cuda.nccl.version()))}, and gloo beside it"  # type: ignore[no-untyped-call]


def _has_nccl() -> bool:
    return bool(dist.is_nccl_available())


def interface() -> str:
    """Whether the interfaces that variables name are there, and MASTER_ADDR can be resolved. Raises SetupError."""
    there = {name: state.isup for name, state in psutil.net_if_stats().items()}
    told = []
    for variable in _INTERFACES:
        said = os.environ.get(variable, "")
        if not said:
            continue
        told.append(f"{variable}={said}")
        if said.startswith("^"):  # NCCL: any but these
            continue
        exact, names = said.startswith("="), said.removeprefix("=").split(",")
        for name in names:
            beginning = variable.startswith("NCCL") and not exact  # NCCL takes beginnings of names
            fitting = [one for one in there if one == name or (beginning and one.startswith(name))]
            if not any(there[one] for one in fitting):
                state = "is down" if fitting else "is not there"
                up = ", ".join(one for one, is_up in there.items() if is_up)
                raise SetupError(
                    f"{variable}={said}: interface {name} {state} on {socket.gethostname()}",
                    f"set it to one that is up here ({up}), or unset it",
                )
    address = os.environ.get("MASTER_ADDR", "")
    if address:
        told.append(f"MASTER_ADDR={address}")
        try:
            socket.getaddrinfo(address, None)
        except (OSError, UnicodeError) as error:  # UnicodeError: of IDNA, for what can be no name
            raise SetupError(
                f"MASTER_ADDR={address} cannot be resolved on {socket.gethostname()}:"
                f" {getattr(error, 'strerror', None) or 'it is no name of a machine'}",
                "set it to the address of the first machine, as `ip -brief address` has it there",
            ) from error
    return ", ".join(told) or "chosen by the launcher"


def master_port(world: World) -> str:
    """Whether the ranks' meeting point is free, where it is on this machine. Raises SetupError."""
    said = os.environ.get("MASTER_PORT", "")
    if world.rank is not None:
        return f"the launcher's own: {os.environ.get('MASTER_ADDR', '?')}:{said or '?'}"
    if not said:
        return "chosen at the start"
    if not said.isdecimal() or not 0 < int(said) < 65536:
        raise SetupError(f"MASTER_PORT={said} is no port", "set it to a number from 1024 to 65535")
    if os.environ.get("MASTER_ADDR") and not _is_here(os.environ["MASTER_ADDR"]):
        return f"{said} of {os.environ['MASTER_ADDR']}, which is another machine"
    problem = _bind("", int(said))
    if problem is not None:
        raise SetupError(
            f"MASTER_PORT={said}: {problem.strerror}; {_holder(int(said))}",
            "set another MASTER_PORT, or end what listens there",
        )
    return f"{said} is free"


def metrics_port(config: MetricsConfig, processes: int) -> str | Doubt:
    """Whether the metrics of this machine's processes can be served where they are to be.

    Raises:
        SetupError: the address is none of this machine's.
    """
    if not config.prometheus:
        return "not served"
    ports = [config.port + number for number in range(processes)] if config.port else [0]
    taken = []
    for port in (port for port in ports if port < 65536):
        problem = _bind(config.host, port)
        if problem is None:
            continue
        if isinstance(problem, socket.gaierror) or problem.errno not in _TAKEN:
            raise SetupError(
                f"metrics.host={config.host}: {problem.strerror}",
                "choose an address of this machine, or set metrics.prometheus=false",
            )
        taken.append(port)
    if taken:
        return Doubt(
            f"metrics.port: {', '.join(map(str, taken))} of {config.host} taken ({_holder(taken[0])}); ranks take the"
            " next that is free",
            "choose another metrics.port, or find processes by metrics.discovery",
        )
    return f"{config.host}, " + (f"from {config.port} on" if config.port else "any that is free")


def _bind(host: str, port: int) -> OSError | None:
    """What keeps a server from listening there, as those that will."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen(1)
    except OSError as error:
        return error
    except UnicodeError:  # as above
        return socket.gaierror(socket.EAI_NONAME, "it is no name of a machine")
    return None


def _holder(port: int) -> str:
    """Who listens at a port, as far as this user may know."""
    try:
        for connection in psutil.net_connections("tcp"):
            listens = connection.status == psutil.CONN_LISTEN and connection.laddr[1:] == (port,)
            if listens and connection.pid:
                return f"process {connection.pid} ({psutil.Process(connection.pid).name()}) listens there"
    except (psutil.Error, OSError):
        pass
    return "another process listens there"


def _is_here(address: str) -> bool:
    own = {one.address for addresses in psutil.net_if_addrs().values() for one in addresses}
    try:
        return any(found[4][0] in own for found in socket.getaddrinfo(address, None))
    except (OSError, UnicodeError):
        return False
