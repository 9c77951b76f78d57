"""Shares and lists of keys: the right samples, in little memory, and what is wrong with a list or a receipt by name."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from latent_shards import BLOCK, FINGERPRINT, key, write_latents

from pipeline.config import DataSetConfig
from pipeline.data.datasets import open_datasets
from pipeline.data.manifest import RECEIPT_SUFFIX, Manifest, key_hash, load_manifest
from pipeline.data.samples import is_holdout
from pipeline.data.subset import KeyList, Selection, read_keys, select
from pipeline.errors import DataError, LatheError, StorageError
from pipeline.storage import open_store

SQUARE, TALL = (4, 4), (8, 4)
BUCKETS = FINGERPRINT.model_copy(update={"buckets": (SQUARE, TALL)})
SIZES = [{SQUARE: (40, 3), TALL: (25, 2)}, (0, 0), {TALL: (1, 0)}, {SQUARE: (300, 10)}, {SQUARE: (0, 4)}]


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_latents(tmp_path_factory.mktemp("latents"), SIZES, fingerprint=BUCKETS)


def places() -> dict[str, tuple[int, tuple[int, int], int, bool]]:
    """By key: shard, bucket, number in the bucket's range of its split, whether it is for training."""
    found = {}
    for shard, sizes in enumerate(SIZES):
        number = 0
        for bucket, (train, holdout) in sorted((sizes if isinstance(sizes, dict) else {SQUARE: sizes}).items()):
            for i in range(train + holdout):
                found[key(shard, number)] = (shard, bucket, i if i < train else i - train, i < train)
                number += 1
    return found


def training() -> list[str]:
    return [name for name, place in places().items() if place[3]]


def choose(url: str, share: float = 1.0, keys: KeyList | None = None) -> tuple[Manifest, Selection]:
    manifest = load_manifest(url)
    return manifest, select(open_store(url.rpartition("/")[0]), manifest, share, keys, lambda: None)


def chosen(url: str, share: float = 1.0, keys: KeyList | None = None) -> set[str]:
    """Keys of what was selected, by way of the numbers that the loader asks for."""
    manifest, selection = choose(url, share, keys)
    names = {place: name for name, place in places().items()}
    found = []
    for bucket, sizes in selection.sizes.items():
        for shard, entry in enumerate(manifest.shards):
            if bucket in [here.bucket for here in entry.buckets]:
                numbers = selection.numbers(shard, entry, bucket)
                assert numbers.dtype == np.int64
                assert numbers.tolist() == sorted(set(numbers.tolist()))
                assert len(numbers) == sizes[shard]
                found += [names[shard, bucket, number, True] for number in numbers.tolist()]
            else:
                assert not sizes[shard]
    assert len(found) == len(set(found))
    return set(found)


def key_file(folder: Path, text: str | bytes) -> str:
    path = folder / "keys.txt"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


@pytest.mark.parametrize("share", [0.02, 0.3, 0.5, 0.99, 1.0])
def test_a_share_takes_the_training_samples_whose_hash_is_below_it(latents: str, share: float) -> None:
    assert chosen(latents, share) == {name for name in training() if key_hash(name) < share * 2**64}


@given(shares=st.tuples(st.floats(1e-6, 1), st.floats(1e-6, 1)))
def test_a_smaller_share_is_part_of_a_larger_one(latents: str, shares) -> None:
    assert chosen(latents, min(shares)) <= chosen(latents, max(shares))


def test_the_share_is_independent_of_the_holdout() -> None:
    names = [f"{i:09d}" for i in range(40_000)]
    for held_out in (True, False):
        mine = [name for name in names if is_holdout(name, 0.25) == held_out]
        taken = sum(key_hash(name) < 0.3 * 2**64 for name in mine) / len(mine)
        assert abs(taken - 0.3) < 5 * (0.3 * 0.7 / len(mine)) ** 0.5


def test_a_list_takes_its_keys_and_a_share_of_it_both(latents: str, tmp_path: Path) -> None:
    wanted = training()[::3]
    keys = read_keys(key_file(tmp_path, "\n".join(wanted)))
    assert chosen(latents, keys=keys) == set(wanted)
    assert chosen(latents, 0.4, keys) == {name for name in wanted if key_hash(name) < 0.4 * 2**64}


def test_neither_order_nor_repetition_nor_line_ends_of_a_list_matter(tmp_path: Path) -> None:
    plain = read_keys(key_file(tmp_path, "a\nb b\nc"))
    assert read_keys(key_file(tmp_path, "\ufeffc\r\n\r\na\r\nb b\r\na\r\n")).digest() == plain.digest()
    assert read_keys(key_file(tmp_path, "a\nb\nc")).digest() != plain.digest()


def test_what_is_kept_is_a_bit_a_sample_or_less(tmp_path: Path) -> None:
    url = write_latents(tmp_path, [(2000, 0)])
    few = read_keys(key_file(tmp_path, "\n".join(key(0, i) for i in (7, 1999))))
    assert sum(part.nbytes for part in choose(url, keys=few)[1].kept) == 8
    assert sum(part.nbytes for part in choose(url, 0.5)[1].kept) == 250


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "lists no key"),
        ("\n\r\n\n", "lists no key"),
        (b"caf\xe9\n", "is not UTF-8"),
        (
            "00000/0001\nnowhere\n00000/0002\nelsewhere\nnowhere",
            "does not hold: 2 of its 4 keys, the first is 'nowhere'",
        ),
        ("00000/0001\n00003/0309\n00000/0040", "held out of training: 2 of its 3 keys, the first is '00003/0309'"),
        ("00000/0001\t", "does not hold: 1 of its 1 keys, the first is '00000/0001\\\\t'"),
    ],
)
def test_a_list_that_cannot_be_used_is_refused(latents: str, tmp_path: Path, content, said: str) -> None:
    with pytest.raises(DataError, match=said) as error:
        chosen(latents, keys=read_keys(key_file(tmp_path, content)))
    assert error.value.remedy
    assert "\n" not in error.value.message


def test_a_list_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"keys\.txt"):
        read_keys(str(tmp_path / "keys.txt"))


def change(folder: Path, edit) -> None:
    path = folder / f"00000.tar{RECEIPT_SUFFIX}"
    tree = json.loads(path.read_bytes())
    edit(tree)
    path.write_text(json.dumps(tree))


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda tree: tree.update(sha256="0" * 64), "is not the one the manifest was made from"),
        (lambda tree: tree["buckets"][0].update(train=[0, 19]), "is not the one the manifest was made from"),
        (lambda tree: tree.update(buckets=[]), "is not the one the manifest was made from"),
        (lambda tree: tree.update(keys=tree["keys"][:32]), "is not the one the manifest was made from"),
        (lambda tree: tree.update(keys="AAAA"), "is not the one the manifest was made from"),
        (lambda tree: tree.update(keys="~"), "is not a usable receipt: field keys"),
        (lambda tree: tree.update(format_version=99), "has format version 99"),
        (lambda tree: tree.pop("sha256"), "is not a usable receipt: field sha256: is missing"),
        (lambda tree: tree.clear(), "is not a receipt"),
    ],
)
def test_a_receipt_that_cannot_be_used_is_named(tmp_path: Path, edit, said: str) -> None:
    url = write_latents(tmp_path, [(20, 3), (BLOCK, 0)])
    change(tmp_path, edit)
    with pytest.raises(DataError, match=rf"00000\.tar.*{said}"):
        choose(url, 0.5)


def test_a_receipt_in_another_encoding_is_not_ours(tmp_path: Path) -> None:
    url = write_latents(tmp_path, [(20, 3)])
    path = tmp_path / f"00000.tar{RECEIPT_SUFFIX}"
    path.write_bytes(path.read_text().encode("utf-16"))
    with pytest.raises(DataError, match=r"00000\.tar.*is not the one the manifest was made from"):
        choose(url, 0.5)


def test_of_several_wrong_receipts_the_first_is_told(tmp_path: Path) -> None:
    url = write_latents(tmp_path, [(4, 0)] * 40)
    for shard in (37, 5, 21):
        (tmp_path / f"{shard:05d}.tar{RECEIPT_SUFFIX}").unlink()
    for _ in range(5):
        with pytest.raises(LatheError, match=r"00005\.tar"):
            choose(url, 0.5)


def test_a_list_without_line_ends_is_told_in_few_words(tmp_path: Path) -> None:
    url = write_latents(tmp_path, [(5, 0)])
    (tmp_path / "keys.txt").write_bytes(b"\r".join([b"00000/0000"] * 10_000))
    with pytest.raises(DataError, match="1 of its 1 keys") as error:
        open_datasets([DataSetConfig(manifest=url, keys=str(tmp_path / "keys.txt"))], global_batch=1)
    assert len(str(error.value)) < 1000
