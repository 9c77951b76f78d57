"""`lathe train-vae`: the first-stage autoencoder (Rombach et al. 2022, section 3.1, KL variant), in one process.

A run is a function of its settings and pictures: batches, flips and posterior noise are keyed by seed and step, and
weights, average and optimizer state are all in the checkpoint. So a run that was killed goes on as if it had not been.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from typing import Any

import torch

from pipeline.config import FirstStageConfig, OptimizerConfig
from pipeline.console import table, tell
from pipeline.errors import ConfigError, DataError
from pipeline.memory import resident
from pipeline.metrics import Metrics, Place
from pipeline.models import autoencoder
from pipeline.storage import Store, counters, open_store
from pipeline.train import first_stage_checkpoint as checkpoint
from pipeline.train.first_stage_step import Training, reconstruction_psnr, settings
from pipeline.train.learning_rate import learning_rate
from pipeline.train.pictures import Pictures, read_pictures
from pipeline.train.run_notes import note_start

Progress = Callable[[int, int, str], None]

MARKER = "first_stage.json"


def fit_first_stage(config: FirstStageConfig, progress: Progress | None = None) -> str:
    """Train an autoencoder, validate its averaged weights on held-out pictures, and write it in diffusers' format.

    The output's marker, `first_stage.json`, is written last; where it is there already, nothing is done again.

    Args:
        config: the run file.
        progress: called with (steps done, steps in all, a note).

    Returns:
        One line on the result.

    Raises:
        ConfigError: the output holds an autoencoder, or checkpoints, of other settings.
        DataError: pictures that cannot be used, or a loss that is not finite.
        StorageError: shards or output cannot be read or written.
    """
    store = open_store(config.output)
    if store.exists(MARKER):
        found = json.loads(store.read(MARKER))
        _refuse_other(found["settings"], config, f"{config.output} holds an autoencoder")
        checkpoint.clear(store)  # of a run that was killed right after its marker
        return _describe(found, config.output)
    if config.threads:
        torch.set_num_threads(config.threads)
    pictures = read_pictures(config.images)
    training = Training(config, pictures)
    saved = checkpoint.restore(store)
    if saved is not None:
        _refuse_other(saved.facts["settings"], config, f"{config.output} holds checkpoints of a run")
        if saved.facts["pictures"] != pictures.digest:
            raise DataError(
                f"images.shards: the pictures are not those that {config.output}/{saved.name} was trained on",
                "choose another output, or delete the checkpoints there to start over",
            )
        training.restore(saved.tensors, saved.facts)
    with Metrics(
        config.metrics,
        "first_stage",
        Place(config.output),
        log_store=store,
        about=config.model_dump(mode="json"),
        traffic=counters,
    ) as metrics:
        tell(_introduction(training, pictures, metrics))
        metrics.resume(training.steps_done)
        metrics.set("checkpoint_step", training.steps_done)
        note_start(store, config, training.device, step=training.steps_done)
        _train(training, store, metrics, progress)
        facts = _finish(training, pictures, store, metrics)
    return _describe(facts, config.output)


def _introduction(training: Training, pictures: Pictures, metrics: Metrics) -> str:
    config = training.config
    return table(
        {
            "parameters": f"{sum(p.numel() for p in training.model.parameters()) / 1e6:.2f} M",
            "pictures": f"{len(pictures.train):,} to train on, {len(pictures.holdout):,} held out",
            "steps": f"{training.steps_done} to {config.steps} of {config.batch_size} pictures, {config.precision}",
            "metrics": metrics.address or "not served",
            "output": config.output,
        }
    )


def _train(training: Training, store: Store, metrics: Metrics, progress: Progress | None) -> None:
    config = training.config
    logged_at, logged_seconds = training.steps_done, training.seconds
    note = ""
    while training.steps_done < config.steps:
        training.step()
        metrics.set("last_step_timestamp_seconds", time.time())
        step = training.steps_done
        if step % config.log_every == 0 or step == config.steps:
            per_step = (training.seconds - logged_seconds) / (step - logged_at)
            values = _log(training, metrics, per_step)
            note = f"loss {values['loss']:.4f}, {values['psnr_db']:.1f} dB"
            logged_at, logged_seconds = step, training.seconds
        if step % config.checkpoint.every == 0 or step == config.steps:
            _save(training, store, metrics)
        if progress:
            progress(step, config.steps, note)


def _log(training: Training, metrics: Metrics, step_seconds: float) -> dict[str, float]:
    """Losses as means since the last logged step, the rest as of the last step. Raises DataError on a broken loss."""
    config, step = training.config, training.steps_done
    values = training.take_means()
    values |= {name: float(training.last[name]) for name in ("psnr_db", "gradient_norm")}
    if not math.isfinite(values["loss"]):
        raise DataError(
            f"the loss is not finite at step {step}",
            "lower kernel_learning_rate and optimizer.learning_rate, or use precision=float32",
        )
    seen = step * config.batch_size
    values |= {
        "learning_rate": learning_rate(step - 1, config.optimizer, config.steps),
        "target_steps": config.steps,
        "epoch": seen / len(training.pixels),
        "samples_seen": seen,
        "step_seconds": step_seconds,
        "images_per_second": config.batch_size / step_seconds,
        **resident(),
    }
    metrics.log(step, values)
    metrics.set("step", step)
    return values


def _save(training: Training, store: Store, metrics: Metrics) -> None:
    started, taken = time.monotonic(), time.time()
    metrics.flush()
    size = checkpoint.save(store, training.tensors(), training.facts(), training.config.checkpoint.keep)
    metrics.set("checkpoint_step", training.steps_done)
    metrics.set("checkpoint_bytes", size)
    metrics.note("checkpoint_seconds", time.monotonic() - started)
    metrics.set("checkpoint_timestamp_seconds", taken)


def _finish(training: Training, pictures: Pictures, store: Store, metrics: Metrics) -> dict[str, Any]:
    """Validate the average, write the autoencoder and then its marker; checkpoints are no longer needed."""
    model = training.model.eval()
    model.load_state_dict(training.ema)
    held_out = len(pictures.holdout) > 0
    psnr = reconstruction_psnr(model, pictures.holdout if held_out else pictures.train[:256])
    autoencoder.save(model, store)
    facts = {
        "psnr_db": psnr,
        "psnr_on": "held-out pictures" if held_out else "training pictures",
        "pictures": len(pictures.train),
        "holdout_pictures": len(pictures.holdout),
        "rejected": pictures.rejected,
        "steps": training.steps_done,
        "seconds": round(training.seconds, 1),
        "weights_hash": autoencoder.weights_hash(model),
        "settings": settings(training.config),
    }
    store.write(MARKER, (json.dumps(facts, indent=1) + "\n").encode())
    if held_out:  # once the marker stands nothing is done, or logged, again
        metrics.log(training.steps_done, {"holdout_psnr_db": psnr})
    checkpoint.clear(store)
    return facts


def _refuse_other(found: dict[str, Any], config: FirstStageConfig, what: str) -> None:
    """Raise ConfigError, naming the first field whose value is another one; those it does not know had the default."""
    optimizer = OptimizerConfig().model_dump(mode="json") | found.get("optimizer", {})
    theirs, ours = _flat({**found, "optimizer": optimizer}), _flat(settings(config))
    for field in ours | theirs:
        if theirs.get(field) != ours.get(field):
            raise ConfigError(
                f"{what} with {field}={theirs.get(field)}, and the run file says {ours.get(field)}",
                "choose another output, or delete what is there",
            )


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


def _describe(facts: dict[str, Any], output: str) -> str:
    return f"{output}: autoencoder after {facts['steps']} steps, {facts['psnr_db']:.2f} dB PSNR on {facts['psnr_on']}"
