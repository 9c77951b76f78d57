"""Which interface leads to another machine; what two machines make of it: tests/train/test_several_machines.py."""

from __future__ import annotations

import ipaddress
import os
import socket
import sys

import psutil
import pytest

from pipeline.errors import LatheError, SetupError
from pipeline.runtime import network, requeue

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="interfaces are called otherwise elsewhere")


@pytest.fixture(autouse=True)
def unset(monkeypatch):
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "LATHE_INTERFACE"):
        monkeypatch.setenv(name, "")


def resolves_to(monkeypatch, *answers):
    """Each look-up of a name gets the next answer: an address, or an error."""
    left, real = list(answers), socket.getaddrinfo

    def look_up(host, *arguments, **options):
        answer = left.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return real(answer, *arguments, **options)

    monkeypatch.setattr(network.socket, "getaddrinfo", look_up)
    monkeypatch.setattr(network.time, "sleep", lambda seconds: None)


def test_the_interface_that_has_the_address():
    assert network.interface_to("127.0.0.1") == "lo"
    assert network.interface_to("localhost") == "lo"
    for name, addresses in psutil.net_if_addrs().items():
        for place in addresses:
            known = place.family in (socket.AF_INET, socket.AF_INET6) and psutil.net_if_stats()[name].isup
            if known and not ipaddress.ip_address(place.address).is_link_local:
                assert network.interface_to(place.address) == name


def test_gloo_and_nccl_are_told_what_the_user_has_not(monkeypatch):
    network.choose_interface("127.0.0.1")
    assert (os.environ["GLOO_SOCKET_IFNAME"], os.environ["NCCL_SOCKET_IFNAME"]) == ("lo", "=lo")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "mine")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "")
    network.choose_interface("127.0.0.1")
    assert (os.environ["GLOO_SOCKET_IFNAME"], os.environ["NCCL_SOCKET_IFNAME"]) == ("mine", "=lo")


def test_another_interface_may_be_said(monkeypatch):
    monkeypatch.setenv("LATHE_INTERFACE", "lo")
    network.choose_interface("no-such-machine.invalid")
    assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"


def test_an_interface_that_is_not_there(monkeypatch):
    monkeypatch.setenv("LATHE_INTERFACE", "ib7")
    with pytest.raises(
        SetupError, match=f"^LATHE_INTERFACE=ib7 is no network interface of {socket.gethostname()}"
    ) as told:
        network.choose_interface("127.0.0.1")
    assert "take one of" in told.value.remedy
    assert "lo" in told.value.remedy


def test_a_name_that_appears_late_is_waited_for_and_told_once(monkeypatch, capsys):
    unknown = socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    resolves_to(monkeypatch, unknown, unknown, "127.0.0.1")
    assert [place[0] for _, place in network.wait_for_address("job-0.job")] == ["127.0.0.1"]
    assert capsys.readouterr().err == "MASTER_ADDR=job-0.job has no address yet: waiting for it, 900 s at most\n"


def test_a_name_that_never_appears(monkeypatch):
    resolves_to(monkeypatch, socket.gaierror(socket.EAI_NONAME, "Name or service not known"))
    with pytest.raises(LatheError, match=r"^MASTER_ADDR=nod0 has no address on .*: Name or service not known") as told:
        network.wait_for_address("nod0", patience=0)
    assert told.value.exit_code == 1


def test_a_name_that_cannot_be_one():
    with pytest.raises(LatheError, match=r"^MASTER_ADDR=a\.\.b has no address on .*: it is no name of a machine"):
        network.wait_for_address("a..b", patience=0)


def test_this_machines_name_that_is_loopbacks_address_is_refused(monkeypatch):
    resolves_to(monkeypatch, "127.0.1.1")
    with pytest.raises(
        SetupError, match=r"leads to MASTER_ADDR=node0: it is 127\.0\.1\.1 there, which no other"
    ) as told:
        network.interface_to("node0")
    assert "LATHE_INTERFACE" in told.value.remedy


def test_no_route_leads_there(monkeypatch):
    resolves_to(monkeypatch, "255.255.255.255")  # which may not be connected to without being asked for
    with pytest.raises(SetupError, match=r"leads to MASTER_ADDR=node0: Permission denied"):
        network.interface_to("node0")


def test_requeue_files_are_of_machine_0_alone(tmp_path, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("LATHE_REQUEUE_FILE", str(tmp_path / "requeue.json"))
    monkeypatch.setenv("NODE_RANK", "1")
    requeue.ask(stopped_by=10)
    assert not requeue.is_asked()
    monkeypatch.setenv("NODE_RANK", "0")
    requeue.ask(stopped_by=10)
    assert requeue.is_asked()
    monkeypatch.setenv("NODE_RANK", "1")
    requeue.clear()
    assert (tmp_path / "requeue.json").exists()
