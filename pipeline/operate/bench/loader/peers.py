"""Other loaders at the same work: a program of its own that imports nothing of Lathe, for other environments too.

    python peers.py '{"peer": "webdataset", "samples": FOLDER, "place": FOLDER or s3://..., "workers": 0, ...}'

It answers each line on its standard input (`write`, `epoch`, `order`) with a line of JSON. Samples come
from one .npy file for each field, [N, ...]; every peer keeps them in its own recommended format, and nothing else.

`epoch` is a whole epoch of shuffled batches of raw tensors, consumed in full. A new loader is made for each where the
peer keeps what it has fetched (from S3); else one and the same, with its worker processes, serves all.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
import torch

NUMBER = "number"  # the field that tells which sample it is, in order
Batches = Iterable[Any]


@dataclass(frozen=True)
class Work:
    """What is asked of the peer."""

    peer: str
    samples: str  # folder of FIELD.npy
    place: str  # where the peer's own files are, or are to be written
    workers: int = 0  # processes
    batch: int = 64
    per_shard: int = 1024  # webdataset, and tiny samples
    shuffle_buffer: int = 1000  # of webdataset
    shuffle_algorithm: str = "py1e"  # of mosaicml
    endpoint: str = ""  # of the S3 server; empty = AWS

    @property
    def is_remote(self) -> bool:
        """Whether the samples come from S3."""
        return self.place.startswith("s3://")

    def fields(self) -> dict[str, Any]:
        """The samples' arrays by name, from the disk when they are touched."""
        return {path.stem: np.load(path, mmap_mode="r") for path in sorted(Path(self.samples).glob("*.npy"))}

    def loading(self) -> dict[str, Any]:
        """torch's DataLoader settings."""
        more = {"persistent_workers": not self.is_remote, "prefetch_factor": 4} if self.workers else {}
        return {"num_workers": self.workers, **more}


class Peer(NamedTuple):
    """One loader: how it writes, how it reads, its settings in words, and the packages whose versions matter."""

    write: Callable[[Work], list[int]]  # samples in each of its shards
    read: Callable[[Work], Batches]
    settings: dict[str, Any]
    packages: Sequence[str]


def write_webdataset(work: Work) -> list[int]:
    """Tars of .npy files."""
    import webdataset

    fields, sizes = work.fields(), []
    count = len(next(iter(fields.values())))
    for number, first in enumerate(range(0, count, work.per_shard)):
        rows = range(first, min(first + work.per_shard, count))
        with webdataset.TarWriter(f"{work.place}/{number:05d}.tar") as tar:
            for i in rows:
                tar.write({"__key__": f"{i:09d}", **{f"{name}.npy": array[i] for name, array in fields.items()}})
        sizes.append(len(rows))
    return sizes


def read_webdataset(work: Work) -> Batches:
    """Shards shuffled, then samples in a buffer; batches are made in the worker."""
    import webdataset
    from webdataset.gopen import gopen_schemes

    gopen_schemes["s3"] = _open_s3
    names = [f"{name}.npy" for name in work.fields()]
    data = (
        webdataset.WebDataset(_tars(work), shardshuffle=100, empty_check=False)
        .shuffle(work.shuffle_buffer)
        .to_tuple(*names)
        .map_tuple(*[webdataset.autodecode.npy_loads] * len(names))
        .batched(work.batch, collation_fn=functools.partial(_stacked_rows, names))
    )
    loader: Batches = webdataset.WebLoader(data, batch_size=None, **work.loading()) if work.workers else data
    return loader


def _stacked_rows(names: Sequence[str], rows: Sequence[Sequence[Any]]) -> dict[str, torch.Tensor]:
    columns = zip(names, zip(*rows, strict=True), strict=True)
    return {name.removesuffix(".npy"): torch.from_numpy(np.stack(column)) for name, column in columns}


def _tars(work: Work) -> list[str]:
    if not work.is_remote:
        return sorted(map(str, Path(work.place).glob("*.tar")))
    return sorted(f"s3://{path}" for path in _s3().glob(f"{work.place}/*.tar"))


def _s3() -> Any:
    """A client of this process: s3fs is not fork-safe."""
    return _s3_of(os.getpid())


@functools.lru_cache(1)
def _s3_of(process: int) -> Any:
    import s3fs

    return s3fs.S3FileSystem(skip_instance_cache=True, use_listings_cache=False)


def _open_s3(url: str, *args: Any, **options: Any) -> Any:
    return _s3().open(url, "rb", block_size=16 * 2**20, cache_type="readahead")


def write_mosaicml(work: Work) -> list[int]:
    """MDS shards of arrays of known shape and dtype; of tiny samples, as many in a shard as elsewhere."""
    from streaming import MDSWriter

    fields = work.fields()
    columns = {
        name: f"ndarray:{array.dtype.name}:{','.join(map(str, array.shape[1:]))}" for name, array in fields.items()
    }
    limit = {"size_limit": 12 * work.per_shard} if NUMBER in fields else {}
    with MDSWriter(out=work.place, columns=columns, **limit) as shards:
        for i in range(len(next(iter(fields.values())))):
            shards.write({name: array[i] for name, array in fields.items()})
    index = json.loads((Path(work.place) / "index.json").read_text(encoding="utf-8"))
    return [shard["samples"] for shard in index["shards"]]


def read_mosaicml(work: Work) -> Batches:
    """Streaming's own dataset, in torch's DataLoader."""
    from streaming import StreamingDataset
    from streaming.base.storage import CloudDownloader

    where = {"local": work.place}
    if work.is_remote:
        os.environ["S3_ENDPOINT_URL"] = work.endpoint
        where = {"remote": work.place, "local": _fresh(work)}
        # Did the dataset fetch its index, its workers would inherit the open connection and read each other's answers.
        CloudDownloader.direct_download(f"{work.place}/index.json", f"{where['local']}/index.json")
    data = StreamingDataset(**where, shuffle=True, shuffle_algo=work.shuffle_algorithm, batch_size=work.batch)
    return torch.utils.data.DataLoader(data, batch_size=work.batch, **work.loading())


def write_litdata(work: Work) -> list[int]:
    """Chunks of 64 MB of tensors; of tiny samples, as many in a chunk as elsewhere."""
    import litdata

    count = len(next(iter(work.fields().values())))
    size = (
        {"chunk_size": work.per_shard} if (Path(work.samples) / f"{NUMBER}.npy").exists() else {"chunk_bytes": "64MB"}
    )
    litdata.optimize(
        functools.partial(_tensors, work), list(range(count)), work.place, num_workers=1, verbose=False, **size
    )
    index = json.loads((Path(work.place) / "index.json").read_text(encoding="utf-8"))
    return [chunk["chunk_size"] for chunk in index["chunks"]]


def _tensors(work: Work, i: int) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array[i].copy()) for name, array in _kept(work).items()}


@functools.lru_cache(1)
def _kept(work: Work) -> dict[str, Any]:
    return work.fields()


def read_litdata(work: Work) -> Batches:
    """litdata's dataset and loader, as they are by default."""
    return _litdata(work)


def read_litdata_by_item(work: Work) -> Batches:
    """The same with `batch_decode=0`: a sample is taken from its chunk alone, in place of 256 around it each time."""
    return _litdata(work, batch_decode=0)


def _litdata(work: Work, **more: Any) -> Batches:
    import litdata
    from litdata.streaming import downloader

    if work.is_remote:
        more |= {"cache_dir": _fresh(work), "max_cache_size": "25GB"}
        if work.endpoint:
            more["storage_options"] = {"endpoint_url": work.endpoint}
            # Its own options cannot say that plain http is meant, and https alone is taken.
            downloader._OBSTORE_CLIENT_OPTIONS["allow_http"] = True
    data = litdata.StreamingDataset(work.place, shuffle=True, drop_last=False, **more)
    loader: Batches = litdata.StreamingDataLoader(data, batch_size=work.batch, **work.loading())
    return loader


def write_files(work: Work) -> list[int]:
    """One .pt file a sample."""
    fields = work.fields()
    count = len(next(iter(fields.values())))
    for i in range(count):
        torch.save({name: torch.from_numpy(array[i].copy()) for name, array in fields.items()}, _file(work.place, i))
    return [1] * count


class _Files(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    def __init__(self, place: str, count: int) -> None:
        self._place, self._count = place, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        sample: dict[str, torch.Tensor] = torch.load(_file(self._place, i), weights_only=True)
        return sample


def _file(place: str, i: int) -> str:
    return f"{place}/{i:09d}.pt"


def read_files(work: Work) -> Batches:
    """torch's DataLoader with its own shuffle and collation."""
    data = _Files(work.place, len(next(iter(work.fields().values()))))
    return torch.utils.data.DataLoader(data, batch_size=work.batch, shuffle=True, **work.loading())


_folders: list[str] = []


def _fresh(work: Work) -> str:
    """An empty folder for what is fetched, beside the samples; the one before is deleted."""
    while _folders:
        shutil.rmtree(_folders.pop(), ignore_errors=True)
    _folders.append(tempfile.mkdtemp(prefix="fetched-", dir=Path(work.samples).parent))
    return _folders[-1]


_LITDATA = {
    "format": "optimize(chunk_bytes=64MB) of tensors, not compressed",
    "samples": "StreamingDataset(shuffle=True)",
    "batches": "StreamingDataLoader, its own collation",
    "workers": "persistent, prefetch_factor=4",
    "s3": "storage_options={endpoint_url}, its obstore client told to allow http (it has no option for that); a fresh"
    " cache_dir each epoch, no worker processes, with which it was 20 times slower",
}
_LITDATA_PACKAGES = ("litdata", "torch", "numpy", "boto3", "obstore")
PEERS = {
    "webdataset": Peer(
        write_webdataset,
        read_webdataset,
        {
            "format": "tars of .npy",
            "shards": "shardshuffle=100",
            "samples": "shuffle(1000)",
            "decoding": "npy_loads of these fields alone",
            "batches": "batched(64) before the loader, numpy.stack",
            "workers": "WebLoader, persistent, prefetch_factor=4",
            "s3": "opened streams of s3fs, read ahead by 16 MiB",
        },
        ("webdataset", "torch", "numpy", "s3fs"),
    ),
    "mosaicml": Peer(
        write_mosaicml,
        read_mosaicml,
        {
            "format": "MDS, ndarray:DTYPE:SHAPE, shards of 64 MiB, neither compressed nor hashed",
            "samples": "shuffle=True, shuffle_algo=py1e and its default block",
            "batches": "DataLoader, default_collate",
            "workers": "persistent, prefetch_factor=4",
            "s3": "remote=s3://..., a fresh local folder each epoch, workers not persistent;"
            " the index is fetched before, since workers that inherit its connection mix up their answers",
        },
        ("mosaicml-streaming", "torch", "numpy", "boto3"),
    ),
    "litdata": Peer(write_litdata, read_litdata, _LITDATA, _LITDATA_PACKAGES),
    "litdata_by_item": Peer(
        write_litdata,
        read_litdata_by_item,
        {**_LITDATA, "decoding": "batch_decode=0, not its default"},
        _LITDATA_PACKAGES,
    ),
    "torch_files": Peer(
        write_files,
        read_files,
        {
            "format": "one .pt file a sample, a dict of tensors",
            "samples": "DataLoader(shuffle=True), torch.load(weights_only=True)",
            "batches": "default_collate",
            "workers": "persistent, prefetch_factor=4",
        },
        ("torch",),
    ),
}


class Bench:
    """Answers the commands for one peer."""

    def __init__(self, work: Work) -> None:
        self._work, self._peer = work, PEERS[work.peer]
        self._loader: Batches | None = None

    def write(self) -> dict[str, Any]:
        """Write the samples in the peer's format."""
        Path(self._work.place).mkdir(parents=True, exist_ok=True)
        return {"shards": self._peer.write(self._work)}

    def epoch(self) -> dict[str, Any]:
        """Consume one epoch. `first_seconds` counts from the loader's construction, `seconds` from its iteration."""
        made = time.perf_counter()
        loader = self._ready()
        begun, first, samples = time.perf_counter(), 0.0, 0
        for batch in loader:
            samples += consume(batch)
            first = first or time.perf_counter() - made
        return {"samples": samples, "seconds": time.perf_counter() - begun, "first_seconds": first}

    def order(self) -> dict[str, Any]:
        """The numbers of one epoch's samples as they come, by batch."""
        return {"batches": [batch[NUMBER].flatten().tolist() for batch in self._ready()]}

    def close(self) -> None:
        """Let go of what was fetched."""
        self._loader = None
        while _folders:
            shutil.rmtree(_folders.pop(), ignore_errors=True)

    def _ready(self) -> Batches:
        if self._loader is None or self._work.is_remote:
            self._loader = None  # the one before goes first, with its workers
            self._loader = self._peer.read(self._work)
        return self._loader


def consume(batch: dict[str, torch.Tensor]) -> int:
    """The batch's samples; one element of every tensor is read."""
    for tensor in batch.values():
        tensor[-1].flatten()[-1].item()
    return len(next(iter(batch.values())))


def serve(bench: Any, commands: Iterator[str], answers: TextIO) -> None:
    """One answer for each line, until there are no more."""
    for command in commands:
        print(json.dumps(getattr(bench, command.strip())()), file=answers, flush=True)


def main() -> None:
    """Serve, with what others print kept out of the answers."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)
        bench = Bench(Work(**json.loads(sys.argv[1])))
        try:
            serve(bench, sys.stdin, answers)
        finally:
            bench.close()


if __name__ == "__main__":
    main()
