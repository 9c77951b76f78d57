"""Separate hosts on one machine: network namespaces with a name and an address of their own, on one bridge."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

NEEDED = "network namespaces need Linux, root and the programs ip, nsenter and unshare"


class Host(NamedTuple):
    """One of the hosts.

    Args:
        name: of the namespace, and what programs in it see as this host's name.
        address: the others reach it there, by its interface eth0.
        names: a file of the names and addresses of all, their /etc/hosts.
    """

    name: str
    address: str
    names: Path

    def inside(self, *command: str) -> list[str]:
        """A command that runs on this host; the process that is started becomes it."""
        become = 'hostname "$0" && mount --bind "$1" /etc/hosts && shift && exec "$@"'
        named = ["unshare", "--uts", "--mount", "sh", "-c", become, self.name, str(self.names)]
        return ["nsenter", f"--net=/var/run/netns/{self.name}", *named, *command]

    def cut(self) -> None:
        """Pull its cable."""
        _ip("link", "set", f"{self.name}v", "down")

    def mend(self) -> None:
        """Plug it in again."""
        _ip("link", "set", f"{self.name}v", "up")


def available() -> bool:
    """Whether hosts can be had here."""
    return (
        sys.platform == "linux"
        and os.geteuid() == 0
        and _works("ip", "netns")
        and _works("unshare", "--uts", "--mount", "true")
    )


@contextmanager
def hosts(count: int = 2) -> Iterator[list[Host]]:
    """So many, connected; gone afterwards. Their names are those of this process alone."""
    mark = f"lt{os.getpid()}"
    with TemporaryDirectory(prefix=mark) as folder:
        names = Path(folder) / "hosts"
        made = [Host(f"{mark}{chr(ord('a') + i)}", f"10.217.43.{i + 1}", names) for i in range(count)]
        names.write_text("127.0.0.1 localhost\n" + "".join(f"{host.address} {host.name}\n" for host in made))
        try:
            _connect(mark, made)
            yield made
        finally:
            for host in made:
                _works("ip", "netns", "del", host.name)
                _works("ip", "link", "del", f"{host.name}v")
            _works("ip", "link", "del", mark)


def _connect(bridge: str, made: list[Host]) -> None:
    _ip("link", "add", bridge, "type", "bridge")
    _ip("link", "set", bridge, "up")
    for host in made:
        _ip("netns", "add", host.name)
        _ip("link", "add", f"{host.name}v", "type", "veth", "peer", "name", "eth0", "netns", host.name)
        _ip("link", "set", f"{host.name}v", "master", bridge, "up")
        _ip("-n", host.name, "addr", "add", f"{host.address}/24", "dev", "eth0")
        _ip("-n", host.name, "link", "set", "eth0", "up")
        _ip("-n", host.name, "link", "set", "lo", "up")


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


def _works(*command: str) -> bool:
    return shutil.which(command[0]) is not None and not subprocess.run(command, capture_output=True).returncode  # noqa: PLW1510
