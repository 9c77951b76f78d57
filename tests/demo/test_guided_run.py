"""The guided run's own decisions: what is refused before any work, and what goes on where it was."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.demo import guided_run
from pipeline.demo.lock import only_one
from pipeline.demo.state import DemoState
from pipeline.errors import ConfigError, LatheError, SetupError
from pipeline.memory import MemoryPeak
from pipeline.operate.processes import run_together


def test_an_unknown_preset_is_told_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        guided_run.run_demo(tmp_path, preset="smok", s3=None, fresh=False)
    assert "demo, smoke, showcase" in caught.value.remedy


@pytest.mark.parametrize(
    ("url", "root", "endpoint"),
    [
        ("http://127.0.0.1:9000/mine", "s3://mine/lathe-demo", "http://127.0.0.1:9000"),
        ("https://minio.example/mine/deep/", "s3://mine/deep/lathe-demo", "https://minio.example"),
        ("s3://bucket", "s3://bucket/lathe-demo", None),
        ("s3://bucket/prefix/", "s3://bucket/prefix/lathe-demo", None),
    ],
)
def test_a_server_of_the_users_own(url: str, root: str, endpoint: str | None) -> None:
    assert guided_run._parse_s3(url) == (root, endpoint)


@pytest.mark.parametrize(
    "url",
    [
        "bucket",
        "s3://",
        "ftp://host/x",
        "./x",
        "127.0.0.1:9000",
        "http://127.0.0.1:9000",
        "http://[::1/b",
        "http://h:x/b",
    ],
)
def test_what_is_no_address_is_told(url: str) -> None:
    with pytest.raises(ConfigError, match="not a bucket's address"):
        guided_run._parse_s3(url)


def test_a_folder_that_takes_no_lock_is_told(tmp_path: Path) -> None:
    (tmp_path / "lock").mkdir()
    with pytest.raises(SetupError, match="cannot be written to"), only_one(tmp_path):
        pass


def test_two_demos_in_one_folder_are_told_and_a_killed_one_leaves_no_lock(tmp_path: Path) -> None:
    code = f"""
import time
from pathlib import Path
from pipeline.demo.lock import only_one
with only_one(Path({str(tmp_path)!r})):
    print("held", flush=True)
    time.sleep(60)
"""
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(SetupError, match=f"pid {other.pid}"), only_one(tmp_path):
            pass
    finally:
        other.kill()
        other.wait()
    with only_one(tmp_path):
        pass


def test_a_folder_with_another_demo_is_refused(tmp_path: Path) -> None:
    DemoState("demo", "s3://a").save(tmp_path / "state.json")
    assert DemoState.load(tmp_path / "state.json", "demo", "s3://a").finished == {}
    with pytest.raises(ConfigError, match="preset demo on s3://a"):
        DemoState.load(tmp_path / "state.json", "smoke", "s3://a")
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(ConfigError, match="cannot be read"):
        DemoState.load(tmp_path / "state.json", "demo", "s3://a")


def test_too_little_disk_is_told_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guided_run, "DISK_BYTES_NEEDED", 2**60)
    with pytest.raises(SetupError, match="free disk"):
        guided_run.run_demo(tmp_path, preset="smoke", s3=None, fresh=False)
    assert not (tmp_path / "state.json").exists()


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SetupError, match="cannot be made"):
        guided_run.run_demo(tmp_path / "file" / "demo", preset="smoke", s3=None, fresh=False)


@pytest.mark.parametrize("fresh", [False, True])
def test_a_folder_of_something_else_is_left_alone(tmp_path: Path, fresh: bool) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "holiday.jpg").write_text("")
    with pytest.raises(ConfigError, match=r"no folder of a demo: it holds pictures"):
        guided_run.run_demo(tmp_path, preset="smoke", s3=None, fresh=fresh)
    assert (tmp_path / "pictures" / "holiday.jpg").exists()


def test_children_that_fail_end_the_others_and_their_log_is_named(tmp_path: Path) -> None:
    started = time.monotonic()
    with pytest.raises(LatheError, match=r"exit code 7.*encode-1\.log") as caught:
        run_together(
            {
                None: [sys.executable, "-c", "import time; time.sleep(60)"],
                tmp_path / "encode-1.log": [sys.executable, "-c", "print('x'); raise SystemExit(7)"],
            },
            {"PATH": ""},
            "encode",
            lambda: None,
        )
    assert caught.value.exit_code == 7
    assert time.monotonic() - started < 30
    assert (tmp_path / "encode-1.log").read_text() == "x\n"


def test_a_dead_server_ends_the_children(tmp_path: Path) -> None:
    def dead() -> None:
        raise SetupError("server gone")

    started = time.monotonic()
    with pytest.raises(SetupError, match="server gone"):
        run_together({None: [sys.executable, "-c", "import time; time.sleep(60)"]}, {"PATH": ""}, "x", dead)
    assert time.monotonic() - started < 30


def test_memory_counts_the_children_too() -> None:
    with MemoryPeak(interval_seconds=0.05) as peak:
        subprocess.run([sys.executable, "-c", "x = b'1' * 200_000_000; import time; time.sleep(1)"], check=True)
    assert peak.bytes > 200_000_000


def test_every_preset_names_stages_and_gives_valid_settings(tmp_path: Path) -> None:
    for preset in ("demo", "smoke", "showcase"):
        changes = guided_run._preset(preset)
        assert set(changes) <= set(guided_run.TITLES)
        state = DemoState(preset, "s3://x")
        run = guided_run._GuidedRun(tmp_path, "s3://x", changes, {}, lambda: None, state, MemoryPeak())
        configs = run.configs()
        assert set(configs) == set(guided_run.TITLES) - {"data", "report"}
        assert all(config.root == "s3://x" for config in configs.values())


def test_the_state_survives_a_round_trip(tmp_path: Path) -> None:
    state = DemoState("smoke", "s3://x", {"pack": "a: 1"}, {"pack": 1.5}, 12)
    state.save(tmp_path / "state.json")
    assert DemoState.load(tmp_path / "state.json", "smoke", "s3://x") == state
    assert json.loads((tmp_path / "state.json").read_text())["peak_rss_bytes"] == 12
