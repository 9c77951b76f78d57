"""A real SLURM for tests: a controller and several nodes on this machine, in a folder, on ports of their own.

Each node is a slurmd of its own: on loopback, where names of nodes do not resolve and jobs need `Slurm.network`, or on
a host of its own (`hosts`). Nothing is shared with a SLURM or munge that the machine has, nor with that of another test
session. SLURM 22.05 and later.
"""

from __future__ import annotations

import getpass
import os
import random
import re
import secrets
import shutil
import socket
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil
from daemons import HOST, free_ports, stop
from hosts import Host
from monitoring import wait_until

from infra.system_packages import FOLDER, LIBRARIES, program
from pipeline.tether import start_tethered

CONFIGURATION = Path(__file__).with_suffix(".conf")
GONE = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "OUT_OF_MEMORY", "DEADLINE")


class Slurm:
    """A cluster that runs while its context lasts; jobs that are left are killed with it.

    Args:
        folder: its own.
        nodes: how many, `node1` and so on.
        hosts: the controller's and then one for each node, which has its name; empty = all are on loopback.
        cpus: of each node.
        kill_wait: seconds between SIGTERM and SIGKILL for a job that ends.
        node_timeout: seconds after which a node that does not answer is down.
    """

    def __init__(
        self,
        folder: Path,
        nodes: int = 2,
        *,
        hosts: Sequence[Host] = (),
        cpus: int = 2,
        kill_wait: int = 5,
        node_timeout: int = 10,
    ) -> None:
        self.folder = folder
        self.nodes = [host.name for host in hosts[1:]] or [f"node{number}" for number in range(1, nodes + 1)]
        self.network = {} if hosts else {"MASTER_ADDR": HOST, "LATHE_INTERFACE": "lo"}
        self._hosts = dict(zip(["slurmctld", *self.nodes], hosts, strict=False))
        self._cpus, self._waits = cpus, {"kill_wait": kill_wait, "node_timeout": node_timeout}
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
        programs = {program(name) for name in ("sbatch", "scontrol")}
        path = os.pathsep.join([*{str(Path(found).parent) for found in programs if found}, kept["PATH"]])
        self.environment = {**kept, "SLURM_CONF": str(folder / "slurm.conf"), "PATH": path}
        if self._is_unpacked():
            self.environment["LD_LIBRARY_PATH"] = f"{LIBRARIES}:{LIBRARIES}/slurm-wlm"
        self._daemons: dict[str, subprocess.Popen[str]] = {}

    def __enter__(self) -> Self:
        self._configure()
        try:
            self._start_munge()
            self._daemon("slurmctld", "slurmctld", "-D", "-f", self.environment["SLURM_CONF"])
            for node in self.nodes:
                self.start_node(node)
            wait_until(self._all_idle, 60, "the nodes to be idle")
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name in [*self.nodes, "slurmctld", "munged"]:
            if daemon := self._daemons.pop(name, None):
                stop(daemon)
        self._kill_jobs()

    def submit(self, script: Path, *arguments: str, options: Sequence[str] = (), **environment: str) -> int:
        """`sbatch OPTIONS SCRIPT ARGUMENTS`; returns the job's id. `environment` is added to that of this process."""
        said = self.run("sbatch", "--parsable", *options, str(script), *arguments, environment=environment)
        return int(said.strip())

    def run(self, name: str, *arguments: str, environment: Mapping[str, str] | None = None) -> str:
        """What a command of SLURM says; it succeeds."""
        done = subprocess.run(
            self._command("slurmctld", name, *arguments),
            env={**self.environment, **(environment or {})},
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, f"{name} {arguments}: {done.stderr}{self.logs()}"
        return done.stdout

    def job(self, job: int | str) -> dict[str, str]:
        """What is known of a job: JobState, Restarts, ExitCode, ..."""
        return dict(re.findall(r"(\w+)=(\S*)", self.run("scontrol", "--oneliner", "show", "job", str(job))))

    def wait_for(self, job: int | str, *states: str, seconds: float = 240) -> dict[str, str]:
        """The job once it is in one of the states; any that is final, if none are given."""
        wanted = states or GONE
        wait_until(lambda: self.job(job)["JobState"] in wanted, seconds, f"job {job} to be {' or '.join(wanted)}")
        return self.job(job)

    def wait_for_start(self, job: int | str, restarts: int, seconds: float = 120) -> None:
        """Until a job runs that was started again so many times."""

        def is_running() -> bool:
            known = self.job(job)
            assert known["JobState"] not in GONE, known
            return known["JobState"] == "RUNNING" and int(known["Restarts"]) == restarts

        wait_until(is_running, seconds, f"start {restarts} of job {job}")

    def end_pause(self, job: int | str, restarts: int, seconds: float = 120) -> float:
        """Let a job begin that waits before it is started again; returns the minutes that it had yet to wait."""

        def minutes() -> float:
            """0 where it does not wait, or is not told yet for how long."""
            known = self.job(job)
            assert known["JobState"] not in GONE, known
            eligible = known["EligibleTime"]
            if (known["JobState"], known["Restarts"]) != ("PENDING", str(restarts)) or eligible == "Unknown":
                return 0
            left = (datetime.fromisoformat(eligible) - datetime.now()).total_seconds() / 60  # both are of this machine
            return left if left > 1 else 0

        pause = wait_until(minutes, seconds, f"job {job} to wait before start {restarts}")
        self.run("scontrol", "update", f"JobId={job}", "StartTime=now+3")  # a credential of the same second is revoked
        return pause

    def start_node(self, node: str) -> None:
        """Start a node's daemon."""
        stepd = program("slurmstepd")
        own = ["-d", stepd] if stepd is not None and self._is_unpacked() else []
        self._daemon(node, "slurmd", "-D", "-f", self.environment["SLURM_CONF"], "-N", node, *own)

    def lose_node(self, node: str) -> None:
        """As if its machine had lost its power: daemon and processes are killed, what they kept in memory is gone."""
        daemon = self._daemons.pop(node)
        daemon.kill()
        daemon.wait()
        self._kill_jobs(node)
        shutil.rmtree(self.folder / f"spool-{node}")  # else a requeued job finds its script there, and is held

    def processes(self, node: str = "") -> list[psutil.Process]:
        """Of jobs and their steps, on one node or on all."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                variables = process.environ()
                if variables.get("SLURM_CONF") == self.environment["SLURM_CONF"] and process.pid != os.getpid():
                    where = variables.get("SLURMD_NODENAME", variables.get("LATHE_TEST_NODE", ""))
                    if not node or where == node:
                        found.append(process)
        return found

    def logs(self) -> str:
        """The end of what the daemons have said."""
        return "".join(f"\n{file.name}:\n{file.read_text()[-2000:]}" for file in sorted(self.folder.glob("*.log")))

    def _configure(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o755)
        (self.folder / "state").mkdir()
        (self.folder / "plugstack.conf").touch()
        (machine, address), *places = (self._place(name) for name in ("slurmctld", *self.nodes))
        port, *ports = free_ports(1 + len(self.nodes))
        nodes = "\n".join(
            f"NodeName={node} NodeHostname={host} NodeAddr={at} Port={own} CPUs={self._cpus} State=UNKNOWN"
            for node, (host, at), own in zip(self.nodes, places, ports, strict=True)
        )
        (self.folder / "slurm.conf").write_text(
            CONFIGURATION.read_text().format(
                machine=machine,
                host=address,
                user=getpass.getuser(),
                port=port,
                folder=self.folder,
                plugins=f"PluginDir={LIBRARIES}/slurm-wlm" if self._is_unpacked() else "",
                first_job=random.randrange(1, 60_000),
                nodes=nodes,
                **self._waits,
            )
        )

    def _start_munge(self) -> None:
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))
        files = {"socket": "munge.socket", "pid-file": "munge.pid", "log-file": "munged.log", "seed-file": "munge.seed"}
        options = [f"--{name}={self.folder / file}" for name, file in files.items()]
        self._daemon("munged", "munged", "--foreground", "--force", f"--key-file={key}", *options)
        wait_until((self.folder / "munge.socket").exists, 30, "munge's socket")

    def _daemon(self, name: str, command: str, *options: str) -> None:
        with (self.folder / f"{name}.out.log").open("a") as log:
            self._daemons[name] = start_tethered(
                self._command(name, command, *options),
                env={**self.environment, "LATHE_TEST_NODE": name},
                cwd=self.folder,
                stdout=log,
                stderr=subprocess.STDOUT,
                text=True,
            )

    def _command(self, place: str, name: str, *options: str) -> list[str]:
        """Of a program of SLURM; where there are hosts, on that of the controller or of a node."""
        found = program(name)
        assert found is not None
        host = self._hosts.get(place)
        return host.inside(found, *options) if host else [found, *options]

    def _place(self, name: str) -> tuple[str, str]:
        """Name and address of the machine of the controller or of a node."""
        host = self._hosts.get(name)
        return (host.name, host.address) if host else (socket.gethostname().split(".")[0], HOST)

    def _kill_jobs(self, node: str = "") -> None:
        """Kill what outlives the daemons, and tells nobody: first what watches over steps, then these."""
        steps = self.processes(node)
        for process in (*filter(None, {_watcher(step) for step in steps}), *steps):
            with suppress(psutil.Error):
                process.kill()

    def _all_idle(self) -> bool:
        for name, daemon in self._daemons.items():
            assert daemon.poll() is None, f"{name} has ended{self.logs()}"
        done = subprocess.run(
            self._command("slurmctld", "scontrol", "--oneliner", "show", "nodes"),
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
        )
        return done.stdout.count("State=IDLE ") == len(self.nodes)

    def _is_unpacked(self) -> bool:
        found = program("slurmctld")
        return found is not None and Path(found).is_relative_to(FOLDER)


def _watcher(process: psutil.Process) -> psutil.Process | None:
    """SLURM's own process above one of a job; it hides its environment."""
    with suppress(psutil.Error):
        parent = process.parent()
        if parent is not None and parent.name().startswith("slurmstepd"):
            return parent
    return None
