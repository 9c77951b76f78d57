"""Real Prometheus, Alertmanager and Pushgateway for tests, with the files of infra/: on loopback, each in a folder."""

from __future__ import annotations

import json
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import yaml
from daemons import HOST, free_port, stop

from infra.system_packages import program
from pipeline.tether import start_tethered

INFRA = Path(__file__).parents[1] / "infra"
RULES = INFRA / "prometheus" / "rules"
T = TypeVar("T")


def tool(name: str, *arguments: str | Path, given: str = "") -> subprocess.CompletedProcess[str]:
    """Run promtool or amtool."""
    found = program(name)
    assert found is not None
    return subprocess.run([found, *map(str, arguments)], input=given, capture_output=True, text=True, check=False)


def fetch(url: str, timeout: float = 10) -> str:
    with urllib.request.urlopen(url, timeout=timeout) as answer:  # noqa: S310
        return answer.read().decode()


def wait_until(found: Callable[[], T], seconds: float = 60, what: str = "") -> T:
    """The first value that is true."""
    deadline = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < deadline, f"waited {seconds:g} s in vain: {what or found}"
        time.sleep(0.1)
    return value


class Daemon:
    """A server that runs while its context lasts.

    Args:
        name: of its program.
        folder: its own.
        options: of its command; `{port}` is replaced.
        ready: the path at which it answers once it is up.
    """

    def __init__(self, name: str, folder: Path, options: Sequence[str], ready: str = "/-/ready") -> None:
        self._name, self._folder, self._options, self._ready = name, folder, options, ready
        self.address = f"{HOST}:{free_port()}"
        self.url = f"http://{self.address}"

    def __enter__(self) -> Self:
        self._folder.mkdir(parents=True, exist_ok=True)
        found = program(self._name)
        assert found is not None
        self._log = (self._folder / "log").open("w+")
        command = [found, f"--web.listen-address={self.address}", "--log.level=warn", *self._options]
        self._child = start_tethered(command, cwd=self._folder, stdout=self._log, stderr=subprocess.STDOUT)
        try:
            wait_until(self._is_up, 30, f"{self._name} to be ready")
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        stop(self._child)
        self._log.close()

    def _is_up(self) -> bool:
        assert self._child.poll() is None, (self._folder / "log").read_text()
        try:
            return bool(fetch(self.url + self._ready, 1))
        except OSError:
            return False


class Pushgateway(Daemon):
    """In memory alone."""

    def __init__(self, folder: Path) -> None:
        super().__init__("pushgateway", folder, [])


class Alertmanager(Daemon):
    """With infra's routes; every receiver is the webhook at `told`, without the pauses that spare people."""

    def __init__(self, folder: Path, told: str) -> None:
        tree = yaml.safe_load((INFRA / "alertmanager" / "alertmanager.yml").read_text())
        for route in (tree["route"], *tree["route"]["routes"]):
            route |= {"group_wait": "100ms", "group_interval": "1s"}
        for receiver in tree["receivers"]:
            for hook in receiver["webhook_configs"]:
                hook["url"] = f"{told}/{receiver['name']}"
        folder.mkdir(parents=True)
        (folder / "alertmanager.yml").write_text(yaml.safe_dump(tree))
        options = ["--config.file=alertmanager.yml", "--storage.path=data", "--cluster.listen-address="]
        super().__init__("alertmanager", folder, options)


class Prometheus(Daemon):
    """A server with a configuration of one's own.

    Args:
        folder: its own.
        configuration: the tree of its file.
    """

    def __init__(self, folder: Path, configuration: Mapping[str, Any]) -> None:
        folder.mkdir(parents=True)
        (folder / "prometheus.yml").write_text(yaml.safe_dump(configuration))
        super().__init__("prometheus", folder, ["--config.file=prometheus.yml", "--storage.tsdb.path=data"])

    def ask(self, path: str, **fields: Any) -> Any:
        """What its API answers."""
        try:
            answer = fetch(f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(fields)}")
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{path} {fields}: {error.read().decode()}") from error
        return json.loads(answer)["data"]

    def query(self, expr: str, at: float | None = None) -> list[dict[str, Any]]:
        """The series of an expression: each with `metric` and `value` or `values`."""
        fields = {"query": expr} if at is None else {"query": expr, "time": at}
        return self.ask("query", **fields)["result"]


def quick_configuration(*, discovery: Path, alertmanager: str, pushgateway: str, rules: Path) -> dict[str, Any]:
    """Infra's configuration for shared folders, with a scrape each second.

    Args:
        discovery: folder of the files by which processes are found.
        alertmanager: where alerts go, HOST:PORT.
        pushgateway: what is scraped beside them, HOST:PORT.
        rules: folder of rule files.
    """
    tree = yaml.safe_load((INFRA / "prometheus" / "file-sd.yml").read_text())
    tree["global"] = {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
    tree["rule_files"] = [f"{rules}/*.yml"]
    tree["alerting"]["alertmanagers"][0]["static_configs"][0]["targets"] = [alertmanager]
    processes, pushed = tree["scrape_configs"]
    (found,) = processes["file_sd_configs"]
    found["files"] = [f"{discovery}/{Path(pattern).name}" for pattern in found["files"]]
    pushed["static_configs"][0]["targets"] = [pushgateway]
    return tree


def quick_rules(folder: Path, thresholds: Mapping[str, float]) -> Path:
    """A copy of infra's rules: thresholds are set as their file says one may, and no alert waits longer than a second.

    Args:
        folder: of the copy.
        thresholds: by name, such as `stall_seconds`.
    """
    folder.mkdir()
    left = set(thresholds)
    for path in RULES.glob("*.yml"):
        tree = yaml.safe_load(path.read_text())
        for rule in (rule for group in tree["groups"] for rule in group["rules"]):
            name = rule.get("record", "").removeprefix("lathe:").removesuffix(":threshold")
            if name in left:
                rule["expr"] = f"vector({thresholds[name]})"
                left.remove(name)
            if "for" in rule:
                rule["for"] = "1s"
        (folder / path.name).write_text(yaml.safe_dump(tree))
    assert not left
    return folder


class Webhook:
    """A receiver of alerts that runs while its context lasts."""

    def __init__(self) -> None:
        self.notices: list[tuple[str, dict[str, Any]]] = []
        notices = self.notices

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                notices.extend((self.path.strip("/"), alert) for alert in body["alerts"])
                self.send_response(200)
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer((HOST, 0), Handler)
        self.url = f"http://{HOST}:{self._server.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    def told(self, alert: str, status: str = "firing") -> list[tuple[str, dict[str, Any]]]:
        """Notices of an alert: which receiver got them, and what they say."""
        return [
            (to, one) for to, one in self.notices if one["labels"]["alertname"] == alert and one["status"] == status
        ]
