"""The figures of `lathe bench encode` for a person: a few tables in the terminal, or a page in Markdown."""

from __future__ import annotations

from typing import Any

from pipeline.operate.bench.tables import Rows, aligned, listed, markdown, passed, setting_rows

LEAST_OVER_DEVICE = 0.95
MOST_BYTES = 10_000

_NAMES = {"host": "host alone", "model": "bare model", "job": "job", "naive": "usual loop"}
_HEAD = """# Encoding, measured

Written by `lathe bench encode`: is the device ever idle while `lathe encode` works, and does memory grow with the data?
"""
_SIMULATED = """## A device that takes its time and none of the host's

{pictures:,} JPEG pictures of {picture_side} px in {shards} shards, brought to {resolution} px, batches of {batch_size}.
The device takes {milliseconds:.3f} ms a picture, {device_over_host} times the host's own work: a tenth of the host's
time is all the slack there is.

- **host alone**: the whole `lathe encode` with a device that takes no time, with as many threads as ever. The quickest
  round sets the device's time, so that a disturbed round cannot make the device slower; one more goes before,
  unrecorded, to warm up.
- **job**: `lathe encode` with the device, from listing the shards to the manifest.
- **usual loop**: fetch, decode, encode, write, one after the other, on {naive_shards} of the shards. Its latent shards
  are the job's, byte for byte.
- **of the device's rate**: the device's time over the run's, both per picture; 1 = the device is never idle.
- **CPU**: seconds that all threads of the process worked, per picture.
"""
_AUTOENCODER = """## Stable Diffusion's autoencoder on this machine

Its architecture with random weights, float32, at {resolution} px on {device}: {pictures} pictures in batches of
{batch_size}.

- **bare model**: the same pictures from memory, already decoded, batch after batch.
- **job**, **usual loop**: as above. The share is the bare model's time over the run's.
- Where device and host are the same cores, decoding takes its time from the model, and no job can reach 1.
"""
_MEMORY = """## Memory

Peak resident memory of two jobs that differ in their number of image shards alone, each in a process of its own
(`VmHWM`); the difference over the added shards, so that start-up is subtracted. `bytes_per_added_shard` is the larger
of the two.

- **tiny shards**: of {tiny_samples} pictures, encoded from first to last; what a shard leaves behind in each stage.
- **finished shards**: of {finished_samples:,} samples (img2dataset's default) of {buckets} sizes, encoded by earlier
  runs. The job reads every receipt twice and folds the manifest; what grows with a shard's samples. Tars are sparse
  files, receipts are true ones.
- The fewer shards are past some 1,000: below, Python's table of interned strings is made anew twice, in steps of 7 and
  15 MB that belong to no shard. Between 200 and 2,200 shards, steps included, it was 11,850 bytes a shard.
"""
_AGAIN = """## How to repeat it

```
{command}
```

`--size small` takes a few minutes, `--size large` hours; `--root s3://bucket/prefix` measures against a store.
Nothing else should run on the machine: the load average before the start is above.
"""


def summary(result: dict[str, Any]) -> str:
    """The main figures as aligned text."""
    parts = [_simulated_rows(result["simulated_device"]), _real_rows(result["sd_autoencoder"])]
    parts.append(_memory_rows(result["memory"]))
    return "\n\n".join(map(aligned, parts)) + "\n\n" + "\n".join(_verdicts(result)) + "\n"


def page(result: dict[str, Any], command: str) -> str:
    """The whole page: figures, what they mean, machine, versions, sizes, and the command that measures them again."""
    sizes, simulated, real = result["sizes"], result["simulated_device"], result["sd_autoencoder"]
    parts = [
        _HEAD,
        "\n".join(f"- {verdict}" for verdict in _verdicts(result)) + "\n",
        _SIMULATED.format(**sizes["simulated"] | simulated, milliseconds=simulated["device_seconds"] * 1e3),
        markdown(_simulated_rows(simulated)),
        _rounds(simulated, "job_over_device", "naive_over_device"),
        _AUTOENCODER.format(**sizes["autoencoder"] | real),
        markdown(_real_rows(real)),
        _rounds(real, "job_over_model", "naive_over_model"),
        _MEMORY.format(**sizes["memory"]),
        markdown(_memory_rows(result["memory"])),
        "## Machine and versions\n",
        markdown([["", ""], *setting_rows(result["setting"])]),
        _AGAIN.format(command=command),
    ]
    return "\n".join(parts)


def _verdicts(result: dict[str, Any]) -> list[str]:
    device, memory = result["encode_over_device"], result["bytes_per_added_shard"]
    return [
        f"encode_over_device: {device:.3f}, to be at least {LEAST_OVER_DEVICE}: {passed(device >= LEAST_OVER_DEVICE)}",
        f"bytes_per_added_shard: {memory:,.0f}, to be below {MOST_BYTES:,}: {passed(memory < MOST_BYTES)}",
    ]


def _simulated_rows(part: dict[str, Any]) -> Rows:
    rows = [["simulated device", "pictures/s", "ms each", "CPU ms each", "of the device's rate", "best round"]]
    rows.append(["device", f"{1 / part['device_seconds']:.1f}", f"{part['device_seconds'] * 1e3:.2f}", "0", "1", ""])
    return [*rows, *(_run(part, *run) for run in (("host", ""), ("job", "device"), ("naive", "device")))]


def _real_rows(part: dict[str, Any]) -> Rows:
    rows = [["SD autoencoder", "pictures/s", "ms each", "CPU ms each", "of the model's rate", "best round"]]
    return [*rows, *(_run(part, *run) for run in (("model", ""), ("job", "model"), ("naive", "model")))]


def _run(part: dict[str, Any], run: str, over: str) -> list[str]:
    """Medians of one kind of run, and its best share."""
    median, best = part["median"], part["best"]
    seconds, share = median[f"{run}_seconds"], f"{run}_over_{over}"
    return [
        _NAMES[run],
        f"{1 / seconds:.4g}",
        f"{seconds * 1e3:.2f}",
        f"{median[f'{run}_cpu_seconds'] * 1e3:.2f}",
        f"{median[share]:.3f}" if over else "",
        f"{best[share]:.3f}" if over else "",
    ]


def _memory_rows(memory: dict[str, Any]) -> Rows:
    rows = [["memory", "shards", "peak MiB", "bytes an added shard"]]
    for name in ("tiny_shards", "finished_shards"):
        job = memory[name]
        counts = " and ".join(f"{shards:,}" for shards in job["shards"])
        peaks = " and ".join(f"{peak / 2**20:.1f}" for peak in job["peak_bytes"])
        rows.append([name.replace("_", " "), counts, peaks, f"{job['bytes_per_added_shard']:,.0f}"])
    return rows


def _rounds(part: dict[str, Any], *names: str) -> str:
    """The shares of each round, in words."""
    said = (f"{_NAMES[name.partition('_')[0]]} {listed(one[name] for one in part['rounds'])}" for name in names)
    return f"Medians of {len(part['rounds'])} rounds; round by round: {'; '.join(said)}.\n"
