"""The command line: help that reads well, errors of one line with a remedy and an exit code."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support import fingerprint, provenance

from pipeline.cli import main
from pipeline.cli.app import Warnings
from pipeline.data.manifest import BucketCount, Manifest, ShardEntry
from pipeline.encode.meter import Meter, Snapshot
from pipeline.encode.verify.report import Check, Status, VerifyReport
from pipeline.operate.bench.encode import EncodeBench
from pipeline.stopping import PromptStop

COMMANDS = (
    "demo",
    "pack",
    "train-vae",
    "encode",
    "verify",
    "inspect",
    "remove",
    "train",
    "ema",
    "sample",
    "evaluate",
    "export",
    "report",
    "watch",
    "bench",
    "doctor",
    "config",
)


def lathe(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "pipeline", *arguments], capture_output=True, text=True, check=False)


def run(patch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The command in this process; its exit code."""
    patch.setattr(sys, "argv", ["lathe", *arguments])
    with pytest.raises(SystemExit) as left:
        main()
    return int(left.value.code or 0)


def test_help_names_every_command() -> None:
    text = lathe("--help").stdout
    for command in COMMANDS:
        assert command in text


@pytest.mark.parametrize("command", [*COMMANDS, "bench encode", "bench loader"])
def test_every_command_explains_itself(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, *command.split(), "--help") == 0
    output = capsys.readouterr()
    assert f"Usage: lathe {command}" in output.out
    examples = [line for line in output.out.splitlines() if line.startswith(f"  lathe {command}")]
    assert examples, "help shows how the command is typed"
    assert all(len(line.rstrip()) < 80 for line in examples)
    assert output.err == ""


def test_help_does_not_wait_for_torch() -> None:
    code = "import sys, pipeline.cli; print(sorted(m for m in ('torch', 'deepspeed', 'diffusers') if m in sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("train", "nowhere.yaml"), 2, "nowhere.yaml: no such file"),
        (("train", "configs/demo/train.yaml", "stesp=3"), 2, "did you mean 'steps'?"),
        (("train", "configs/demo/encode.yaml"), 2, "is for `lathe encode`"),
        (("encode", "configs/demo/encode.yaml", "--task", "2/2"), 2, "--task 2/2"),
        (("encode", "configs/demo/encode.yaml", "--task", "x"), 2, "--task x"),
        (("verify", "nowhere/manifest.json"), 3, "nowhere"),
        (("inspect", "nowhere/manifest.json"), 3, "nowhere"),
        (("ema", "nowhere", "--sigma-rel", "0.3", "--output", "out"), 2, "--sigma-rel 0.3 is above"),
        (("ema", "nowhere", "--sigma-rel", "0.05", "--output", "out"), 4, "nowhere holds no snapshots"),
        (("remove", "nowhere/manifest.json", "--keys", "no-keys.txt"), 3, "no-keys.txt"),
        (("report", "nowhere"), 3, "nowhere: nothing is there"),
        (("report", "nowhere", "--output", "page"), 2, "--output page"),
        (("watch", "nowhere"), 3, "nowhere: nothing is there"),
        (("config", "configs/demo/train.yaml", "steps=0"), 2, "steps:"),
    ],
)
def test_a_mistake_ends_with_one_line_and_its_remedy(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    code: int,
    said: str,
) -> None:
    assert run(monkeypatch, *arguments) == code
    told = capsys.readouterr().err
    assert said in told
    assert told.startswith("error: ")
    assert len(told.splitlines()) == 2


@pytest.mark.parametrize(
    "arguments",
    [
        ("verify", "https://user:pw1/pw1@pw1@host/manifest.json"),
        ("config", "configs/demo/train.yaml", "output.x=https://host/?token=pw1"),
        ("config", "configs/demo/train.yaml", "metrics.pushgateway=http://user:pw1@host"),
    ],
)
def test_a_mistake_tells_no_passwords(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]
) -> None:
    assert run(monkeypatch, *arguments) in (2, 3)
    assert "pw1" not in capsys.readouterr().err


@pytest.mark.alone
def test_a_process_that_fails_says_no_more_than_that() -> None:
    result = lathe("train", "nowhere.yaml")
    assert result.returncode == 2
    assert result.stderr.startswith("error: nowhere.yaml: no such file\n  ")
    assert len(result.stderr.splitlines()) == 2


@pytest.mark.alone
def test_config_prints_what_runs() -> None:
    text = lathe("config", "configs/demo/train.yaml", "root=s3://mine").stdout
    assert "manifest: s3://mine/latents/manifest.json" in text
    assert "configs/demo/train.yaml" in lathe("config").stdout


@pytest.mark.alone
def test_version() -> None:
    assert lathe("--version").stdout.strip().count(".") == 2


def test_the_folder_that_one_is_in_is_gone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert run(monkeypatch, "doctor", "run.yaml") == 5
    assert capsys.readouterr().err == "error: the current folder is not there any more\n  go to one that is: cd ~\n"


def test_an_interrupt_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(*_arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pipeline.runfile.load_any", interrupt)
    monkeypatch.setattr("sys.argv", ["lathe", "config", "run.yaml"])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 130
    assert capsys.readouterr().err == "stopped; the same command goes on where it was\n"


def test_train_vae_ends_by_an_exception_where_it_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    handlers: list[object] = []

    def fit(*_arguments: object) -> str:
        handlers.append(signal.getsignal(signal.SIGTERM))
        return "fitted"

    monkeypatch.setattr("pipeline.train.first_stage.fit_first_stage", fit)
    assert run(monkeypatch, "train-vae", "configs/demo/train-vae.yaml") == 0
    assert isinstance(getattr(handlers[0], "__self__", None), PromptStop)


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The shares that `lathe encode` was asked for; nothing is encoded."""
    shares: list[tuple[int, int]] = []

    def encode(_config: object, share: tuple[int, int], on_progress: Callable[[Snapshot], None]) -> str:
        shares.append(share)
        meter = Meter(1000, 2, decoders=1)
        on_progress(meter.snapshot())
        meter.count(images=9, rejected={"not_an_image": 1}, shards=2)
        on_progress(meter.snapshot())
        return "18 pictures"

    monkeypatch.setattr("pipeline.encode.job.encode", encode)
    for name in [n for n in os.environ if n.startswith("SLURM_") or n in ("RANK", "WORLD_SIZE", "LATHE_TASKS")]:
        monkeypatch.delenv(name)
    return shares


def test_encode_tells_once_which_share_it_found(
    encoded: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"ID": 4, "COUNT": 8, "MIN": 1, "MAX": 8, "STEP": 1}.items():
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))
    assert run(monkeypatch, "encode", "configs/demo/encode.yaml") == 0
    output = capsys.readouterr()
    assert output.out == "18 pictures\n"
    assert re.fullmatch(
        r"share 3/8: SLURM array task 3 of 8, counted from 0\n"
        r"encode: 2/2 shards after \d+ s  [\d,]+ images/s, 10\.0 % rejected\n",
        output.err,
    )
    assert run(monkeypatch, "encode", "configs/demo/encode.yaml", "--task", "1/2") == 0
    assert "share" not in capsys.readouterr().err
    assert encoded == [(3, 8), (1, 2)]


def test_encode_alone_takes_everything_and_says_nothing_of_shares(
    encoded: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "encode", "configs/demo/encode.yaml") == 0
    assert encoded == [(0, 1)]
    assert "share" not in capsys.readouterr().err


@pytest.mark.parametrize("resolutions", [(64,), (64, 96)])
def test_finalize_tells_of_each_manifest(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], resolutions: tuple[int, ...]
) -> None:
    def finalize(_config: object) -> tuple[Manifest, ...]:
        counts = (BucketCount(bucket=(64, 64), train=7, holdout=2),)
        entry = ShardEntry(name="a", receipt="b", source="c", buckets=counts, bytes=9, sha256="d")
        whole = {"content_hash": "", "shards": (entry,), "mean": (0.0, 0.0), "std": (1.0, 1.0), "rejects": {}}
        return tuple(
            Manifest(**whole, environments=(), **vars(provenance(fingerprint=fingerprint(side))))
            for side in resolutions
        )

    monkeypatch.setattr("pipeline.encode.job.finalize", finalize)
    assert run(monkeypatch, "encode", "configs/demo/encode.yaml", "--finalize") == 0
    said = "manifest written: 7 to train on, 2 held out"
    expected = [f"{side} px: {said}" for side in resolutions] if len(resolutions) > 1 else [said]
    assert capsys.readouterr().out.splitlines() == expected


def test_warnings_go_where_stderr_is_at_that_moment(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    handler = Warnings()
    handler.handle(logging.makeLogRecord({"msg": "one"}))
    assert capsys.readouterr().err == "one\n"
    with monkeypatch.context() as patch:
        elsewhere = io.StringIO()
        patch.setattr(sys, "stderr", elsewhere)
        handler.handle(logging.makeLogRecord({"msg": "two"}))
    assert elsewhere.getvalue() == "two\n"
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("status", "code"), [("ok", 0), ("warn", 0), ("fail", 4)])
def test_verify_ends_with_a_code_of_its_own_where_a_check_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], status: Status, code: int
) -> None:
    asked: dict[str, object] = {}

    def verify(manifest: str, **options: object) -> VerifyReport:
        asked.update(options, manifest=manifest)
        check = Check("finite", status, "9 numbers", 0, (), "")
        return VerifyReport(manifest, quick=True, seconds=1.0, bytes_read=0, checks=(check,))

    monkeypatch.setattr("pipeline.encode.verify.job.verify", verify)
    arguments = ("--images", "a.tar", "--images", "b/*.tar", "--decode", "3", "--output", "out", "--quick")
    assert run(monkeypatch, "verify", "m/manifest.json", *arguments) == code
    output = capsys.readouterr()
    assert output.out.startswith(f"{status:<5} finite")
    assert output.err == ""
    del asked["progress"]
    expected = {"images": ["a.tar", "b/*.tar"], "autoencoder": None, "decode": 3, "output": "out", "quick": True}
    assert asked == {**expected, "manifest": "m/manifest.json"}


def test_names_and_words_of_others_do_not_command_the_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("pipeline.operate.inspect.describe", lambda url, samples, as_json: "a\x1b[31m\nb\udce9")
    assert run(monkeypatch, "inspect", "a.tar") == 0
    assert capsys.readouterr().out == "a\\x1b[31m\nb\\udce9\n"
    assert run(monkeypatch, "verify", "no\x1b[2J\nok    all/manifest.json") == 3
    told = capsys.readouterr().err
    assert r"no\x1b[2J\nok    all" in told
    assert len(told.splitlines()) == 2


def test_remove_reads_the_keys_and_tells_what_went(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def remove(manifest: str, keys: list[str], *, dry_run: bool, progress: object) -> str:
        return f"{manifest} {keys} {dry_run}"

    monkeypatch.setattr("pipeline.encode.takedown.job.remove", remove)
    (tmp_path / "keys.txt").write_text("one\n00001.tar\ttwo\n")
    keys = ("--keys", str(tmp_path / "keys.txt"))
    assert run(monkeypatch, "remove", "manifest.json", *keys) == 0
    assert capsys.readouterr().out == "manifest.json ['one', '00001.tar\\ttwo'] False\n"
    assert run(monkeypatch, "remove", "manifest.json", *keys, "--dry-run") == 0
    assert capsys.readouterr().out.endswith("True\n")


def test_bench_writes_every_figure_and_a_page(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    figures = {"encode_over_device": 0.97, "every": ["other", 1.5]}
    asked = []

    def bench_encode(sizes: EncodeBench, say: Callable[[str], None]) -> dict[str, object]:
        asked.append(sizes)
        say("round 1")
        return figures

    monkeypatch.setattr("pipeline.operate.bench.encode.bench_encode", bench_encode)
    monkeypatch.setattr("pipeline.operate.bench.page.summary", lambda result: f"job at {result['encode_over_device']}")
    monkeypatch.setattr("pipeline.operate.bench.page.page", lambda result, command: f"{result['every']} by {command}")
    wanted = ["--json", str(tmp_path / "figures.json"), "--report", str(tmp_path / "encode.md")]
    assert run(monkeypatch, "bench", "encode", "--repeats", "2", "--root", str(tmp_path), *wanted) == 0
    assert json.loads((tmp_path / "figures.json").read_text()) == figures
    assert (tmp_path / "encode.md").read_text() == "['other', 1.5] by lathe bench encode --size standard --repeats 2"
    assert asked == [EncodeBench(root=str(tmp_path), repeats=2)]
    output = capsys.readouterr()
    assert (output.out, output.err) == ("job at 0.97\n", "round 1\n")
    assert run(monkeypatch, "bench", "encode", "--size", "huge") == 2
    assert "use one of small, standard, large" in capsys.readouterr().err


def test_inspect_prints_what_is_described(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(
        "pipeline.operate.inspect.describe", lambda url, samples, as_json: f"{url} {samples} {as_json}\n\n"
    )
    assert run(monkeypatch, "inspect", "a.tar") == 0
    assert run(monkeypatch, "inspect", "a.tar", "--samples", "2", "--json") == 0
    assert capsys.readouterr().out == "a.tar 6 False\na.tar 2 True\n"


def test_the_engine_of_a_run_is_printed_for_any_number_of_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "train.yaml"
    file.write_text("job: train\nmanifest: nowhere\noutput: nowhere\nglobal_batch: 256\nengine: {zero_stage: 3}\n")
    assert run(monkeypatch, "train", str(file), "engine.accumulation=2", "--print-engine", "64") == 0
    whole = json.loads(capsys.readouterr().out)
    assert (whole["train_micro_batch_size_per_gpu"], whole["zero_optimization"]["stage"]) == (2, 3)
    assert run(monkeypatch, "train", str(file), "--print-engine", "7") == 2
    assert "global_batch: 256 samples cannot be shared equally by 7 ranks" in capsys.readouterr().err
    assert run(monkeypatch, "train", str(file), "engine.world_size=8", "--print-engine", "64") == 2
    assert capsys.readouterr().err == (
        "error: engine.world_size=8, but the engine of 64 ranks is asked for\n"
        "  ask for that of 8, or set engine.world_size to 64 or null\n"
    )
