from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest

from pipeline.config import ImagesConfig
from pipeline.data.images import png
from pipeline.data.samples import is_holdout
from pipeline.errors import DataError
from pipeline.train.pictures import read_pictures


def shard(path: Path, first: int, count: int, *, damaged: bool = False) -> None:
    with tarfile.open(path, "w") as tar:
        for number in range(first, first + count):
            pixels = np.full((10, 12, 3), number, np.uint8)
            data = b"no picture" if damaged else png(pixels)
            for suffix, content in ((".png", data), (".txt", b"a caption")):
                member = tarfile.TarInfo(f"{number:03d}{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def config(folder: Path, holdout: float = 0.3) -> ImagesConfig:
    return ImagesConfig(shards=str(folder), resolution=8, holdout=holdout)


def test_pictures_keep_their_order_and_the_holdout_stands_apart(tmp_path: Path) -> None:
    shard(tmp_path / "b.tar", 20, 20)
    shard(tmp_path / "a.tar", 0, 20)
    found = read_pictures(config(tmp_path))
    held = [is_holdout(f"{number:03d}", 0.3) for number in range(40)]
    assert 0 < sum(held) < 40
    assert found.train.shape[1:] == (8, 8, 3)
    assert found.train[:, 0, 0, 0].tolist() == [n for n in range(40) if not held[n]]
    assert found.holdout[:, 0, 0, 0].tolist() == [n for n in range(40) if held[n]]


def test_unusable_pictures_are_counted(tmp_path: Path) -> None:
    shard(tmp_path / "a.tar", 0, 3)
    shard(tmp_path / "b.tar", 3, 2, damaged=True)
    found = read_pictures(config(tmp_path, 0.0))
    assert found.rejected == 2
    assert len(found.train) == 3
    assert found.holdout.shape == (0, 8, 8, 3)


def test_digest_knows_the_pictures_again(tmp_path: Path) -> None:
    shard(tmp_path / "a.tar", 0, 4)
    before = read_pictures(config(tmp_path, 0.0)).digest
    assert read_pictures(config(tmp_path, 0.0)).digest == before
    shard(tmp_path / "a.tar", 1, 4)
    assert read_pictures(config(tmp_path, 0.0)).digest != before


def test_nothing_to_train_on_is_an_error(tmp_path: Path) -> None:
    shard(tmp_path / "a.tar", 0, 2, damaged=True)
    with pytest.raises(DataError, match="no picture to train on \\(2 rejected"):
        read_pictures(config(tmp_path))


def test_more_than_memory_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    shard(tmp_path / "a.tar", 0, 4)
    with pytest.raises(DataError, match="a part of the shards"):
        read_pictures(config(tmp_path), limit_bytes=500)
