"""Blocks whose bytes are as they were written, by their checksum, but are not what the manifest says."""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from latent_shards import write_latents
from loader_runs import digests, load, loader

from pipeline.data import fetch
from pipeline.data.batch import Batch
from pipeline.data.fetch import BlockReference
from pipeline.data.fold import content_hash
from pipeline.data.latent_block import LatentBlock
from pipeline.data.loader import LatentLoader
from pipeline.data.manifest import RECEIPT_SUFFIX, ShardEntry
from pipeline.data.tar import TarBuilder, members, npy_bytes
from pipeline.errors import DataError

Members = list[tuple[str, bytes]]
Change = Callable[[Members], Members]

SHARD, BLOCK = "00003.tar", 2
KEYS = [f"00003/{i:04d}" for i in range(16, 24)]  # of that block
PLACE = r"00003\.tar: samples 16 to 23 \(bytes \d+ to \d+\): "
SKIPPED = [[0, 3, BLOCK, 8]]
STEPS = 18  # two epochs


@pytest.fixture
def latents(tmp_path: Path) -> str:
    return write_latents(tmp_path, [(20, 3), (0, 0), (1, 0), (33, 4), (0, 2), (16, 1)], captions=3)


def rewrite(url: str, change: Change) -> str:
    """Write a block anew, with the shard, receipt and manifest that tell of it; returns the manifest's address."""
    folder = Path(url).parent
    data, receipt = (folder / SHARD).read_bytes(), json.loads((folder / (SHARD + RECEIPT_SUFFIX)).read_bytes())
    block = receipt["blocks"][BLOCK]
    start, end = block["offset"], block["offset"] + block["length"]
    tar, old = TarBuilder(), data[start:end]
    for name, content in change([(name, old[at : at + size]) for name, at, size in members(old)]):
        tar.add(name, content)
    new = bytes(tar.finish()[:-1024])
    for later in receipt["blocks"][BLOCK + 1 :]:
        later["offset"] += len(new) - len(old)
    block |= {"length": len(new), "crc32": zlib.crc32(new)}
    whole = data[:start] + new + data[end:]
    about = {"bytes": len(whole), "sha256": hashlib.sha256(whole).hexdigest()}
    manifest = json.loads(Path(url).read_bytes())
    manifest["shards"][3] |= about
    manifest["content_hash"] = content_hash([ShardEntry.model_validate(shard) for shard in manifest["shards"]])
    (folder / SHARD).write_bytes(whole)
    (folder / (SHARD + RECEIPT_SUFFIX)).write_text(json.dumps(receipt | about))
    Path(url).write_text(json.dumps(manifest))  # in another layout than Lathe's own, which is as good
    return url


def without(*names: str) -> Change:
    return lambda found: [(name, data) for name, data in found if not name.endswith(names)]


def instead(ending: str, array: np.ndarray | bytes) -> Change:
    data = array if isinstance(array, bytes) else npy_bytes(array)
    return lambda found: [(name, data if name.endswith(ending) else old) for name, old in found]


def by_kind(found: Members) -> Members:
    return sorted(found, key=lambda member: member[0].partition(".")[2])


def one_more(found: Members) -> Members:
    return found + [(name.replace("0023.", "0099."), data) for name, data in found if "/0023." in name]


MALFORMED: dict[str, tuple[Change, str]] = {
    "members of a sample apart": (by_kind, "48 samples in place of 8"),
    "no latent": (without("0019.latent.npy"), "sample '00003/0019' is not whole: it has only json, size.npy"),
    "no caption": (without("0016.tokens1.clip.npy"), "sample '00003/0016' is not whole"),
    "no JSON anywhere": (without(".json"), "sample '00003/0016' is not whole"),
    "a sample less": (without(*(f"0023.{end}" for end in ("npy", "json", "latent.npy"))), "is not whole"),
    "no sample": (lambda found: [("README", bytes(9999))], "0 samples in place of 8"),
    "a sample more": (one_more, "9 samples in place of 8"),
    "a sample twice": (lambda found: found + found[-6:], "is there twice"),
    "another shape": (
        instead("0018.latent.npy", np.zeros((4, 2, 3), np.float16)),
        r"sample '00003/0018' holds float16 \[4, 2, 3\] where the manifest says float16 \[4, 2, 2\]",
    ),
    "another shape everywhere": (instead("latent.npy", np.zeros((4, 3, 2), np.float16)), r"float16 \[4, 3, 2\] where"),
    "another type": (instead("0023.latent.npy", np.zeros((4, 2, 2), np.float32)), r"'00003/0023' holds float32"),
    "another type of tokens": (instead("0017.tokens2.clip.npy", np.zeros(4, np.int32)), "holds int32"),
    "no array": (instead("0020.size.npy", b"\x93NUMPY"), "an array could not be read"),
}
CASES = pytest.mark.parametrize(("change", "message"), MALFORMED.values(), ids=MALFORMED)


def lost(batch: Batch) -> list[str]:
    return [key for key in batch.keys if key in KEYS]


@CASES
def test_it_is_named_in_the_step_that_needs_it(latents: str, change: Change, message: str) -> None:
    sound = load(latents, STEPS)
    first = next(batch.step for batch in sound if lost(batch))
    rewrite(latents, change)
    before = threading.active_count()
    with loader(latents) as opened:
        assert digests([list(islice(opened, first))]) == digests([sound[:first]])
        with pytest.raises(DataError, match=PLACE + f".*({message})") as told:
            next(opened)
        assert threading.active_count() == before
        assert list(opened) == []
    assert "lathe verify" in told.value.remedy
    assert "\n" not in told.value.message


def skipping(url: str, steps: int, **how: Any) -> tuple[list[Batch], list[list[int]]]:
    """Batches, and what was skipped on the way."""
    with loader(url, on_damage="skip", max_skip_rate=0.2, **how) as opened:
        batches = list(islice(opened, steps))
    return batches, opened.skipped


@CASES
def test_it_may_be_skipped(latents: str, caplog: pytest.LogCaptureFixture, change: Change, message: str) -> None:
    """The other samples keep their places and bytes."""
    sound = load(latents, STEPS)
    batches, skipped = skipping(rewrite(latents, change), STEPS)
    assert skipped == SKIPPED
    (line,) = caplog.messages
    assert re.search(f"{PLACE}.*({message}).*; its 8 samples are skipped", line)
    for whole, batch in zip(sound, batches, strict=True):
        assert batch.keys == ["" if key in KEYS else key for key in whole.keys]
        weight = torch.tensor([float(key not in KEYS) for key in whole.keys])
        assert torch.equal(batch.weight, weight)
        assert torch.equal(batch.moments, whole.moments * weight.half().reshape(-1, 1, 1, 1))
        tokens = batch.text["clip"].tokens
        assert torch.equal(tokens, whole.text["clip"].tokens * weight.long().reshape(-1, 1))


@pytest.mark.parametrize("name", ["members of a sample apart", "another type"])
def test_all_ranks_skip_it_alike_at_any_world_size(latents: str, name: str) -> None:
    rewrite(latents, MALFORMED[name][0])
    expected = digests([skipping(latents, STEPS, workers=0)[0]])
    for world in (1, 2, 8):
        ranks = [skipping(latents, STEPS, rank=rank, world_size=world) for rank in range(world)]
        assert digests([batches for batches, _ in ranks]) == expected
        for batches, skipped in ranks:
            needed = any(0.0 in batch.weight for batch in batches)
            assert skipped in ([SKIPPED] if needed else [[], SKIPPED])  # it may be met ahead of its step


@pytest.mark.parametrize("workers", [0, 3])
@pytest.mark.parametrize("name", ["no latent", "another shape"])
def test_too_many_fail_the_run_all_the_same(latents: str, name: str, workers: int) -> None:
    change, message = MALFORMED[name]
    rewrite(latents, change)
    load(latents, STEPS, on_damage="skip", max_skip_rate=0.115, workers=workers)  # 8 of 70 samples are 0.114
    with pytest.raises(DataError, match=PLACE + rf".*{message}.*; with it 8 of 70 samples .*max_skip_rate=0\.11 "):
        load(latents, STEPS, on_damage="skip", max_skip_rate=0.11, workers=workers)
    with pytest.raises(DataError, match="with it 12 of 70 samples"):
        load(latents, STEPS, on_damage="skip", max_skip_rate=0.115, skipped=[[0, 0, 0, 4]], workers=workers)


def test_a_run_that_goes_on_skips_it_without_reading_it(latents: str) -> None:
    rewrite(latents, MALFORMED["a sample more"][0])
    skip: dict[str, Any] = {"on_damage": "skip", "max_skip_rate": 0.2, "workers": 0}
    expected = digests([load(latents, STEPS, **skip)])
    with loader(latents, **skip) as opened:
        before = list(islice(opened, 11))
        state = opened.state_dict()
    assert state == {"step": 11, "skipped": SKIPPED}
    with loader(latents, start_step=11, skipped=state["skipped"], workers=0) as opened:
        assert digests([before]) + digests([list(islice(opened, STEPS - 11))]) == expected


def test_what_is_kept_on_disk_is_not_taken_for_sound(tmp_path: Path, latents: str) -> None:
    rewrite(latents, MALFORMED["another type"][0])
    skip: dict[str, Any] = {"on_damage": "skip", "max_skip_rate": 0.2, "workers": 0}
    expected = digests([load(latents, STEPS, **skip)])
    for _ in range(2):
        with loader(latents, cache=str(tmp_path / "cache"), **skip) as opened:
            opened._source._cache.scan.join()
            assert digests([list(islice(opened, STEPS))]) == expected
            assert opened.skipped == SKIPPED
    assert opened.counts["blocks_read"] == 0
    with pytest.raises(DataError, match=PLACE):
        load(latents, STEPS, cache=str(tmp_path / "cache"))


class Meeting:
    """The block's samples are not looked up before two threads want them; notes how often they are."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.lookups = self.wanting = 0
        self._changed = threading.Condition()
        self._get, self._index = BlockReference.get, fetch.index_block
        monkeypatch.setattr(BlockReference, "get", lambda reference: self._counted(reference))  # noqa: PLW0108
        monkeypatch.setattr(fetch, "index_block", self._late)

    def _counted(self, reference: BlockReference) -> LatentBlock | None:
        if reference._index is not None:
            at, block = reference._index.args  # type: ignore[attr-defined]
            with self._changed:
                self.wanting += (at.number, int(at.plan.numbers[block])) == (3, BLOCK)
                self._changed.notify_all()
        return self._get(reference)

    def _late(self, data: Any, plan: Any, block: int, layout: Any, where: str) -> LatentBlock:
        if where.endswith(SHARD) and plan.numbers[block] == BLOCK:
            with self._changed:
                self.lookups += 1
                assert self._changed.wait_for(lambda: self.wanting > 1, timeout=5), "no two threads met"
        return self._index(data, plan, block, layout, where)


def in_time(opened: LatentLoader, steps: int) -> tuple[list[Batch], BaseException | None]:
    """Its batches up to an error, and that; it is closed if it hangs."""
    batches: list[Batch] = []

    def read() -> None:
        batches.extend(next(opened) for _ in range(steps))

    with ThreadPoolExecutor(1) as pool:
        try:
            return batches, pool.submit(read).exception(timeout=20)
        finally:
            opened.close()


def test_threads_that_meet_in_it_skip_it_once(
    latents: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rewrite(latents, MALFORMED["another shape"][0])
    skip: dict[str, Any] = {"on_damage": "skip", "max_skip_rate": 0.2}
    expected = digests([load(latents, STEPS, workers=0, **skip)])
    caplog.clear()
    meeting = Meeting(monkeypatch)
    opened = loader(latents, workers=4, **skip)
    batches, error = in_time(opened, STEPS)
    assert error is None
    assert digests([batches]) == expected
    assert opened.skipped == SKIPPED
    assert (meeting.lookups, len(caplog.messages)) == (1, 1)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"on_damage": "fail"}, PLACE + ".*is not whole"),
        ({"on_damage": "skip", "max_skip_rate": 0.1}, PLACE + ".*is not whole.*; with it 8 of 70 samples"),
    ],
)
def test_threads_that_meet_in_it_fail_in_the_first_step(
    latents: str, monkeypatch: pytest.MonkeyPatch, how: dict[str, Any], message: str
) -> None:
    first = next(batch.step for batch in load(latents, STEPS) if lost(batch))
    rewrite(latents, MALFORMED["no latent"][0])
    meeting, before = Meeting(monkeypatch), threading.active_count()
    batches, error = in_time(loader(latents, workers=4, **how), STEPS)
    assert [batch.step for batch in batches] == list(range(first))
    assert isinstance(error, DataError)
    assert re.search(message, error.message)
    assert meeting.lookups == 1
    assert threading.active_count() == before


@pytest.mark.parametrize("fails", [False, True])
def test_all_who_wait_for_a_block_are_told_the_same(fails: bool) -> None:
    lookups: list[object] = []

    def index(data: object) -> None:
        lookups.append(data)
        time.sleep(0.05)
        if fails:
            raise DataError("damaged", "mend it")

    reference = BlockReference(index)
    with ThreadPoolExecutor(8) as pool:
        told = [pool.submit(reference.get) for _ in range(8)]
        reference.future.set_result(b"bytes")
        found = {one.exception(timeout=5) for one in told}
    assert lookups == [b"bytes"]
    assert [type(one) for one in found] == [DataError if fails else type(None)]
