"""`--all-ranks`: what ranks find is told once, with the ranks that it is about."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest
from forked import Command

from pipeline.errors import SetupError
from pipeline.operate.doctor import job
from pipeline.operate.doctor.finding import Finding
from pipeline.operate.doctor.ranks import Told, together
from pipeline.runtime.roll_call import RollCall


def told(rank: int, *findings: Finding, host: str = "node1", **facts: str) -> Told:
    return Told(rank, host, facts, findings)


def good(check: str = "disk", said: str = "1 GiB free") -> Finding:
    return Finding(check, "pass", said)


def bad(said: str = "/scratch: 1 MiB free", remedy: str = "free some") -> Finding:
    return Finding("disk", "fail", said, remedy)


class TestTogether:
    def test_what_passes_everywhere_is_told_once(self):
        ranks = [told(rank, good(), host=f"node{rank // 2}", torch="2.9") for rank in range(4)]
        assert together(ranks, 4, 9) == [
            Finding("ranks", "pass", "4 on 2 machines"),
            Finding("alike", "pass", "run file and versions are the same on all ranks"),
            good(),
        ]

    def test_what_fails_is_told_with_its_ranks(self):
        ranks = [told(0, good()), told(1, bad()), told(2, bad("/scratch: 2 MiB free")), told(3, good())]
        assert together(ranks, 4, 9)[2:] == [
            Finding("disk", "fail", "/scratch: 1 MiB free", "free some", ranks="ranks 1-2")
        ]

    def test_what_fails_everywhere_needs_no_ranks(self):
        assert together([told(rank, bad()) for rank in range(3)], 3, 9)[2:] == [bad()]

    def test_failures_stand_before_warnings(self):
        doubt = Finding("disk", "warn", "little room", "free some")
        found = together([told(0, doubt), told(1, bad()), told(2, good())], 3, 9)[2:]
        assert [(one.verdict, one.ranks) for one in found] == [("fail", "rank 1"), ("warn", "rank 0")]

    def test_a_check_of_some_ranks_alone(self):
        found = together([told(0, good("manifest", "fine"), good()), told(1, good())], 2, 9)[2:]
        assert [one.check for one in found] == ["manifest", "disk"]

    def test_ranks_that_say_nothing_are_named(self):
        first = together([told(0, good()), told(3, good())], 4, 9)[0]
        assert (first.verdict, first.ranks) == ("fail", "ranks 1-2")
        assert first.said == "2 of 4 told nothing within 9 s"

    def test_what_is_not_the_same_on_all_is_named(self):
        ranks = [told(0, torch="2.9", seed="0"), told(1, torch="2.8", seed="0"), told(2, torch="2.9", seed="0")]
        assert together(ranks, 3, 9)[1].said == "torch: 2.9 on ranks 0, 2, 2.8 on rank 1"
        assert together(ranks, 3, 9)[1].verdict == "fail"

    def test_the_way_to_rank_0_changes_nothing(self):
        one = told(3, good(), bad(), torch="2.9")
        assert Told.from_json(one.to_json()) == one


@pytest.mark.parametrize(
    ("name", "value"),
    [("RANK", "x"), ("RANK", "2"), ("WORLD_SIZE", "0"), ("WORLD_SIZE", "9" * 30), ("MASTER_PORT", "ssh")],
)
def test_a_launcher_that_tells_no_numbers(monkeypatch, name, value):
    told = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", name: value}
    for variable, said in told.items():
        monkeypatch.setenv(variable, said)
    with pytest.raises(SetupError, match=r"--all-ranks: .* is no number from 0 to "):
        RollCall()


def test_without_a_launcher_it_says_how():
    with pytest.raises(SetupError, match="no launcher has started this") as error:
        RollCall()
    assert "torchrun" in error.value.remedy


def environment(rank: int, port: int, world_size: int = 2) -> dict[str, str]:
    told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    return {**{name: str(value) for name, value in told.items()}, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


@pytest.fixture
def port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


@pytest.mark.ranks
def test_a_rank_that_never_comes(train_file, monkeypatch, port):
    for name, value in environment(0, port).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    monkeypatch.setattr(job, "_COLLECTIVE_SECONDS", 0.8)
    monkeypatch.setattr(job, "_HEAR_SECONDS", 1.0)
    call = RollCall(seconds=5)
    found = {finding.check: finding for finding in job.examine_ranks(str(train_file), [], call)}
    assert (found["ranks"].verdict, found["ranks"].ranks) == ("fail", "rank 1")
    assert found["collective"].verdict == "fail"
    assert "GLOO_SOCKET_IFNAME" in found["collective"].remedy
    assert found["manifest"].verdict == "pass"


@pytest.mark.ranks
def test_a_first_machine_that_cannot_be_reached(monkeypatch, port):
    for name, value in environment(1, port).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SetupError, match=rf"rank 1 cannot reach 127\.0\.0\.1:{port}") as error:
        RollCall(seconds=1)
    assert "MASTER_ADDR" in error.value.remedy


@pytest.mark.ranks
@pytest.mark.parametrize("other", ["", "metrics.host=192.0.2.7", "seed=5"])
def test_two_ranks(train_file: Path, tmp_path: Path, port: int, other: str):
    """Healthy; one with a fault of its own; one with another run file."""
    commands = []
    for rank in (0, 1):
        arguments = ["doctor", str(train_file), "--all-ranks", "--json", *([other] if other and rank else [])]
        own = {**os.environ, **environment(rank, port)}
        commands.append(Command(arguments, tmp_path / f"{rank}.said", environment=own))
    said = [command.communicate(timeout=120)[0] for command in commands]
    assert [command.returncode for command in commands] == [5 if other else 0] * 2, said
    assert said[1] == ""
    tree = json.loads(said[0])
    assert tree["well"] is not bool(other)
    wrong = [finding for finding in tree["findings"] if finding["verdict"] != "pass"]
    if not other:
        assert wrong == []
        assert tree["findings"][0]["said"] == "2 on 1 machine"
        (trial,) = (finding for finding in tree["findings"] if finding["check"] == "collective")
        assert trial["said"].startswith("2 ranks by gloo, in ")
    elif other.startswith("seed"):
        assert [(finding["check"], finding["said"]) for finding in wrong] == [
            ("alike", "seed: 0 on rank 0, 5 on rank 1")
        ]
    else:
        assert [(finding["check"], finding["ranks"]) for finding in wrong] == [("metrics-port", "rank 1")]
