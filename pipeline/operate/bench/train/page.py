"""The figures of `lathe bench train` for a person: a few tables in the terminal, or a page in Markdown."""

from __future__ import annotations

from typing import Any

from pipeline.operate.bench.tables import Rows, aligned, listed, markdown, passed, setting_rows
from pipeline.operate.bench.train.gpu import STATED_BATCH, STATED_GPU, STATED_SHARE

MOST_OVER_BARE = 1.03

_NAMES = {
    "trainer": "whole trainer",
    "bare": "bare loop",
    "bare_averaged": "bare loop, average in the optimizer",
    "usual": "usual way",
}
_HEAD = """# Training, measured

Written by `lathe bench train`: what does the trainer cost beside a bare loop, and what does encoding beforehand save?
"""
_REFERENCE = """## The reference network

Stable Diffusion 1.5's UNet with all widths divided by four ({parameters:,} parameters), text embeddings of 77 x 192,
latents of 4 x 32 x 32 (pictures of 256 px), {batch} samples a rank and step; {ranks} rank(s) on {device}, {threads}
threads each, ZeRO-{zero_stage}, {precision}.

- **whole trainer**: `lathe train` as it comes, with its loader on local files, noise and times, posterior samples,
  averages, metrics and log (one line in {steps} steps, {log_ratio:g} times as often as by default); no checkpoints.
- **bare loop**: DeepSpeed's engine with the same settings, torch's fused AdamW, and one batch in memory: forward,
  backward, step.
- **bare loop, average in the optimizer**: the same with the trainer's optimizer.
- **usual way**: as diffusers' `train_text_to_image.py`: Stable Diffusion's autoencoder and text encoder, their widths
  divided by four too so that all keep their shares of the work, encode in the loop, and `EMAModel` keeps the average.
  Pictures lie in memory, decoded, and captions as tokens, so reading and decoding them is not counted.

All take turns of {steps} steps in one process, in opposite order every other time, so that a noisy neighbour meets
all. Ratios are of turns in the same round; intervals are 95 %, by bootstrap.
"""
_TINY = """## What a step costs the host

A network of next to nothing on the same latents, {batch} samples a step: what the trainer adds to the bare loop is not
lost among what the network takes. CPU time is that of all threads of the process.

- On a GPU the work on tensors in it (noise, whitening, averages) is the device's; here it is the host's.
- Set against a GPU's step, as if none of it were hidden behind the device's work: Stable Diffusion 1.5's UNet at 256
  px, {stated_batch} pictures a GPU, at {stated_share:.0%} of the peak of an {stated_gpu}, takes
  {stated_milliseconds:.0f} ms (its operations by torch's own counter); the added time would be {projected:.2%} of it.
"""
_AGAIN = """## How to repeat it

```
{command}
```

On GPUs the same command tells MFU: the network's operations, by torch's own counter, over what the devices could do in
their time. `--ranks` starts more ranks. Nothing else should run on the machine: the load average before the start is
above.
"""


def summary(result: dict[str, Any]) -> str:
    """The main figures as aligned text."""
    parts = [_rows("reference", result["reference"]), _rows("tiny", result["tiny"])]
    return "\n\n".join(map(aligned, parts)) + "\n\n" + "\n".join(_verdicts(result)) + "\n"


def page(result: dict[str, Any], command: str) -> str:
    """The whole page: figures, what they mean, machine, versions, and the command that measures them again."""
    sizes, reference, tiny = result["sizes"], result["reference"], result["tiny"]
    about = {**sizes, **sizes["reference"], **reference, "log_ratio": 20 / sizes["reference"]["steps"]}
    stated = {"stated_batch": STATED_BATCH, "stated_share": STATED_SHARE, "stated_gpu": STATED_GPU}
    parts = [
        _HEAD,
        "\n".join(f"- {verdict}" for verdict in _verdicts(result)) + "\n",
        _REFERENCE.format(**about),
        markdown(_rows("reference", reference)),
        _rounds(reference),
        _TINY.format(
            **sizes["tiny"],
            **stated,
            stated_milliseconds=1e3 * result["stated_step_seconds"],
            projected=1e-3 * result["added_cpu_milliseconds"] / result["stated_step_seconds"],
        ),
        markdown(_rows("tiny", tiny)),
        _rounds(tiny),
        "## Machine and versions\n",
        markdown([["", ""], *setting_rows(result["setting"])]),
        _AGAIN.format(command=command),
    ]
    return "\n".join(parts)


def _verdicts(result: dict[str, Any]) -> list[str]:
    over, added = result["step_over_bare"], result["tiny"]["added_cpu_milliseconds"]
    told = [
        f"step_over_bare: {_with_interval(result['reference']['over']['bare'])}, to be at most {MOST_OVER_BARE}:"
        f" {passed(over <= MOST_OVER_BARE)}",
        f"added_cpu_milliseconds a step: {_with_interval(added, 1)}",
        f"usual_over_step, what encoding beforehand saves: {_with_interval(result['reference']['usual_over_step'], 2)}",
    ]
    speed = result["reference"]["flops_per_second"]
    told.append(f"the network's operations: {speed / 1e12:.3g} TFLOP/s" + _mfu(result["reference"]["mfu"]))
    return told


def _mfu(mfu: float | None) -> str:
    return f", MFU {mfu:.1%}" if mfu is not None else "; no MFU, since this device's peak is not known"


def _with_interval(figure: dict[str, float], places: int = 3) -> str:
    median, low, high = (f"{figure[name]:.{places}f}" for name in ("median", "low", "high"))
    return f"{median} ({low} to {high})"


def _rows(kind: str, part: dict[str, Any]) -> Rows:
    rows = [[kind, "ms a step", "CPU ms a step", "trainer over it", "95 % interval"]]
    for name, seconds in part["seconds"].items():
        over = part["over"].get(name)
        ratio = [f"{over['median']:.3f}", f"{over['low']:.3f} to {over['high']:.3f}"] if over else ["", ""]
        rows.append([_NAMES[name], f"{1e3 * seconds:.1f}", f"{1e3 * part['cpu_seconds'][name]:.1f}", *ratio])
    return rows


def _rounds(part: dict[str, Any]) -> str:
    over = [turns["trainer"]["seconds"] / turns["bare"]["seconds"] for turns in part["rounds"]]
    return f"Medians of {len(over)} rounds; the trainer over the bare loop, round by round: {listed(over)}.\n"
