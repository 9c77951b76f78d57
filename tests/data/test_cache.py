from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import stat
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.context import SpawnProcess
from pathlib import Path

import cache_worker
import pytest
from cache_worker import SPAWN, content, name, opened

from pipeline.data.cache import BlockCache, block_name
from pipeline.data.cache_folder import CacheFolder, OldEntries
from pipeline.errors import ConfigError

KIB = 1 << 10
SECONDS = 60


def blocks(folder: Path) -> list[Path]:
    return [path for path in (folder / "lathe-blocks").glob("??/*") if path.is_file()]


def partial(folder: Path) -> list[Path]:
    return list((folder / "lathe-blocks" / "partial").iterdir())


def entry(folder: Path, number: int) -> Path:
    return folder / "lathe-blocks" / name(number)[:2] / name(number)


def held(folder: Path) -> int:
    return sum(path.stat().st_size for path in blocks(folder))


def used(folder: Path) -> int:
    with CacheFolder(folder).ledger() as ledger:
        return ledger.used


def fill(cache: BlockCache, numbers: range, size: int = KIB) -> None:
    for number in numbers:
        cache.put(name(number), content(number, size))


def kept(cache: BlockCache, numbers: range, size: int = KIB) -> set[int]:
    return {number for number in numbers if cache.get(name(number), size) == content(number, size)}


def age(folder: Path, numbers: range, seconds: float) -> None:
    """As if last used so long ago; a larger number a little later."""
    for number in numbers:
        moment = time.time() - seconds + number / 1000
        os.utime(entry(folder, number), (moment, moment))


def epoch(cache: BlockCache, seed: int, count: int) -> int:
    """Read all blocks in a random order, and keep what was not there; the hits."""
    order = random.Random(seed).sample(range(count), count)
    hits = 0
    for number in order:
        if cache.get(name(number), KIB) is None:
            cache.put(name(number), content(number, KIB))
        else:
            hits += 1
    return hits


def process(work: Callable[..., None], *arguments: object) -> SpawnProcess:
    """A fresh one, that ends with the tests at the latest."""
    return SPAWN.Process(target=work, args=arguments, daemon=True)


class TestEntries:
    def test_a_block_comes_back_in_this_process_and_the_next_run(self, tmp_path: Path) -> None:
        cache = opened(tmp_path / "new" / "cache", KIB * KIB)
        assert cache.get(name(1), 5) is None
        cache.put(name(1), b"bytes")
        cache.put(name(2), memoryview(b"views are taken too")[:5])
        for here in (cache, BlockCache(tmp_path / "new" / "cache", KIB * KIB)):
            assert (here.get(name(1), 5), here.get(name(2), 5)) == (b"bytes", b"views")
        assert used(tmp_path / "new" / "cache") == 10

    def test_nothing_is_for_other_users_and_nothing_lies_beside_the_own_folder(self, tmp_path: Path) -> None:
        (tmp_path / "foreign").write_bytes(b"x")
        cache = opened(tmp_path, KIB * KIB)
        fill(cache, range(3))
        assert sorted(path.name for path in tmp_path.iterdir()) == ["foreign", "lathe-blocks"]
        for path in (tmp_path / "lathe-blocks").rglob("*"):
            assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600)
        assert not partial(tmp_path)

    def test_names_are_digests_whatever_the_receipt_says(self) -> None:
        odd = [("../../etc/passwd", 0, 1), ("", 0, 1), ("a", 0, 1), ("a", 1, 0), ("a", 0, 11), ("a", 0, 1 << 60)]
        names = [block_name(*place) for place in odd]
        assert len(set(names)) == len(odd)
        assert all(len(n) == 40 and set(n) <= set("0123456789abcdef") for n in names)

    @pytest.mark.parametrize("bad", ["../../../x", "", "ab", "A" * 40, "0" * 39 + "\n", "0" * 40 + "\n", "/" * 40])
    def test_no_other_name_reaches_the_disk(self, tmp_path: Path, bad: str) -> None:
        cache = opened(tmp_path, KIB)
        for call in (lambda: cache.put(bad, b"x"), lambda: cache.get(bad, 1), lambda: cache.drop(bad)):
            with pytest.raises(ValueError, match="block_name"):
                call()
        assert not blocks(tmp_path)

    def test_changed_bytes_are_for_the_caller_to_find_and_to_drop(self, tmp_path: Path) -> None:
        cache = opened(tmp_path, KIB * KIB)
        cache.put(name(1), b"sound")
        entry(tmp_path, 1).write_bytes(b"wrong")
        assert cache.get(name(1), 5) == b"wrong"
        cache.drop(name(1))
        cache.drop(name(1))
        assert cache.get(name(1), 5) is None
        assert used(tmp_path) == 0
        cache.put(name(1), b"sound")
        assert cache.get(name(1), 5) == b"sound"

    @pytest.mark.parametrize("wrong", [b"", b"cut", b"much longer"])
    def test_what_is_not_of_its_length_makes_way(self, tmp_path: Path, wrong: bytes) -> None:
        cache = opened(tmp_path, KIB * KIB)
        cache.put(name(1), b"sound")
        entry(tmp_path, 1).write_bytes(wrong)
        assert cache.get(name(1), 5) is None
        cache.put(name(1), b"sound")
        assert cache.get(name(1), 5) == b"sound"

    def test_links_and_pipes_are_neither_followed_nor_waited_for(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        cache = opened(tmp_path / "cache", KIB * KIB)
        victim = tmp_path / "victim"
        victim.write_bytes(b"secret")
        entry(tmp_path / "cache", 1).symlink_to(victim)
        entry(tmp_path / "cache", 2).symlink_to(tmp_path / "nowhere")
        os.mkfifo(entry(tmp_path / "cache", 3))
        entry(tmp_path / "cache", 4).mkdir()
        for number in (1, 2, 3, 4):
            cache.put(name(number), b"blocks")
            assert cache.get(name(number), 6) is None
        for number in (1, 2, 3, 4):
            cache.put(name(number), b"blocks")
        assert [cache.get(name(number), 6) for number in (1, 2, 3)] == [b"blocks"] * 3
        assert cache.get(name(4), 6) is None
        assert victim.read_bytes() == b"secret"
        assert not (tmp_path / "nowhere").exists()
        assert len(caplog.messages) == 1, "the folder in a block's place, once"


class TestOpening:
    @pytest.mark.parametrize("place", ["lathe-blocks", "lathe-blocks/partial", "lathe-blocks/3f"])
    def test_a_folder_that_is_a_link_is_refused(self, tmp_path: Path, place: str) -> None:
        (tmp_path / "elsewhere").mkdir()
        link = tmp_path / "cache" / place
        link.parent.mkdir(parents=True)
        link.symlink_to(tmp_path / "elsewhere")
        with pytest.raises(ConfigError, match=r"loader\.cache=.*no folder of this user's own"):
            BlockCache(tmp_path / "cache", KIB)
        assert not list((tmp_path / "elsewhere").iterdir())

    def test_the_ledger_is_no_link_either(self, tmp_path: Path) -> None:
        (tmp_path / "victim").write_bytes(b"secret")
        (tmp_path / "lathe-blocks").mkdir()
        (tmp_path / "lathe-blocks" / "ledger").symlink_to(tmp_path / "victim")
        with pytest.raises(ConfigError, match="ledger"):
            BlockCache(tmp_path, KIB)
        assert (tmp_path / "victim").read_bytes() == b"secret"

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
    def test_another_users_folder_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "lathe-blocks").mkdir()
        os.chown(tmp_path / "lathe-blocks", 12345, 12345)
        with pytest.raises(ConfigError, match="this user's own"):
            BlockCache(tmp_path, KIB)

    def test_where_no_folder_can_be_the_error_says_why(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_bytes(b"")
        with pytest.raises(ConfigError, match=r"loader\.cache=.*Not a directory"):
            BlockCache(tmp_path / "file" / "cache", KIB)
        with pytest.raises(ConfigError, match="no local folder"):
            BlockCache("s3://bucket/cache", KIB)
        with pytest.raises(ConfigError, match=r"'a\\x00b' is no local folder"):
            BlockCache("a\0b", KIB)

    def test_it_waits_for_nothing(self, tmp_path: Path) -> None:
        """The scan is held up by the ledger's lock, as a million entries would; the first batch does not notice."""
        fill(opened(tmp_path, KIB * KIB), range(3))
        with CacheFolder(tmp_path).ledger():
            began = time.monotonic()
            cache = BlockCache(tmp_path, KIB * KIB)
            assert kept(cache, range(3)) == {0, 1, 2}
            fill(cache, range(3, 6))
            assert time.monotonic() - began < 2
            assert cache.scan.is_alive()
            assert len(blocks(tmp_path)) == 3
        cache.scan.join(SECONDS)
        fill(cache, range(3, 6))
        assert kept(cache, range(6)) == set(range(6))

    def test_foreign_files_are_left_alone(self, tmp_path: Path) -> None:
        fill(opened(tmp_path, 3 * KIB), range(3))
        foreign = [tmp_path / "lathe-blocks" / place for place in ("notes", "00/notes", "partial/notes")]
        for path in foreign:
            path.write_bytes(b"x" * 5000)
        cache = opened(tmp_path, 3 * KIB)
        age(tmp_path, range(3), 100)
        fill(cache, range(3, 9))
        assert used(tmp_path) == 3 * KIB
        assert all(path.read_bytes() == b"x" * 5000 for path in foreign)

    @pytest.mark.parametrize("ledger", [b"", b"\xff" * 16, b"\x7f" * 16, b"short", b"much longer than it is"])
    def test_a_damaged_ledger_is_counted_anew(self, tmp_path: Path, ledger: bytes) -> None:
        fill(opened(tmp_path, 9 * KIB), range(3))
        (tmp_path / "lathe-blocks" / "ledger").write_bytes(ledger)
        cache = opened(tmp_path, 9 * KIB)
        assert used(tmp_path) == 3 * KIB
        fill(cache, range(3, 12))
        assert held(tmp_path) == 9 * KIB


class TestLimit:
    def test_a_full_cache_holds_what_it_has(self, tmp_path: Path) -> None:
        cache = opened(tmp_path, 100 * KIB)
        hits = [epoch(cache, seed, 200) for seed in range(4)]
        assert hits == [0, 100, 100, 100]
        assert held(tmp_path) == used(tmp_path) == 100 * KIB

    def test_a_run_that_is_resumed_keeps_hitting(self, tmp_path: Path) -> None:
        """Else each miss would cost an entry that this epoch has yet to read: 15 of 100 hits, not nearly 50."""
        cache = opened(tmp_path, 100 * KIB)
        epoch(cache, 0, 200)
        for number in range(200):
            if entry(tmp_path, number).exists():
                age(tmp_path, range(number, number + 1), 1000)
        assert epoch(opened(tmp_path, 100 * KIB), 1, 200) >= 90

    def test_entries_of_other_data_go_oldest_first(self, tmp_path: Path) -> None:
        fill(opened(tmp_path, 10 * KIB), range(10))
        age(tmp_path, range(10), 1000)
        cache = opened(tmp_path, 10 * KIB)
        fill(cache, range(100, 104))
        assert {n for n in range(10) if entry(tmp_path, n).exists()} == set(range(4, 10))
        fill(cache, range(104, 120))
        assert kept(cache, range(100, 120)) == set(range(100, 110))
        assert held(tmp_path) == used(tmp_path) == 10 * KIB

    def test_what_is_of_use_stays_and_so_does_what_is_newer(self, tmp_path: Path) -> None:
        fill(opened(tmp_path, 10 * KIB), range(10))
        age(tmp_path, range(10), 1000)
        cache = opened(tmp_path, 10 * KIB)
        assert kept(cache, range(3, 4)) == {3}
        fill(cache, range(100, 120))
        assert kept(cache, range(120)) == {*range(3, 10), 100, 101, 102}

    def test_a_use_elsewhere_counts_too(self, tmp_path: Path) -> None:
        fill(opened(tmp_path, 4 * KIB), range(4))
        age(tmp_path, range(4), 1000)
        one, other = opened(tmp_path, 4 * KIB), opened(tmp_path, 4 * KIB)
        assert kept(other, range(2)) == {0, 1}
        fill(one, range(100, 110))
        assert kept(one, range(110)) == {0, 1, 100, 101}

    def test_uses_are_marked_once(self, tmp_path: Path) -> None:
        fill(opened(tmp_path, 4 * KIB), range(1))
        age(tmp_path, range(1), 1000)
        cache, began = opened(tmp_path, 4 * KIB), time.time()
        kept(cache, range(1))
        marked = entry(tmp_path, 0).stat().st_mtime_ns
        assert abs(marked / 1e9 - began) < SECONDS
        time.sleep(0.05)
        kept(cache, range(1))
        assert entry(tmp_path, 0).stat().st_mtime_ns == marked
        age(tmp_path, range(1), 2 * 3600)
        kept(cache, range(1))
        assert entry(tmp_path, 0).stat().st_mtime_ns > marked

    def test_a_smaller_limit_than_before_is_kept_from_the_opening_on(self, tmp_path: Path) -> None:
        fill(opened(tmp_path, 2000 * KIB), range(1500))
        age(tmp_path, range(1500), 1000)
        cache = opened(tmp_path, 10 * KIB)
        assert held(tmp_path) == used(tmp_path) == 10 * KIB
        assert kept(cache, range(1500)) == set(range(1490, 1500))

    def test_a_block_larger_than_the_limit_is_told_once(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        fill(opened(tmp_path, KIB), range(1))
        age(tmp_path, range(1), 1000)
        cache = opened(tmp_path, KIB)
        fill(cache, range(1, 4), KIB + 1)
        assert kept(cache, range(4)) == {0}
        assert [m for m in caplog.messages if "may hold 1024 bytes, and a block has 1025" in m] == caplog.messages
        assert len(caplog.messages) == 1


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """Of 4 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("nothing may be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


class TestDisks:
    def test_the_disks_last_part_is_left_free(self, disk: Path, caplog: pytest.LogCaptureFixture) -> None:
        cache = opened(disk, 1 << 30)
        fill(cache, range(80), 64 * KIB)
        assert len(caplog.messages) == 1
        assert "hardly any disk space left" in caplog.text
        free = os.statvfs(disk)
        assert (4 << 20) / 20 <= free.f_bavail * free.f_frsize < (4 << 20) / 20 + 2 * 64 * KIB
        age(disk, range(1), 1000)
        cache = opened(disk, 1 << 30)
        fill(cache, range(100, 110), 64 * KIB)
        assert not entry(disk, 0).exists(), "old entries make room on the disk too"
        assert entry(disk, 100).exists()

    def test_a_disk_that_fills_up_in_the_middle_of_a_write_is_told_once(
        self, disk: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Somebody else takes the room between the look and the write."""
        cache = opened(disk, 1 << 30)
        fill(cache, range(1), 64 * KIB)
        with monkeypatch.context() as patch:
            patch.setattr(CacheFolder, "free_bytes", lambda _: 1 << 30)
            fill(cache, range(1, 5), 3 << 20)
        assert [len(caplog.messages), "No space left" in caplog.text] == [1, True]
        fill(cache, range(5, 6), 64 * KIB)
        assert kept(cache, range(1, 5), 3 << 20) == {1}
        assert not entry(disk, 5).exists(), "for a minute nothing is tried"
        assert not partial(disk)
        assert used(disk) == held(disk)
        monkeypatch.setattr("pipeline.data.cache.time.monotonic", lambda: 1e12)
        cache.drop(name(1))
        fill(cache, range(1, 3), 64 * KIB)
        assert kept(cache, range(5), 64 * KIB) == {0, 1, 2}, "it is tried again later"

    def test_a_disk_that_becomes_read_only_still_serves(self, disk: Path, caplog: pytest.LogCaptureFixture) -> None:
        fill(opened(disk, 1 << 20), range(3))
        age(disk, range(3), 1000)
        cache = opened(disk, 1 << 20)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        assert kept(cache, range(3)) == {0, 1, 2}
        fill(cache, range(3, 6))
        assert [len(caplog.messages), "Read-only file system" in caplog.text] == [1, True]
        assert cache.get(name(0), 5) is None
        with pytest.raises(ConfigError, match=r"loader\.cache=.*Read-only file system"):
            BlockCache(disk, KIB)

    def test_a_file_size_limit_stops_a_write_in_the_middle(self, tmp_path: Path) -> None:
        writer = process(cache_worker.put_with_small_files_only, tmp_path, tmp_path / "log")
        writer.start()
        writer.join(SECONDS)
        assert writer.exitcode == 0
        assert (tmp_path / "log").read_text().count("File too large") == 1
        assert not blocks(tmp_path)
        assert not partial(tmp_path)
        assert used(tmp_path) == 0

    def test_a_folder_that_is_deleted_is_done_without(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        cache = opened(tmp_path / "cache", KIB * KIB)
        fill(cache, range(3))
        shutil.rmtree(tmp_path / "cache")
        assert kept(cache, range(3)) == set()
        fill(cache, range(6))
        cache.drop(name(1))
        assert not (tmp_path / "cache").exists()
        assert len(caplog.messages) == 2  # put, drop
        fill(opened(tmp_path / "cache", KIB * KIB), range(6))
        assert kept(cache, range(6)) == set(range(6))

    def test_too_many_open_files_cost_a_block_and_not_the_run(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        cache = opened(tmp_path, KIB * KIB)
        fill(cache, range(2))

        def refuse(*_: object, **__: object) -> int:
            raise OSError(24, os.strerror(24))

        with monkeypatch.context() as patch:
            patch.setattr(os, "open", refuse)
            assert kept(cache, range(2)) == set()
            fill(cache, range(2, 4))
        assert kept(cache, range(4)) == {0, 1}
        assert len(caplog.messages) == 2


@pytest.mark.alone
class TestProcesses:
    def test_the_same_blocks_at_once_are_kept_once(self, tmp_path: Path) -> None:
        start = SPAWN.Barrier(4)
        writers = [process(cache_worker.put_the_same, tmp_path, start, 100 * KIB) for _ in range(4)]
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join(SECONDS)
        assert [writer.exitcode for writer in writers] == [0] * 4
        assert kept(BlockCache(tmp_path, 1 << 30), range(20), 100 * KIB) == set(range(20))
        assert used(tmp_path) == held(tmp_path) == 20 * 100 * KIB
        assert not partial(tmp_path)

    def test_eight_ranks_of_sixteen_threads_stay_within_the_limit(self, tmp_path: Path) -> None:
        limit, start = 500 * KIB, SPAWN.Barrier(8)
        ranks = [process(cache_worker.hammer, tmp_path, start, limit, seed) for seed in range(8)]
        for rank in ranks:
            rank.start()
        largest = 0
        while any(rank.is_alive() for rank in ranks):
            with CacheFolder(tmp_path).ledger():  # nothing is added or removed meanwhile
                sizes = [path.lstat().st_size for path in blocks(tmp_path)]
            largest = max(largest, sum(sizes))
            time.sleep(0.02)
        assert [rank.exitcode for rank in ranks] == [0] * 8
        assert limit * 0.8 < largest <= limit
        assert used(tmp_path) == held(tmp_path)
        assert not partial(tmp_path)

    def test_what_a_killed_writer_leaves_is_swept_and_its_room_is_free_again(self, tmp_path: Path) -> None:
        in_the_middle = SPAWN.Event()
        writer = process(cache_worker.stop_in_the_middle, tmp_path, in_the_middle, None)
        writer.start()
        writer.join(SECONDS)
        assert writer.exitcode == -9
        assert [len(partial(tmp_path)), used(tmp_path)] == [1, 1999]
        cache = opened(tmp_path, KIB * KIB)
        assert [partial(tmp_path), blocks(tmp_path), used(tmp_path)] == [[], [], 0]
        fill(cache, range(1), 1999)
        assert kept(cache, range(1), 1999) == {0}

    def test_a_writer_that_lives_is_never_swept(self, tmp_path: Path) -> None:
        in_the_middle, go_on = SPAWN.Event(), SPAWN.Event()
        writer = process(cache_worker.stop_in_the_middle, tmp_path, in_the_middle, go_on)
        writer.start()
        assert in_the_middle.wait(SECONDS)
        cache = opened(tmp_path, KIB * KIB)
        assert len(partial(tmp_path)) == 1
        assert kept(cache, range(1), 1999) == set(), "half a block is no block"
        go_on.set()
        writer.join(SECONDS)
        assert writer.exitcode == 0
        assert kept(cache, range(1), 1999) == {0}
        assert not partial(tmp_path)

    def test_a_reader_keeps_its_bytes_while_the_entry_goes(self, tmp_path: Path) -> None:
        cache = opened(tmp_path, KIB * KIB)
        stop = threading.Event()

        def come_and_go() -> None:
            other = opened(tmp_path, KIB * KIB)
            while not stop.is_set():
                fill(other, range(5), 50 * KIB)
                for number in range(5):
                    other.drop(name(number))

        thread = threading.Thread(target=come_and_go)
        thread.start()
        expected = [content(number, 50 * KIB) for number in range(5)]
        hits, misses, end = 0, 0, time.monotonic() + SECONDS
        try:
            while min(hits, misses) < 200:
                assert time.monotonic() < end
                number = (hits + misses) % 5
                data = cache.get(name(number), 50 * KIB)
                assert data is None or data == expected[number]
                hits, misses = hits + (data is not None), misses + (data is None)
        finally:
            stop.set()
            thread.join(SECONDS)

    @pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
    def test_forks_in_the_middle_of_writes_neither_hang_nor_break_the_count(self, tmp_path: Path) -> None:
        cache, fork = opened(tmp_path, KIB * KIB), multiprocessing.get_context("fork")
        stop = threading.Event()

        def write(first: int) -> None:
            while not stop.is_set():
                for number in range(first, first + 5):
                    cache.put(name(number), content(number, KIB))
                    cache.drop(name(number))

        threads = [threading.Thread(target=write, args=(first,)) for first in (0, 10, 20)]
        for thread in threads:
            thread.start()
        try:
            for child in range(10):
                forked = fork.Process(target=fill, args=(cache, range(100 + 10 * child, 110 + 10 * child)), daemon=True)
                forked.start()
                forked.join(SECONDS)
                assert forked.exitcode == 0
        finally:
            stop.set()
            for thread in threads:
                thread.join(SECONDS)
        assert kept(cache, range(100, 200)) == set(range(100, 200))
        assert used(tmp_path) == held(tmp_path) == 100 * KIB

    def test_the_lock_is_free_again_while_a_fork_still_has_its_file(self, tmp_path: Path) -> None:
        cache = opened(tmp_path, KIB * KIB)
        with CacheFolder(tmp_path).ledger():
            child = os.fork()
            if not child:
                time.sleep(SECONDS)
                os._exit(0)
        try:
            began = time.monotonic()
            fill(cache, range(1))
            assert time.monotonic() - began < SECONDS / 2
        finally:
            os.kill(child, 9)
            os.waitpid(child, 0)

    def test_a_run_that_joins_counts_what_is_written_while_it_lists(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first = opened(tmp_path, 10 * KIB)
        fill(first, range(3))
        listed = CacheFolder.entries

        def entries(folder: CacheFolder) -> tuple[int, OldEntries]:
            found = listed(folder)
            fill(first, range(3, 6))
            return found

        monkeypatch.setattr(CacheFolder, "entries", entries)
        joined = opened(tmp_path, 10 * KIB)
        assert used(tmp_path) == held(tmp_path) == 6 * KIB
        fill(joined, range(6, 20))
        assert held(tmp_path) == 10 * KIB

    def test_a_run_that_joins_counts_no_less_than_there_is(self, tmp_path: Path) -> None:
        """What is written during the listing may count twice, so the limit holds."""
        first = opened(tmp_path, 300 * KIB)
        fill(first, range(100))
        writer = threading.Thread(target=fill, args=(first, range(100, 600)))
        writer.start()
        caches = [opened(tmp_path, 300 * KIB) for _ in range(10)]
        writer.join(SECONDS)
        for cache in caches:
            fill(cache, range(600, 700))
        assert held(tmp_path) <= 301 * KIB
