"""What the launcher tells of its ranks' errors, and its exit code."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from daemons import free_port

from pipeline.errors import ConfigError, StorageError
from pipeline.runtime import launch, node
from pipeline.runtime.launch import OtherRankError


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("LATHE_ERROR_FOLDER", str(tmp_path))
    return tmp_path


def report(monkeypatch, rank, error):
    monkeypatch.setenv("RANK", str(rank))
    assert launch.report(error)


def test_the_same_error_of_all_ranks_is_told_once(folder, monkeypatch, capsys):
    for rank in (0, 1):
        report(monkeypatch, rank, ConfigError("seed: 5", "set seed=0"))
    assert launch._tell(folder, 1, 2) == 2
    assert capsys.readouterr().err == "error: seed: 5\n  set seed=0\n"


def test_an_outage_that_each_rank_meets_at_another_file_is_told_once(folder, monkeypatch, capsys):
    for rank in range(4):
        report(monkeypatch, rank, StorageError(f"S3 did not answer: s3://b/{rank // 2}.tar", "start the server"))
    report(monkeypatch, 4, ConfigError("seed: 5", "set seed=0"))
    assert launch._tell(folder, 1, 3) == 3
    assert capsys.readouterr().err == (
        "error: S3 did not answer: s3://b/0.tar\n  and 1 more like it, from other ranks\n  start the server\n"
        "error: seed: 5\n  set seed=0\n"
    )


def test_what_differs_by_more_than_names_is_told_each_though_the_remedy_is_one(folder, monkeypatch, capsys):
    for rank, said in enumerate(["/data/0.tar: no space", "/data/1.tar: permission denied", "/data/7.tar: no space"]):
        report(monkeypatch, rank, StorageError(said, "make room or mend rights"))
    launch._tell(folder, 1, 3)
    assert capsys.readouterr().err == (
        "error: /data/0.tar: no space\n  and 1 more like it, from other ranks\n  make room or mend rights\n"
        "error: /data/1.tar: permission denied\n  make room or mend rights\n"
    )


def test_errors_without_a_remedy(folder, monkeypatch, capsys):
    for rank, said in enumerate(["fault 1", "fault 2", "another"]):
        report(monkeypatch, rank, StorageError(said))
    launch._tell(folder, 1, 3)
    told = capsys.readouterr().err
    assert told == "error: fault 1\n  and 1 more like it, from other ranks\nerror: another\n"


def test_the_cause_is_told_and_not_what_followed_from_it(folder, monkeypatch, capsys):
    report(monkeypatch, 0, OtherRankError("rank 1 failed", "see there"))
    report(monkeypatch, 1, StorageError("disk full"))
    assert launch._tell(folder, 0, 1) == 3
    assert capsys.readouterr().err == "error: disk full\n"


def test_a_killed_rank_is_named_where_nothing_else_is_known(folder, monkeypatch, capsys):
    report(monkeypatch, 0, OtherRankError("lost another rank", ""))
    assert launch._tell(folder, 1, -9) == 137
    assert capsys.readouterr().err == "error: rank 1 was ended by SIGKILL, and the other ranks with it\n"


def test_the_rank_that_was_killed_counts_where_the_first_one_only_tells_of_its_loss(folder, monkeypatch):
    report(monkeypatch, 0, OtherRankError("lost another rank", ""))
    assert launch._first({0: 1, 1: -9}, folder) == (1, -9)
    assert launch._first({0: 1, 1: -15}, folder) == (0, 1)


@pytest.mark.parametrize("code", [1, 3, -15])
def test_a_rank_that_the_agent_kills_since_it_does_not_leave_is_not_the_cause(folder, monkeypatch, code):
    if code > 0:
        report(monkeypatch, 0, StorageError("disk full"))
    assert launch._first({0: code, 1: -9}, folder) == (0, code)


def test_a_signal_before_there_are_ranks_asks_for_another_start(tmp_path, monkeypatch):
    monkeypatch.setenv("LATHE_REQUEUE_FILE", str(tmp_path / "requeue.json"))
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(launch.psutil.Process, "children", lambda self: [])
    with pytest.raises(SystemExit, match=str(128 + signal.SIGUSR1)):
        launch._Signals().pass_on(signal.SIGUSR1, None)
    assert json.loads((tmp_path / "requeue.json").read_text())["signal"] == "SIGUSR1"


def test_an_error_that_cannot_be_left_to_the_launcher_is_the_ranks_own_to_tell(folder, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    (folder / "000000.partial").mkdir()  # as where the temporary folder is full
    assert not launch.report(ConfigError("seed: 5", "set seed=0"))


def test_children_that_end_by_themselves_as_they_are_killed(monkeypatch):
    """A rank's own children end with it."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    child = psutil.Process(ended.pid)
    ended.wait()

    def asked_to_stop(thread: threading.Thread) -> None:
        raise SystemExit(143)

    monkeypatch.setattr(psutil.Process, "children", lambda self, recursive: [child])
    monkeypatch.setitem(node.PROGRAMS, "waits", lambda arguments: time.sleep(1) or {})
    monkeypatch.setattr(threading.Thread, "join", asked_to_stop)
    with pytest.raises(SystemExit, match="143"):
        node.run("waits", [])


@pytest.mark.parametrize("text", ["node0\n", "node0 slots=2\nnode0 slots=2\n", "# none\n"])
def test_a_hostfile_that_deepspeed_does_not_take(tmp_path, monkeypatch, text):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    (tmp_path / "hosts").write_text(text)
    with pytest.raises(ConfigError, match=f"^HOSTFILE={tmp_path / 'hosts'}: Hostfile ") as told:
        node.run("deepspeed", [str(tmp_path / "hosts"), "pipeline"])
    assert told.value.remedy == "one line for each machine: NAME slots=RANKS"


def test_without_this_launcher_a_rank_tells_its_error_itself(monkeypatch):
    monkeypatch.delenv("LATHE_ERROR_FOLDER", raising=False)
    assert not launch.report(ConfigError("x", "y"))


ACCELERATE = "accelerate --use_deepspeed --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no"
ACCELERATE += " --main_process_port 0"
TORCHRUN = "torchrun --nproc-per-node 1 --master-port 0"


def start(options: str, script: Path, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline.runtime.launch", *options.split(), str(script)],
        env={
            **os.environ,
            "PYTHONPATH": str(Path(__file__).parents[2]),
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            **environment,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.ranks
@pytest.mark.parametrize("program", [ACCELERATE, TORCHRUN], ids=["accelerate", "torchrun"])
def test_a_rank_that_fails_gives_the_launcher_its_exit_code_and_no_stack_of_the_launcher(tmp_path, program):
    script = tmp_path / "rank.py"
    script.write_text("import sys; print('said'); sys.exit(7)")
    launcher = start(program, script)
    assert launcher.communicate(timeout=60)[0] == "said\n"
    assert launcher.returncode == 7


@pytest.mark.ranks
@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's signal on a parent's death is Linux's")
def test_ranks_do_not_outlive_a_killed_launcher(tmp_path):
    script = tmp_path / "rank.py"
    script.write_text(
        "import os, time\n"
        "from pipeline.runtime.launch import end_with_launcher\n"
        "end_with_launcher()\n"
        "print(os.getpid(), flush=True)\n"
        "time.sleep(120)\n"
    )
    launcher = start(TORCHRUN, script)
    assert launcher.stdout is not None
    rank = psutil.Process(int(launcher.stdout.readline()))
    launcher.kill()
    launcher.wait(10)
    assert psutil.wait_procs([rank], timeout=10)[1] == []


@pytest.mark.ranks
def test_whoever_is_not_to_hear_of_his_terminals_end_goes_on(tmp_path):
    script = tmp_path / "rank.py"
    script.write_text("import time; print('begun', flush=True); time.sleep(1); print('done')")
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        launcher = start(TORCHRUN, script)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert launcher.stdout is not None
    assert launcher.stdout.readline() == "begun\n"
    launcher.send_signal(signal.SIGHUP)
    assert (launcher.communicate(timeout=60)[0], launcher.returncode) == ("done\n", 0)


@pytest.mark.ranks
def test_a_rank_that_python_ends_by_ctrl_c_asks_for_another_start_or_says_why_it_cannot(tmp_path):
    """Before its steps begin it does not note the signal, but leaves with 130."""
    script, file = tmp_path / "rank.py", tmp_path / "folder" / "requeue.json"
    script.write_text("import os, sys; os.environ.get('GONE') and os.rmdir(os.environ['GONE']); sys.exit(130)")
    file.parent.mkdir()
    launcher = start(TORCHRUN, script, LATHE_REQUEUE_FILE=str(file))
    assert (launcher.communicate(timeout=60)[0], launcher.returncode) == ("", 130)
    assert json.loads(file.read_text())["signal"] == "SIGINT"
    launcher = start(TORCHRUN, script, LATHE_REQUEUE_FILE=str(file), GONE=str(file.parent))
    assert launcher.communicate(timeout=60)[0].startswith(f"error: LATHE_REQUEUE_FILE={file}: ")
    assert launcher.returncode == StorageError.exit_code


def one_of_two(tmp_path: Path, conf: str) -> tuple[subprocess.Popen[str], int]:
    """The launcher of machine 0 of two, the other of which does not come; and the port it waits at."""
    port = free_port()
    place = {"NODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    options = f"torchrun --nnodes 2 --rdzv-conf {conf} --master-addr 127.0.0.1 --master-port {port}"
    return start(options, tmp_path / "rank.py", LATHE_REQUEUE_FILE=str(tmp_path / "requeue.json"), **place), port


@pytest.mark.ranks
def test_a_launcher_that_waits_for_other_machines_hears_signals(tmp_path):
    launcher, port = one_of_two(tmp_path, "timeout=120")
    while True:
        with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
            break
        assert launcher.poll() is None
        time.sleep(0.1)
    launcher.send_signal(signal.SIGUSR1)
    assert launcher.communicate(timeout=10)[0] == f"2 machines meet at 127.0.0.1:{port}\n"
    assert launcher.returncode == 128 + signal.SIGUSR1
    assert json.loads((tmp_path / "requeue.json").read_text())["signal"] == "SIGUSR1"


@pytest.mark.ranks
def test_machines_that_do_not_meet(tmp_path):
    launcher, port = one_of_two(tmp_path, "timeout=2")
    _, message, remedy = launcher.communicate(timeout=60)[0].splitlines()
    assert message.startswith(f"error: node 0 of 2 has not met the others at 127.0.0.1:{port}: Timed out after")
    assert remedy.startswith("  see that all nodes were started")
    assert launcher.returncode == 1


BARRIER = """
import sys
from pipeline.runtime import node
node._EXIT_BARRIER_SECONDS = 1
print(node.run("torchrun", sys.argv[1:]))
"""


@pytest.mark.ranks
def test_a_launcher_whose_ranks_have_finished_does_not_wait_long_for_a_lost_machine(tmp_path):
    script = tmp_path / "rank.py"
    script.write_text("import os, time\ntime.sleep(60 * int(os.environ['RANK']))\n")
    port = free_port()
    options = f"--nnodes 2 --master-addr 127.0.0.1 --master-port {port} --node-rank"
    other = start(f"torchrun {options} 1", script)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", BARRIER, *options.split(), "0", str(script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=40, check=True)
    assert done.stdout == "{}\n"
    assert other.poll() is None
    other.send_signal(signal.SIGTERM)
    assert "rank 1 was ended by SIGTERM" in other.communicate(timeout=30)[0]
