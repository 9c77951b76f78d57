"""One process writes to an output; one that is gone does not keep others out."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
import time

import pytest

from pipeline.errors import LatheError, StorageError
from pipeline.storage import Lease, lease, open_store
from pipeline.storage.lease import LEASE, LostLeaseError


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    for name, seconds in (("RENEWED", 0.05), ("WATCHED", 0.6), ("_LOOK", 0.05)):
        monkeypatch.setattr(lease, f"{name}_SECONDS", seconds)


def left_by(store, **changes):
    """The lease of a process that is gone, with fields of one's own."""
    gone = Lease(store)
    store.write(LEASE, json.dumps({**gone._content, **changes}).encode())


def test_it_is_renewed_and_given_back(store):
    held = Lease(store)
    held.take()
    first = store.read(LEASE)
    deadline = time.monotonic() + 20
    while store.read(LEASE) == first:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    held.check()
    held.release()
    with pytest.raises(LostLeaseError):  # a save that is still on its way is not to take it back
        held.check()
    assert not store.exists(LEASE)
    Lease(store).release()  # one that was never taken


def test_a_second_one_is_refused_by_host_and_process(store):
    held = Lease(store)
    held.take()
    with pytest.raises(LatheError) as refused:
        Lease(store).take()
    assert refused.value.message == f"{store.url} is being written to by process {os.getpid()} on {os.uname().nodename}"
    assert "choose another output" in refused.value.remedy
    held.check()
    held.release()


def test_one_of_a_killed_process_is_taken_over_at_once(store):
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    left_by(store, pid=child.pid, started=lease._started(child.pid))
    with pytest.raises(LatheError, match=f"process {child.pid} on"):
        Lease(store).take()
    child.kill()
    for reaped in (False, True):  # before its parent looks, it is a zombie
        if reaped:
            child.communicate()
        deadline = time.monotonic() + 10
        while lease._started(child.pid) is not None:
            assert time.monotonic() < deadline
        left_by(store, pid=child.pid, started=5.0)
        said = []
        held = Lease(store, said.append)
        held.take()
        held.release()
        assert said == []


def test_a_process_id_that_another_has_now_does_not_count(store):
    left_by(store, started=1.0)
    held = Lease(store)
    held.take()
    held.release()


def test_one_from_elsewhere_is_watched(store):
    left_by(store, host="node7", boot="another", pid=1)
    said = []
    held = Lease(store, said.append)
    held.take()
    assert said == [f"{store.url} may be in use by process 1 on node7: watching its lease for 1 s"]
    held.release()
    elsewhere = Lease(store)
    elsewhere._content |= {"host": "node7", "boot": "another"}
    elsewhere.take()
    with pytest.raises(LatheError, match="on node7"):
        Lease(store).take()
    elsewhere.release()


def test_a_folder_without_hard_links_holds_one_too(tmp_path, monkeypatch):
    def link(*_, **__):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    store = open_store(str(tmp_path))
    held = Lease(store)
    held.take()
    with pytest.raises(LatheError, match="is being written to by process"):
        Lease(store).take()
    held.release()
    assert not store.exists(LEASE)


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b'{"pid": "x"}'])
def test_one_that_cannot_be_read_is_watched_too(tmp_path, content):
    store = open_store(str(tmp_path))
    store.write(LEASE, content)
    held = Lease(store)
    held.take()
    held.release()


def test_its_loss_is_told_and_the_winners_is_left_alone(store):
    first, second = Lease(store), Lease(store)
    first.take()
    store.write(LEASE, second._bytes())
    with pytest.raises(LostLeaseError, match="was taken over by process"):
        first.check()
    deadline = time.monotonic() + 20
    while first.lost is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    first.release()
    assert json.loads(store.read(LEASE))["id"] == second._content["id"]


def test_one_that_somebody_deleted_is_written_anew(store):
    held = Lease(store)
    held.take()
    store.delete([LEASE])
    held.check()
    assert store.exists(LEASE)
    held.release()
    assert not store.exists(LEASE)


def test_a_store_that_fails_is_no_loss(tmp_path):
    store = open_store(str(tmp_path / "run"))
    held = Lease(store)
    held.take()
    (tmp_path / "run").rename(tmp_path / "away")
    (tmp_path / "run").write_bytes(b"")
    with pytest.raises(StorageError):
        held.check()
    time.sleep(0.2)
    (tmp_path / "run").unlink()
    (tmp_path / "away").rename(tmp_path / "run")
    held.check()
    held.release()


def test_a_store_that_does_not_answer_keeps_nobody_for_long(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "_LEAVE_SECONDS", 0.1)
    store, held, back = open_store(str(tmp_path)), Lease(open_store(str(tmp_path))), threading.Event()
    held.take()
    monkeypatch.setattr(held, "_read", lambda: back.wait(20) and store.read(LEASE))
    started = time.monotonic()
    held.release()
    assert time.monotonic() - started < 5
    back.set()


@pytest.mark.parametrize(
    "make", [lambda path: path.mkdir(), lambda path: path.symlink_to(path)], ids=["folder", "loop"]
)
def test_what_is_no_file_is_told(tmp_path, monkeypatch, make):
    monkeypatch.setattr(lease, "_SHORT_SECONDS", 0.01)
    make(tmp_path / LEASE)
    with pytest.raises(LatheError, match=r"lease\.json"):
        Lease(open_store(str(tmp_path))).take()


@pytest.mark.parametrize("pid", [None, [], float("inf")])
def test_a_foreign_process_id_is_no_process(tmp_path, pid):
    store = open_store(str(tmp_path))
    left_by(store, pid=pid)
    held = Lease(store)
    held.take()
    held.release()


def test_others_see_who_holds_it_and_whether_it_lives(store):
    assert lease.holder(store) is None
    held = Lease(store)
    held.take()
    seen = lease.holder(store)
    assert seen is not None
    assert (seen.pid, seen.lives, str(seen)) == (os.getpid(), True, f"process {os.getpid()} on {os.uname().nodename}")
    held.release()
    left_by(store, started=-1.0)
    assert lease.holder(store).lives is False
    left_by(store, host="elsewhere")
    assert lease.holder(store).lives is None
    for broken in (b"{", b"[]", b'{"pid": "x", "counter": null}'):
        store.write(LEASE, broken)
        assert (lease.holder(store).pid, lease.holder(store).lives) == (0, None)
