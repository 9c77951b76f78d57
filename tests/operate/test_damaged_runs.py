"""Outputs that were damaged, or are not ours to read: what is wrong is left out and told, and all else is shown."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from page_reader import Reader
from run_folders import NOW, STARTS, log_lines, write_encoded, write_log, write_receipts, write_training

from pipeline.errors import ConfigError, DataError, StorageError
from pipeline.operate.report.job import report
from pipeline.operate.runs import find as finding
from pipeline.operate.runs.find import find
from pipeline.operate.runs.run import Run, open_runs
from pipeline.operate.watch.watched import Watched
from pipeline.storage import open_store

LAUGHS = "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9) if before else 'ha'}]\n"
    for before, name in zip(["", *"abcdefgh"], "abcdefghi", strict=True)
)
DAMAGES = {
    "itself": ("run.yaml", "&top\njob: train\nagain: *top\n"),
    "aliases": ("run.yaml", f"job: train\n{LAUGHS}"),
    "brackets": ("run.yaml", "job: " + 20_000 * "["),
    "blocks": ("run.yaml", "".join(f"{' ' * depth}a:\n" for depth in range(300))),
    "long": ("run.yaml", "job: train\nnote: " + 2_000_000 * "x"),
    "digits": ("run.yaml", f"job: train\nsteps: 0x{400 * 'f'}"),
    "times": ("starts.json", json.dumps([{**STARTS[0], "time": 10**400}])),
    "deep": ("starts.json", f"[{900 * '['}{900 * ']'}]"),
    "tree": ("starts.json", json.dumps([{"versions": json.loads(f"{300 * '['}{300 * ']'}")}])),
}


def page_of(tmp_path: Path, *folders: Path) -> Reader:
    report([str(folder) for folder in folders], str(tmp_path / "page.html"))
    return Reader((tmp_path / "page.html").read_text())


def overview(reader: Reader) -> list[str]:
    """What is said to be missing or damaged."""
    return reader.text.partition("Overview")[2].partition("Losses")[0].splitlines()


def opened(folder: Path) -> Run:
    run = open_runs([find(str(folder))])[0]
    run.refresh()
    return run


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def watched(folder: Path) -> Watched:
    return Watched(open_runs([find(str(folder))])[0], 2.0, Clock())


def look(one: Watched) -> list[str]:
    """When it is time again."""
    one._clock.now += 10 + one.seconds_left
    return one.look()


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("name", "content"), DAMAGES.values(), ids=DAMAGES)
def test_damaged_records_are_left_out(tmp_path, name, content):
    folder = write_training(tmp_path / "run", target=100)
    (folder / name).write_text(content)
    reader = page_of(tmp_path, folder)
    assert f"{name} is damaged, and left out" in reader.text
    assert "stopped" in reader.text
    one = watched(folder)
    assert f"{name} is damaged, and left out" in look(one)
    assert one.run.numbers.last_step == 60


def test_a_damaged_run_file_leaves_the_log_to_tell_the_kind(tmp_path):
    write_log(tmp_path / "run", log_lines(3))
    (tmp_path / "run" / "run.yaml").write_text(DAMAGES["brackets"][1])
    assert find(str(tmp_path / "run")).kind == "train"


@pytest.mark.parametrize("content", ["[" * 200_000, "[" * 20_000 + "]" * 20_000])
@pytest.mark.parametrize("name", ["lease.json", "encoding.json", "step-00000060/config.yaml", "first_stage.json"])
def test_nested_records_of_any_kind_end_no_report(tmp_path, name, content):
    folder = write_encoded(tmp_path / "run") if name == "encoding.json" else write_training(tmp_path / "run")
    if name == "encoding.json":
        (folder / "manifest.json").unlink()
    (folder / "step-00000060").mkdir(exist_ok=True)
    (folder / "step-00000060" / "manifest.json").write_text(json.dumps({"images": "s3://images", "shards": []}))
    (folder / name).write_text(content)
    page_of(tmp_path, folder)


def test_counts_beyond_all_numbers_are_left_out(tmp_path):
    folder = write_encoded(tmp_path / "latents")
    for name in ("manifest.json", "00001.tar.receipt.json"):
        tree = json.loads((folder / name).read_text())
        tree.get("shards", [tree])[0]["bytes"] = 10**400
        (folder / name).write_text(json.dumps(tree))
    reader = page_of(tmp_path, folder)
    for name in ("manifest.json", "00001.tar.receipt.json"):
        assert f"{name} is damaged, and left out" in reader.text
    assert "Of 14 samples 8 were encoded" in reader.text


def test_what_is_wrong_with_a_receipt_is_told_for_as_long_as_it_is_there(tmp_path):
    folder = write_receipts(tmp_path / "latents", [0, 1])
    (folder / "00001.tar.receipt.json").write_text("[")
    run = opened(folder)
    assert len(run.problems) == 1
    write_receipts(folder, [2])
    run.refresh()
    assert len(run.problems) == 1
    assert "00001.tar.receipt.json is not JSON" in run.problems[0]
    write_receipts(folder, [1])
    run.refresh()
    assert (run.problems, run.encoded[0].samples) == ([], 12)


def _link(path: Path) -> None:
    path.symlink_to(path.name)


def _link_to_nowhere(path: Path) -> None:
    path.symlink_to("nowhere")


KINDS: dict[str, tuple[Callable[[Path], object], str]] = {
    "itself": (_link, "Too many levels of symbolic links"),
    "nowhere": (_link_to_nowhere, "a link to a file that is not there"),
    "folder": (Path.mkdir, "a folder, and no file"),
    "pipe": (os.mkfifo, "no file, but a pipe or a device"),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "run.yaml", "starts.json", "samples/step-00000030.png", "lease.json"]
)
def test_what_is_no_file_is_left_out_and_told(tmp_path, name, kind):
    make, said = KINDS[kind]
    folder = write_training(tmp_path / "run")
    (folder / name).unlink(missing_ok=True)
    make(folder / name)
    reader = page_of(tmp_path, folder)
    assert f"{name} is left out: {said}" in reader.text
    assert reader.text.count(name) == 1
    assert ("Learning rate" in reader.text) == (name != "metrics.jsonl")
    assert len(reader.all("img")) == (5 if "samples" in name else 6)
    one = watched(folder)
    assert f"{name} is left out: {said}" in look(one)
    look(one)
    assert f"{name} is left out: {said}" not in look(one)  # told once


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["manifest.json", "encoding.json", "rejects.jsonl", "00001.tar.receipt.json"])
def test_what_is_no_file_of_an_encode_job_is_left_out_and_told(tmp_path, name, kind):
    make, said = KINDS[kind]
    folder = write_encoded(tmp_path / "latents")
    (folder / name).unlink()
    make(folder / name)
    reader = page_of(tmp_path, folder)
    assert f"{name} is left out: {said}" in reader.text
    assert "samples" in reader.text


@contextmanager
def _as_another() -> Iterator[None]:
    """Not as root, who may read all."""
    us = os.geteuid()
    if us == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(us)


@pytest.fixture
def shared() -> Iterator[Path]:
    """A folder that others may look into, as pytest's are not."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o777)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    "name",
    ["metrics.jsonl", "run.yaml", "starts.json", "lease.json", "samples", "samples/step-00000030.png", "step-00000060"],
)
def test_what_others_may_not_read_is_left_out_and_told(shared, name):
    folder = write_training(shared / "run", target=100)
    report([str(folder)], str(shared / "page.html"))  # what is imported late, others may not read either
    if name == "lease.json":
        (folder / name).write_text('{"host": "elsewhere", "pid": 7, "counter": 3}')
    (folder / name).chmod(0)
    with _as_another():
        reader = page_of(shared, folder)
        one = watched(folder)
        news = look(one)
    (folder / name).chmod(0o700)
    if name.endswith(".png"):
        assert "1 cannot be read." in reader.text
        return
    told = [text for text in news if "Permission denied" in text]
    assert len(told) == 1
    assert name in told[0]
    assert told[0] in reader.text
    assert one.problem == ""


@pytest.mark.parametrize("name", ["manifest.json", "encoding.json", "rejects.jsonl", "00001.tar.receipt.json"])
def test_what_others_may_not_read_of_an_encode_job_is_left_out_and_told(shared, name):
    folder = write_encoded(shared / "latents")
    if name.startswith("0"):
        (folder / "manifest.json").unlink()
    report([str(folder)], str(shared / "page.html"))
    (folder / name).chmod(0)
    with _as_another():
        reader = page_of(shared, folder)
    assert f"{name} cannot be read, and is left out: Permission denied" in reader.text


def test_a_run_of_which_nothing_can_be_read_is_refused(shared):
    write_log(shared / "run", log_lines(3))
    page_of(shared, shared / "run")
    (shared / "run" / "metrics.jsonl").chmod(0)
    with _as_another(), pytest.raises(StorageError, match=r"metrics\.jsonl: Permission denied"):
        find(str(shared / "run"))
    (shared / "run").chmod(0)
    with _as_another(), pytest.raises(StorageError, match="run: Permission denied"):
        find(str(shared / "run"))
    (shared / "run").chmod(0o700)


def test_records_that_are_damaged_while_they_are_watched_stay_as_they_were(tmp_path):
    folder = write_training(tmp_path / "run", target=100)
    one = watched(folder)
    look(one)
    (folder / "starts.json").write_text("[")
    (folder / "run.yaml").write_text("[")
    look(one)
    assert (one.run.target, len(one.run.starts)) == (100, 1)
    (folder / "starts.json").write_text(json.dumps(STARTS))
    assert look(one) == []  # and it was not started again


def test_a_log_that_is_cut_and_grows_beyond_that_is_read_anew(tmp_path):
    """By logrotate's copytruncate, or where a file system gives a new file the number of the old one."""
    folder = write_training(tmp_path / "run", target=1000)
    one = watched(folder)
    look(one)
    anew = [line | {"step": line["step"] + 500} for line in log_lines(200)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in anew))
    look(one)
    assert (one.run.numbers.last_step, one.run.numbers.get("loss").steps[0]) == (700, 501)
    assert one.run.problems == []
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log_lines(5)))
    look(one)
    assert one.run.numbers.steps.tolist() == [1, 2, 3, 4, 5]
    (folder / "metrics.jsonl").unlink()
    os.mkfifo(folder / "metrics.jsonl")
    assert "metrics.jsonl is left out: no file, but a pipe or a device" in look(one)


def test_a_first_start_is_none_again(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "run.yaml").write_text("job: train\nsteps: 100\n")
    one = watched(folder)
    look(one)
    (folder / "starts.json").write_text(json.dumps(STARTS))
    write_log(folder, log_lines(3))
    assert not [text for text in look(one) if "started" in text]
    (folder / "starts.json").write_text(json.dumps([*STARTS, {**STARTS[0], "step": 3}]))
    assert "started again, from step 3" in look(one)


def test_a_log_of_an_older_version_that_is_started_again(tmp_path):
    folder = write_training(tmp_path / "run", target=100)
    (folder / "starts.json").unlink()
    one = watched(folder)
    look(one)
    (folder / "starts.json").write_text(json.dumps([{**STARTS[0], "step": 40}]))
    assert "started again, from step 40" in look(one)


@pytest.mark.parametrize("kind", KINDS)
def test_a_page_replaces_nothing_but_a_page(tmp_path, kind):
    folder = write_log(tmp_path / "run", log_lines(3)) or tmp_path / "run"
    page = tmp_path / "page.html"
    KINDS[kind][0](page)
    before = page.lstat()
    with pytest.raises(ConfigError, match="is there, and no file"):
        report([str(folder)], str(page))
    assert page.lstat().st_ino == before.st_ino


def test_a_name_with_a_line_end_stays_in_its_line(tmp_path):
    write_log(tmp_path / "run\nerror: all is lost", [{"step": 1, "time": NOW, "loss": 1.0}])
    said = report([str(tmp_path / "run\nerror: all is lost")], str(tmp_path / "page.html"))
    assert "\n" not in said
    assert r"run\nerror: all is lost" in said


def test_what_holds_no_run_is_told_with_all_that_is_there(tmp_path):
    (tmp_path / "run").mkdir()
    _link(tmp_path / "run" / "notes")
    with pytest.raises(DataError, match="is no run; it holds notes"):
        find(str(tmp_path / "run"))


@pytest.mark.timeout(30)
@pytest.mark.parametrize(("ours", "theirs"), [("0.2", ""), ("60", "0.2")])
def test_a_server_that_is_away_is_told_soon(tmp_path, monkeypatch, ours, theirs):
    for name, value in {
        "AWS_ENDPOINT_URL": "http://127.0.0.1:1",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
    }.items():
        monkeypatch.setenv(name, value)
    if theirs:
        monkeypatch.setenv("LATHE_STORAGE_RETRY_SECONDS", theirs)
    monkeypatch.setattr(finding, "_GIVE_UP_SECONDS", ours, raising=False)
    for run, output in (("s3://bucket/run", str(tmp_path / "page.html")), (str(tmp_path), "s3://bucket/page.html")):
        with pytest.raises(StorageError, match=r"S3 at http://127\.0\.0\.1:1 did not answer for") as refused:
            report([run], output)
        assert "AWS_ENDPOINT_URL" in refused.value.remedy


@pytest.mark.s3
def test_wrong_keys_are_told_at_the_start_and_while_it_is_watched(tmp_path, s3_url, monkeypatch):
    store = open_store(s3_url)
    folder = write_training(tmp_path / "run", target=100)
    for file in filter(Path.is_file, folder.rglob("*")):
        store.write(
            f"run/{str(file.relative_to(folder)).replace('metrics.jsonl', 'metrics/1.jsonl')}", file.read_bytes()
        )
    one = watched(f"{s3_url}/run")
    look(one)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(StorageError, match="refuses access") as refused:
        report([f"{s3_url}/run"], str(tmp_path / "page.html"))
    assert "AWS_SECRET_ACCESS_KEY" in refused.value.remedy
    assert "wrong" not in str(refused.value)
    (told,) = look(one)
    assert told.startswith("not read now: S3 at ")
    assert (one.run.numbers.last_step, one.run.target) == (60, 100)
