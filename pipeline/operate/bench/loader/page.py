"""The figures of `lathe bench loader` for a person: a few tables in the terminal, or a page in Markdown."""

from __future__ import annotations

from typing import Any

from pipeline.operate.bench.loader.rivals import TUNED
from pipeline.operate.bench.tables import Rows, aligned, listed, markdown, passed, setting_rows

GOALS = {
    "inprocess_over_fastest_peer": 5.0,
    "workers_over_fastest_peer": 3.0,
    "s3_over_raw": 0.8,
}
MOST_START_SECONDS = 2.0

_NAMES = {
    "ours": "Lathe",
    "ours_threads": "Lathe, reading ahead",
    "raw": "bare range reads",
    "webdataset": "webdataset",
    "mosaicml": "mosaicml-streaming",
    "litdata": "litdata",
    "litdata_by_item": "litdata, batch_decode=0",
    "torch_files": "torch DataLoader, a file a sample",
}
_KINDS = {
    "text": "latents of 8 x 32 x 32 and text embeddings of 20 x 768, float16",
    "tokens": "latents of 8 x 32 x 32, float16, and 77 token ids",
}
_MODES = {
    "inprocess": "in one process",
    "workers": "with {processes} worker processes of the peers, Lathe reading ahead in its threads",
}
_HEAD = """# Reading latents, measured

Written by `lathe bench loader`: how fast do latents become batches, beside other loaders on the same samples?
"""
_RATES = """## From local files

{samples:,} samples, shuffled, in batches of {batch}, as raw tensors; all files are in the page cache. Each loader runs
in a process of its own and is asked for one whole epoch after another, all in turn. The first epoch is not counted.
Of every tensor of every batch one element is read, and every sample must come.

- **Lathe** reads its own latent shards ({per_shard} samples in each, blocks of {block_samples}, window {window}),
  checks every block against its checksum, and hands over keys and picture sizes too. It runs on after an epoch; what it
  read ahead between two is not counted, and it must have read all the data anew in each.
- **The peers** have latents and text alone, each in its own format, at the settings that it comes with or that its
  documentation recommends; they are below.
- **over the fastest**: Lathe's rate over that of the fastest peer, in each round; the median. The goals are about the
  peers at such settings. `{tuned}` is not among them: by default litdata decodes 256 samples around each one that it
  takes, and without that it is the fastest peer by far. It hands out views of the mapped file, unchecked.
"""
_S3 = """## From S3

The same samples of the first kind from {endpoint}: {requests:,} requests, {mib:,.0f} MiB an epoch.

- **bare range reads**: the same ranges in the same order, {at_once} at once with aiobotocore; nothing is done with the
  bytes. The server runs on the same machine, and takes its part of the cores.
- **Lathe**: its defaults, no cache. **Peers**: {processes} workers, litdata none, which suits it better here;
  what keeps a copy begins each epoch without.
- A file a sample is not read from S3: it would be a request a sample.
"""
_START = """## From start to first batch, on S3

Seconds from imports done to the first batch, manifest and connections included, in a process of its own each time; and
of the whole process. Resumed in the middle of an epoch by `start_step`.
"""
_SHUFFLE = """## How well it is shuffled

{samples:,} samples in {shards} shards, batches of {batch}. Lathe holds {held:,} samples at most (window {window},
blocks of {block_samples}); webdataset has a buffer of as many.

- **spread**: the standard deviation of the places of a source shard's samples in the epoch, averaged over the shards,
  over what a uniformly random order gives. 1 = as well as can be, 0 = in one piece.
- **together**: of the pairs of samples in one batch, the share that is of one source shard, over what a uniformly
  random order gives. 1 = as chance has it; larger = shards come in pieces. Lathe's batches take their samples from
  places all over the epoch's data, so there is less of it than by chance.
- mosaicml-streaming and litdata shuffle as they do by default, over whole shards that lie on a local disk.
"""
_MEMORY = """## Memory

Peak resident memory of two loaders that differ in their number of shards alone, each in a process of its own (`VmHWM`),
after an epoch; {samples} tiny samples and {blocks} blocks a shard. The difference over the added shards, so that
start-up is subtracted.
"""
_AGAIN = """## How to repeat it

```
{command}
```

`--root s3://bucket/prefix` measures against a store of your own. The peers are installed at the first run, apart from
Lathe but with the same torch; `--no-peers` leaves them out. Nothing else should run on the machine: the load average
before the start is above.
"""


def summary(result: dict[str, Any]) -> str:
    """The main figures as aligned text."""
    parts = [_rate_rows(result, kind, mode) for kind, modes in result["local"].items() for mode in modes]
    parts += [_s3_rows(result), _start_rows(result), _shuffle_rows(result), _memory_rows(result)]
    return "\n\n".join(map(aligned, parts)) + "\n\n" + "\n".join(_verdicts(result)) + "\n"


def page(result: dict[str, Any], command: str) -> str:
    """The whole page: figures, what they mean, settings, machine, versions, and the command that measures again."""
    sizes = result["sizes"]
    parts = [_HEAD, "\n".join(f"- {verdict}" for verdict in _verdicts(result)) + "\n"]
    parts.append(_RATES.format(**sizes["rates"], tuned=_NAMES[TUNED[0]]))
    for kind, modes in result["local"].items():
        for mode, told in modes.items():
            parts += [f"### {_KINDS[kind].capitalize()}, {_said(_MODES[mode], result)}\n"]
            parts += [markdown(_rate_rows(result, kind, mode)), _rounds(told)]
    s3, memory, shuffle = result["s3"], sizes["memory"], sizes["shuffle"]
    parts += [
        _S3.format(**s3 | sizes["rates"], mib=s3["bytes"] / 2**20),
        markdown(_s3_rows(result)),
        f"Lathe over bare reads, round by round: {listed(one['ours_over_raw'] for one in s3['rounds'])}.\n",
        _START,
        markdown(_start_rows(result)),
        _posterior(result["posterior"]),
        _SHUFFLE.format(
            **shuffle, samples=shuffle["shards"] * shuffle["per_shard"], held=result["shuffle"]["held_samples"]
        ),
        markdown(_shuffle_rows(result)),
        _MEMORY.format(samples=memory["samples"], blocks=memory["samples"] // memory["block_samples"]),
        markdown(_memory_rows(result)),
        "## The peers' settings and versions\n",
        *(_peer(name, about) for name, about in result["peers"].items()),
        "## Machine and versions\n",
        markdown([["", ""], *setting_rows(result["setting"])]),
        _AGAIN.format(command=command),
    ]
    return "\n".join(parts)


def _verdicts(result: dict[str, Any]) -> list[str]:
    found = [
        f"{name}: {result[name]:.2f}, to be at least {goal:g}: {passed(result[name] >= goal)}"
        for name, goal in GOALS.items()
    ]
    start = result["start_seconds"]
    found.append(
        f"start_seconds: {start:.2f}, to be below {MOST_START_SECONDS:g}: {passed(start < MOST_START_SECONDS)}"
    )
    ours, theirs = (result["shuffle"][name]["spread"] for name in ("ours", "webdataset"))
    found.append(f"spread: {ours:.3f}, to be at least webdataset's {theirs:.3f}: {passed(ours >= theirs)}")
    return [
        *found,
        f"resume_over_start: {result['resume_over_start']:.2f}, the dearest place over the beginning",
        f"bytes_per_added_shard: {result['bytes_per_added_shard']:,.0f}",
        f"over any peer at any setting: in process {result['inprocess_over_fastest_tuned']:.2f}, with workers"
        f" {result['workers_over_fastest_tuned']:.2f}",
    ]


def _rate_rows(result: dict[str, Any], kind: str, mode: str) -> Rows:
    rows = [[f"{kind}, {mode}", "samples/s", "µs each", "Lathe over it"]]
    rows += _runs(result, result["local"][kind][mode])
    return [*rows, _fastest(result["local"][kind][mode])]


def _s3_rows(result: dict[str, Any]) -> Rows:
    return [["S3", "samples/s", "µs each", "Lathe over it"], *_runs(result, result["s3"]), _fastest(result["s3"])]


def _runs(result: dict[str, Any], told: dict[str, Any]) -> Rows:
    """Medians of everyone who ran."""
    median = told["median"]
    rows = []
    for name, words in _NAMES.items():
        if seconds := median.get(f"{name}_seconds"):
            over = median.get(f"ours_over_{name}")
            ratio = f"{over:.2f}" if over else ""
            rows.append([_said(words, result), f"{1 / seconds:,.0f}", f"{seconds * 1e6:.1f}", ratio])
    return rows


def _fastest(told: dict[str, Any]) -> list[str]:
    return ["the fastest peer", "", "", f"{told['median']['ours_over_fastest_peer']:.2f}"]


def _rounds(told: dict[str, Any]) -> str:
    over = listed(one["ours_over_fastest_peer"] for one in told["rounds"])
    return f"Medians of {len(told['rounds'])} rounds; over the fastest, round by round: {over}.\n"


def _start_rows(result: dict[str, Any]) -> Rows:
    rows = [["place in the epoch", "s to the first batch", "of them, the manifest", "s of the whole process"]]
    return rows + [
        [place, *(f"{one[name]:.2f}" for name in ("first_seconds", "manifest_seconds", "process_seconds"))]
        for place, one in result["start"]["median"].items()
    ]


def _posterior(part: dict[str, Any]) -> str:
    return (
        "Beside all this, training draws each latent from its posterior and whitens it:"
        f" {part['seconds_per_batch'] * 1e3:.2f} ms for a batch of {part['batch']} on the CPU.\n"
    )


def _shuffle_rows(result: dict[str, Any]) -> Rows:
    rows = [["shuffling", "spread", "together"]]
    parts = {name: one for name, one in result["shuffle"].items() if isinstance(one, dict)}
    return rows + [[_NAMES[name], f"{one['spread']:.3f}", f"{one['together']:.2f}"] for name, one in parts.items()]


def _memory_rows(result: dict[str, Any]) -> Rows:
    memory = result["memory"]
    counts = " and ".join(f"{shards:,}" for shards in memory["shards"])
    peaks = " and ".join(f"{peak / 2**20:.1f}" for peak in memory["peak_bytes"])
    rows = [["memory", "shards", "peak MiB", "bytes an added shard"]]
    return [*rows, ["an epoch", counts, peaks, f"{memory['bytes_per_added_shard']:,.0f}"]]


def _peer(name: str, about: dict[str, Any]) -> str:
    versions = ", ".join(f"{package} {version}" for package, version in about["versions"].items())
    lines = [f"- {what}: {how}" for what, how in about["settings"].items()]
    return "\n".join([f"**{_NAMES[name]}** ({versions})\n", *lines, ""])


def _said(words: str, result: dict[str, Any]) -> str:
    return words.format(processes=result["sizes"]["rates"]["processes"])
