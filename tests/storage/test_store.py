from __future__ import annotations

import errno
import multiprocessing
import os
import re
import resource
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline.errors import StorageError
from pipeline.storage import Entry, Store, counters, fetch_folder, open_store, read_file, split, traffic


class TestEveryStore:
    def test_what_is_written_is_read(self, store: Store) -> None:
        for data in (b"", b"x", os.urandom(100_000)):
            assert store.write("deep/er/file.bin", data)
            assert store.read("deep/er/file.bin") == data
        assert store.write("view", memoryview(b"0123456789")[2:4])
        assert store.read("view") == b"23"

    @pytest.mark.parametrize(
        ("start", "end"), [(None, None), (0, 4), (3, 3), (3, None), (None, 2), (9, 10), (8, 99), (10, 12), (50, None)]
    )
    def test_ranges_cut_as_slices_do(self, store: Store, start: int | None, end: int | None) -> None:
        store.write("r", b"0123456789")
        assert store.read("r", start, end) == b"0123456789"[start:end]

    def test_a_range_that_ends_before_it_begins_is_a_bug(self, store: Store) -> None:
        with pytest.raises(ValueError, match="range"):
            store.read("r", 3, 2)

    def test_listing_is_sorted_recursive_and_by_prefix(self, store: Store) -> None:
        assert store.list() == []
        for name in ("b/2.bin", "a.bin", "b/1.bin", "b-side.bin"):
            store.write(name, name.encode())
        everything = [Entry("a.bin", 5), Entry("b-side.bin", 10), Entry("b/1.bin", 7), Entry("b/2.bin", 7)]
        assert store.list() == everything
        assert store.list("b") == everything[1:]
        assert store.list("b/") == everything[2:]
        assert store.list("b/2") == everything[3:]
        assert store.list("c/") == []

    def test_a_listing_goes_only_where_it_is_told(self, store: Store) -> None:
        for name in ("a/1", "a/b/2", "a/c/3", "ab/4", "d/5", "6"):
            store.write(name, b"")

        def names(prefix: str, *into: str) -> list[str]:
            return [entry.name for entry in store.list(prefix, into=lambda folder: folder in into)]

        assert names("") == ["6"]
        assert names("", "a", "a/c", "b") == ["6", "a/1", "a/c/3"]
        assert names("a/") == ["a/1"]
        assert names("a", "a", "ab", "d") == ["a/1", "ab/4"]

    def test_versions_tell_a_new_content(self, store: Store) -> None:
        store.write("x", b"old")
        (old,) = store.list()
        assert store.open("x").version == old.version != ""
        time.sleep(0.01)  # a file system's clock may be as coarse as that
        store.write("x", b"new")
        (new,) = store.list()
        assert new.version != old.version
        assert new == old, "versions take no part in comparisons"
        assert '"' not in new.version

    def test_an_open_file_is_read_in_ranges(self, store: Store) -> None:
        store.write("x", b"0123456789")
        file = store.open("x")
        assert file.size == 10
        for start, end in ((0, 4), (3, 3), (8, 99), (10, 12), (50, 60)):
            assert file.read(start, end) == b"0123456789"[start:end]
        file.close()

    def test_a_sweep_leaves_files_alone(self, store: Store) -> None:
        store.write("a/x", b"x")
        assert store.leftovers() == ()
        assert store.sweep(["a/x", "never", "no/such"]) == 0
        assert store.read("a/x") == b"x"
        with pytest.raises(StorageError, match="not a name inside"):
            store.sweep(["../x"])

    def test_bytes_and_requests_are_counted(self, store: Store, tmp_path: Path) -> None:
        before = counters()
        store.write("x", b"12345")
        store.read("x", 1, 3)
        store.download("x", tmp_path / "y")
        store.upload(tmp_path / "y", "z")
        store.open("x").read(0, 5)
        with pytest.raises(StorageError):
            store.read("missing")
        now = counters()
        grown = {name: now[name] - before[name] for name in ("retries", "read_bytes", "written_bytes")}
        assert grown == {"retries": 0, "read_bytes": 12, "written_bytes": 10}
        assert now["errors"] == before["errors"]
        for operation, least in {"read": 3, "write": 2}.items():
            requests = [counts["requests"].get(operation, 0) for counts in (before, now)]
            assert requests[1] - requests[0] >= least
            durations = now["request_seconds"][operation]
            assert durations["+Inf"] == requests[1]
            assert 0 < durations["sum"] < 60 * requests[1]
            assert sorted(durations[str(end)] for end in traffic.BOUNDS_SECONDS) == [
                durations[str(end)] for end in traffic.BOUNDS_SECONDS
            ]

    def test_a_file_is_made_once_where_it_must_be_absent(self, store: Store) -> None:
        assert store.write("claim", b"first", if_absent=True)
        assert not store.write("claim", b"second", if_absent=True)
        assert store.read("claim") == b"first"

    def test_one_of_many_threads_makes_the_file(self, store: Store) -> None:
        with ThreadPoolExecutor(8) as pool:
            won = list(pool.map(lambda i: store.write("claim", b"%d" % i, if_absent=True), range(8)))
        assert sum(won) == 1
        assert store.read("claim") == b"%d" % won.index(True)

    def test_threads_share_a_store(self, store: Store) -> None:
        def round_trip(i: int) -> bool:
            data = bytes([i]) * 50_000
            store.write(f"t/{i}", data)
            return store.read(f"t/{i}") == data and store.read(f"t/{i}", 10, 20) == data[10:20]

        with ThreadPoolExecutor(16) as pool:
            assert all(pool.map(round_trip, range(32)))
        assert len(store.list("t/")) == 32

    def test_exists_and_delete(self, store: Store) -> None:
        store.write("x/1", b"1")
        store.write("x/2", b"2")
        assert store.exists("x/1")
        assert not store.exists("x")
        store.delete(["x/1", "never"])
        assert [e.name for e in store.list()] == ["x/2"]
        store.delete([])

    def test_files_travel_both_ways(self, store: Store, tmp_path: Path) -> None:
        source = tmp_path / "source.bin"
        source.write_bytes(os.urandom(300_000))
        store.upload(source, "up/loaded")
        store.download("up/loaded", tmp_path / "new/folder/copy")
        assert (tmp_path / "new/folder/copy").read_bytes() == source.read_bytes()
        store.write("empty", b"")
        store.download("empty", tmp_path / "empty")
        assert (tmp_path / "empty").read_bytes() == b""

    def test_what_is_missing_is_named(self, store: Store, tmp_path: Path) -> None:
        for ask in (lambda: store.read("no/such"), lambda: store.download("no/such", tmp_path / "here")):
            with pytest.raises(StorageError, match="no/such: no such") as caught:
                ask()
            assert caught.value.remedy
        assert not (tmp_path / "here").exists()
        with pytest.raises(StorageError, match="not-here"):
            store.upload(tmp_path / "not-here", "x")

    @pytest.mark.parametrize(
        "name", ["../x", "a/../../x", "/etc/passwd", "", ".", "a//b", "a/", "a\0b", "a\nb", "..\\x"]
    )
    def test_names_stay_inside(self, store: Store, name: str, tmp_path: Path) -> None:
        for use in (
            lambda: store.read(name),
            lambda: store.write(name, b"bad"),
            lambda: store.exists(name),
            lambda: store.delete([name]),
            lambda: store.upload(Path(__file__), name),
        ):
            with pytest.raises(StorageError, match="not a name inside"):
                use()
        assert not (tmp_path / "x").exists()

    def test_a_listing_stays_inside(self, store: Store) -> None:
        for prefix in ("../", "/", "a/../../b"):
            with pytest.raises(StorageError, match="not a name inside"):
                store.list(prefix)

    def test_a_folder_is_fetched(self, store: Store, tmp_path: Path) -> None:
        with pytest.raises(StorageError):
            fetch_folder(store.url, tmp_path / "copy")
        store.write("config.json", b"{}")
        store.write("sub/weights", b"w")
        folder = fetch_folder(store.url, tmp_path / "copy")
        assert (folder / "sub/weights").read_bytes() == b"w"
        assert read_file(f"{store.url}/config.json") == b"{}"


class TestAddresses:
    @pytest.mark.parametrize(
        "url",
        ["gs://b/x", "http://h/x", "s3://", "s3:///x", "s3://b/../x", "s3://no spaces", "", "a\0b", "~nobody-here/x"],
    )
    def test_other_addresses_are_refused(self, url: str) -> None:
        with pytest.raises(StorageError):
            open_store(url)

    @pytest.mark.parametrize(
        ("url", "parts"),
        [
            ("s3://b/x/y.json", ("s3://b/x", "y.json")),
            ("s3://b/y", ("s3://b", "y")),
            ("/a/y", ("/a", "y")),
            ("/y", ("/", "y")),
            ("y", (".", "y")),
            ("a/y/", ("a", "y")),
        ],
    )
    def test_split(self, url: str, parts: tuple[str, str]) -> None:
        assert split(url) == parts

    @pytest.mark.parametrize("url", ["s3://b", "s3://b/", "/", "", "a/.."])
    def test_an_address_without_a_file(self, url: str) -> None:
        with pytest.raises(StorageError, match="names no file"):
            split(url)


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


class TestFolder:
    def test_only_files_are_listed(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_bytes(b"x")
        (tmp_path / "folder.tar").mkdir()
        (tmp_path / "gone.tar").symlink_to("nowhere")
        os.mkfifo(tmp_path / "pipe.tar")
        assert [entry.name for entry in open_store(str(tmp_path)).list()] == ["file"]

    @pytest.mark.parametrize("name", ["pipe", "zero"])
    def test_only_files_are_read(self, tmp_path: Path, name: str) -> None:
        os.mkfifo(tmp_path / "pipe")
        (tmp_path / "zero").symlink_to("/dev/zero")
        store = open_store(str(tmp_path))
        for read in (
            lambda: store.read(name),
            lambda: store.read(name, 0, 5),
            lambda: store.open(name),
            lambda: store.download(name, tmp_path / "copy"),
        ):
            with pytest.raises(StorageError, match=f"{name} is no file, but a pipe or a device"):
                read()

    def test_a_full_disk_leaves_the_old_file_and_nothing_else(self, tmp_path: Path) -> None:
        store = open_store(str(tmp_path))
        store.write("f", b"old")
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        try:
            with pytest.raises(StorageError, match=r"f: no room to write it .* MiB free") as caught:
                store.write("f", bytes(1_000_000))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert "free some disk space" in caught.value.remedy
        assert [p.name for p in tmp_path.iterdir()] == ["f"]
        assert store.read("f") == b"old"

    def test_a_writer_that_is_killed_leaves_a_whole_file(self, tmp_path: Path) -> None:
        code = (
            "import sys; from pipeline.storage import open_store; store = open_store(sys.argv[1])\n"
            "while True:\n  for c in b'ab': store.write('f', bytes([c]) * 3_000_000); print('.', flush=True)"
        )
        writer = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
        assert writer.stdout is not None
        for _ in range(3):
            writer.stdout.readline()
        writer.kill()
        writer.wait()
        store = open_store(str(tmp_path))
        assert store.read("f") in (b"a" * 3_000_000, b"b" * 3_000_000)
        assert store.list() == [Entry("f", 3_000_000)]  # what a killed writer leaves is not listed

    def test_what_a_killed_writer_left_is_swept(self, tmp_path: Path) -> None:
        code = (
            "import os, sys; from pathlib import Path; from pipeline.storage.whole_file import write_whole\n"
            "write_whole(Path(sys.argv[1]), lambda file: os.kill(os.getpid(), 9))"
        )
        names = ["a.tar", "a.tar.json", "deep/b", "n" * 250, "n" * 249 + "m", "é" * 120]
        for name in names:
            (tmp_path / name).parent.mkdir(exist_ok=True)
            assert subprocess.run([sys.executable, "-c", code, str(tmp_path / name)], check=False).returncode == -9
        (tmp_path / ".a.tar.mine.partial").touch()
        store = open_store(str(tmp_path))
        assert store.list() == []
        assert len(store.leftovers()) == len(names)
        assert any(re.fullmatch(r"deep/\.b\.[0-9a-f]{12}\.partial", name) for name in store.leftovers())
        assert open_store(str(tmp_path / "nowhere")).leftovers() == ()
        assert store.sweep(names, older_than_seconds=60) == 0
        for name in names:
            left = len(_files(tmp_path))
            assert store.sweep([name]) == 1
            assert len(_files(tmp_path)) == left - 1
        assert _files(tmp_path) == [tmp_path / ".a.tar.mine.partial"]
        assert store.leftovers() == ()

    def test_a_writer_that_is_swept_begins_anew(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        store, sync = open_store(str(tmp_path)), os.fsync
        left = iter(range(3))

        def sweep_then_sync(descriptor: int) -> None:
            if next(left, None) is not None:
                assert store.sweep(["x", "y"]) == 1
            sync(descriptor)

        monkeypatch.setattr(os, "fsync", sweep_then_sync)
        (tmp_path / "source").write_bytes(b"source")
        assert store.write("x", b"data")
        left = iter(range(3))
        assert store.write("y", b"data", if_absent=True)
        store.upload(tmp_path / "source", "x")
        assert store.read("x") == b"source"
        left = iter(range(4))
        with pytest.raises(StorageError, match="x: another process clears unfinished files") as caught:
            store.write("x", b"new")
        assert "other jobs" in caught.value.remedy
        assert sorted(p.name for p in tmp_path.iterdir()) == ["source", "x", "y"]  # and nothing unfinished

    @pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS])
    def test_without_hard_links_one_of_many_makes_the_file_too(self, tmp_path: Path, monkeypatch, number: int) -> None:
        def link(*_: object, **__: object) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "link", link)
        store = open_store(str(tmp_path))
        with ThreadPoolExecutor(8) as pool:
            won = list(pool.map(lambda i: store.write("claim", b"%d" % i, if_absent=True), range(8)))
        assert sum(won) == 1
        assert store.read("claim") == b"%d" % won.index(True)
        replace, left = Path.replace, iter(range(1))

        def swept(partial: Path, path: Path) -> Path:
            if next(left, None) is not None:
                assert store.sweep(["other"]) == 1
            return replace(partial, path)

        monkeypatch.setattr(Path, "replace", swept)
        assert store.write("other", b"whole", if_absent=True)
        assert store.read("other") == b"whole"
        assert sorted(path.name for path in tmp_path.iterdir()) == ["claim", "other"]

    def test_without_hard_links_a_writer_that_fails_leaves_what_another_wrote_meanwhile(
        self, tmp_path: Path, monkeypatch
    ) -> None:
        def link(*_: object, **__: object) -> None:
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))

        def fail(_: Path, path: Path) -> None:
            if path.name == "theirs":
                path.write_bytes(b"theirs")
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        monkeypatch.setattr(os, "link", link)
        monkeypatch.setattr(Path, "replace", fail)
        store = open_store(str(tmp_path))
        for name in ("theirs", "nobodys"):
            with pytest.raises(StorageError, match=name):
                store.write(name, b"ours", if_absent=True)
        assert store.read("theirs") == b"theirs"
        assert [path.name for path in tmp_path.iterdir()] == ["theirs"]

    def test_a_file_in_place_of_a_folder(self, tmp_path: Path) -> None:
        (tmp_path / "f").write_text("x")
        with pytest.raises(StorageError, match="f/"):
            open_store(str(tmp_path / "f")).write("x", b"")

    def test_emptied_folders_go(self, tmp_path: Path) -> None:
        store = open_store(str(tmp_path / "root"))
        store.write("a/b/c", b"")
        store.delete(["a/b/c"])
        assert list((tmp_path / "root").iterdir()) == []

    def test_files_have_the_usual_rights(self, tmp_path: Path) -> None:
        open_store(str(tmp_path)).write("f", b"")
        (tmp_path / "g").write_bytes(b"")
        assert (tmp_path / "f").stat().st_mode == (tmp_path / "g").stat().st_mode


def _child(url: str, answers: multiprocessing.SimpleQueue[bytes]) -> None:
    store = open_store(url)
    store.write("child", b"from the child")
    answers.put(store.read("parent"))


class TestProcesses:
    @pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
    def test_a_forked_child_makes_its_own_connections(self, s3_url: str) -> None:
        store = open_store(s3_url)
        store.write("parent", b"from the parent")
        fork = multiprocessing.get_context("fork")
        answers = fork.SimpleQueue()
        child = fork.Process(target=_child, args=(s3_url, answers))
        child.start()
        child.join(20)
        assert child.exitcode == 0
        assert answers.get() == b"from the parent"
        assert store.read("child") == b"from the child"

    def test_leaving_is_quick_and_quiet(self, s3_url: str, tmp_path: Path) -> None:
        code = (
            "import sys, os, time, logging, pathlib; logging.basicConfig(level=logging.INFO)\n"
            "from pipeline.storage import open_store\n"
            "store = open_store(sys.argv[1]); store.write('x', b'x'); assert store.read('x') == b'x'\n"
            "pid = os.fork()\n"
            "if pid: assert os.waitpid(pid, 0)[1] == 0\n"
            "else: store.read('x')\n"
            "if pid: pathlib.Path(sys.argv[2]).write_text(str(time.time()))\n"
        )
        stamp = tmp_path / "stamp"
        command = [sys.executable, "-W", "error", "-c", code, s3_url, str(stamp)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        ended = time.time()
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        assert ended - float(stamp.read_text()) < 2

    def test_a_folder_costs_no_s3_import(self, tmp_path: Path) -> None:
        code = (
            "import sys; from pipeline.storage import open_store; open_store(sys.argv[1]).write('x', b'')\n"
            "assert not {'s3fs', 'botocore', 'aiohttp'} & set(sys.modules)"
        )
        subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
