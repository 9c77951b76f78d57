"""What each sample of a latent data set must look like, and one sample held against it.

Legend: C latent channels, h and w sides of the latent, L tokens of a caption, D width of its embedding.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data.layout import ArrayLayout, text_arrays
from pipeline.data.manifest import Bucket, Manifest, Receipt
from pipeline.data.samples import split_name
from pipeline.data.tar import members, read_npy
from pipeline.encode.verify.text import TextCheck, numbered
from pipeline.errors import DataError
from pipeline.storage import Store

Parts = dict[str, memoryview]  # a sample's files by what follows its key
_EXPONENT = np.uint16(0x7C00)  # float16 infinity and NaN have all of these bits


def text_rules(manifest: Manifest, number: str) -> dict[str, ArrayLayout]:
    """What is stored of one caption, by name without `.npy`; `number` is the caption's, or nothing."""
    return {f"{one.kind}{number}.{one.tower}": one.array for one in text_arrays(manifest.fingerprint)}


def sample_rules(manifest: Manifest, bucket: Bucket, captions: int) -> dict[str, ArrayLayout]:
    """The arrays of a sample of this picture size with so many captions, by name without `.npy`."""
    latent = ArrayLayout("float16", manifest.latent_shape(bucket))
    rules = {"latent": latent, "size": ArrayLayout("int32", (6,))}
    if manifest.fingerprint.flip:
        rules["latent_flip"] = latent
    for i in range(captions):
        rules |= text_rules(manifest, str(i))
    return rules


def grouped(data: bytes) -> list[tuple[str, Parts]]:
    """Keys and files of a block's samples, in file order. Raises DataError where the tar is damaged."""
    samples: list[tuple[str, Parts]] = []
    view = memoryview(data)
    for name, offset, size in members(data):
        key, extension = split_name(name)
        if not samples or samples[-1][0] != key or extension in samples[-1][1]:
            samples.append((key, {}))
        samples[-1][1][extension] = view[offset : offset + size]
    return samples


@dataclass(frozen=True)
class Stored:
    """One sample of a latent shard."""

    shard: str
    key: str
    source: str
    captions: tuple[str, ...]
    bucket: Bucket
    moments: NDArray[np.float16]  # [2C, h, w]
    flipped: NDArray[np.float16] | None
    size: NDArray[np.int32]  # [6]


def read_sample(store: Store, receipt: Receipt, number: int) -> tuple[str, Parts]:
    """Key and files of one sample, of which only its block is read.

    Raises:
        DataError: it is not where the receipt says.
        StorageError: the shard cannot be read.
    """
    for block in receipt.blocks:
        if block.first_sample <= number < block.first_sample + block.samples:
            samples = grouped(store.read(receipt.shard, block.offset, block.offset + block.length))
            if len(samples) == block.samples:
                return samples[number - block.first_sample]
    raise DataError(f"{receipt.shard}: sample {number} is not where the receipt says", "encode this shard again")


def stored_sample(shard: str, key: str, parts: Parts) -> Stored:
    """A sample of `read_sample` with its arrays, whatever they are. Raises DataError where there are none."""
    try:
        about = json.loads(bytes(parts["json"]))
        flipped = parts.get("latent_flip.npy")
        return Stored(
            shard=shard,
            key=key,
            source=str(about["source_shard"]),
            captions=tuple(map(str, about["captions"])),
            bucket=(int(about["bucket"][0]), int(about["bucket"][1])),
            moments=read_npy(parts["latent.npy"]),
            flipped=None if flipped is None else read_npy(flipped),
            size=read_npy(parts["size.npy"]),
        )
    except (KeyError, IndexError, TypeError, ValueError, RecursionError) as error:
        raise DataError(f"{shard}: {key!r} cannot be read", "encode this shard again") from error


class SampleCheck:
    """Holds samples of one shard against the manifest.

    Args:
        manifest: what all samples must be like.
        source: name of the image shard that they are from.
        text: looks at what is stored of their captions.
        fail: is told the check's name and, in words, what does not hold.
    """

    def __init__(self, manifest: Manifest, source: str, text: TextCheck, fail: Callable[[str, str], None]) -> None:
        self._manifest, self._source, self._text, self._fail = manifest, source, text, fail
        self._rules: dict[tuple[Bucket, int], dict[str, ArrayLayout]] = {}
        self.numbers = 0  # floats looked at

    def moments(self, key: str, parts: Parts, bucket: Bucket) -> NDArray[np.float16] | None:
        """The moments [2C, h, w], where the whole sample is as it should be."""
        captions = self._captions(key, parts.get("json"), bucket)
        if captions is None:
            return None
        rules = self._rules.get((bucket, len(captions)))
        if rules is None:
            rules = self._rules[bucket, len(captions)] = sample_rules(self._manifest, bucket, len(captions))
        if len(parts) != len(rules) + 1 or any(f"{name}.npy" not in parts for name in rules):
            wanted = {f"{name}.npy" for name in rules} | {"json"}
            odd = [f"lacks {name}" for name in sorted(wanted - set(parts))]
            odd += [f"has {name} too" for name in sorted(set(parts) - wanted)]
            self._fail("samples", f"{key!r} {', '.join(odd)}")
            return None
        arrays = {name: self.array(f"{key!r} {name}.npy", parts[f"{name}.npy"], rule) for name, rule in rules.items()}
        target = arrays["size"]
        if target is not None and tuple(target[4:]) != bucket:
            self._fail(
                "samples", f"{key!r} size.npy names a target of {size_text(target[4:])}, not {size_text(bucket)}"
            )
        sound = {name: found for name, found in arrays.items() if found is not None}
        if len(sound) < len(arrays):
            return None
        self._text.check(repr(key), numbered(captions), sound)
        return sound["latent"]

    def array(self, where: str, data: memoryview | bytes, rule: ArrayLayout) -> NDArray[Any] | None:
        """The array of a .npy file, where it is as it should be and finite."""
        try:
            found = read_npy(data)
        except DataError as error:
            self._fail("samples", f"{where}: {error.message}")
            return None
        if not rule.fits(found):
            self._fail("samples", f"{where} is {found.dtype} {list(found.shape)}, not {rule}")
            return None
        if rule.dtype == "float16":
            self.numbers += found.size
            if ((found.view(np.uint16) & _EXPONENT) == _EXPONENT).any():
                bad = int(np.count_nonzero(~np.isfinite(found)))
                self._fail("finite", f"{where} has {bad} numbers of {found.size} that are not finite")
                return None
        return found

    def _captions(self, key: str, data: memoryview | None, bucket: Bucket) -> list[str] | None:
        """The captions, where the sample's own account is as it should be."""
        try:
            about = json.loads(bytes(data or b""))
            captions = about.pop("captions")
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
            self._fail("samples", f"{key!r} has no JSON with captions")
            return None
        wanted = {"bucket": list(bucket), "source_shard": self._source, "source_key": key}
        sound = isinstance(captions, list) and captions and all(isinstance(text, str) for text in captions)
        if about != wanted or not sound:
            odd = [name for name in sorted({*about, *wanted}) if about.get(name) != wanted.get(name)]
            self._fail("samples", f"{key!r}: its JSON is wrong in {', '.join(odd or ['captions'])}")
            return None
        return list(captions)


def size_text(sides: Sequence[int] | NDArray[Any]) -> str:
    """Height and width for a person."""
    return "x".join(str(int(side)) for side in sides)
