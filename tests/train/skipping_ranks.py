"""Run by both ranks of `test_skipping.py`: whole trainings in one pair of processes, on data that break their steps.

Usage: skipping_ranks.py FOLDER LEARNABLE ALL_BROKEN; rank r leaves `RANK.json`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState
from training_run import SMALL

from pipeline.config import TrainConfig
from pipeline.data.datasets import open_datasets
from pipeline.errors import LatheError
from pipeline.metrics import read_log
from pipeline.runtime import process, state
from pipeline.runtime.process import Process
from pipeline.storage import open_store
from pipeline.train import checkpoint
from pipeline.train.trainer import Trainer

STEPS = 40
ENGINES = {"ddp": 0, "zero1": 1, "zero2": 2, "zero3": 3}


def trainer(ranks: Process, folder: Path, latents: str, **changes: Any) -> Trainer:
    AcceleratorState._reset_state()  # one engine a process is the rule; here several are tried
    given = {**SMALL, "manifest": latents, "output": str(folder), "steps": STEPS, **changes}
    given["engine"] = {**SMALL["engine"], **changes.get("engine", {})}
    given["checkpoint"] = {"every": 1000}
    config = TrainConfig.model_validate(given)
    datasets = open_datasets(config.sources, global_batch=config.global_batch)
    return Trainer(config, ranks, datasets, open_store(config.output))


def trained(ranks: Process, folder: Path, latents: str, **engine: Any) -> dict[str, Any]:
    """A run of which one step in five has a sample that is not finite."""
    run = trainer(ranks, folder, latents, engine=engine, optimizer={"warmup_steps": 3, "schedule": "constant"})
    run.run()
    losses = [line["loss"] for line in read_log(run.store) if "loss" in line] if ranks.is_main else []
    return {
        "losses": losses,
        "skipped": run.progress.skipped.total,
        "updates": state.optimizer_step(run.engine),
        "counters": checkpoint.find(run.store)[0].run()["counters"],
    }


def ended(run: Trainer) -> dict[str, Any]:
    """How a run fails."""
    try:
        run.run()
    except LatheError as error:
        return {"message": error.message, "remedy": error.remedy, "step": run.progress.step}
    return {}


def poisoned(ranks: Process, folder: Path, latents: str) -> dict[str, Any]:
    """Weights that are not finite from the start."""
    run = trainer(ranks, folder, latents, engine={"zero_stage": 0})
    for fragment in state.fragments(run.engine):
        fragment.tensors[state.WEIGHT].fill_(float("nan"))
    run.engine.refresh()
    return ended(run)


def main(folder: Path, latents: str, broken: str) -> None:
    ranks = process.start(TrainConfig.model_validate({"manifest": "m", "output": "o", **SMALL}).engine)
    result: dict[str, Any] = {"trained": {}}
    for name, stage in ENGINES.items():
        for precision in ("float32", "bfloat16"):
            settings = {"zero_stage": stage, "precision": precision}
            result["trained"][f"{name} {precision}"] = trained(
                ranks, folder / f"{name}-{precision}", latents, **settings
            )
    settings = {"zero_stage": 0, "precision": "float16", "loss_scale": {"initial_power": 8}}
    result["trained"]["ddp float16"] = trained(ranks, folder / "float16", latents, **settings)
    result["data"] = ended(trainer(ranks, folder / "data", broken, engine={"zero_stage": 2}))
    half = {"zero_stage": 0, "precision": "float16"}
    result["data float16"] = ended(trainer(ranks, folder / "data-float16", broken, engine=half))
    result["weights"] = poisoned(ranks, folder / "weights", latents)
    huge = {"learning_rate": 1e30, "warmup_steps": 0, "schedule": "constant", "gradient_clip": 0.0}
    result["rate"] = ended(trainer(ranks, folder / "rate", latents, engine={"zero_stage": 1}, optimizer=huge))
    (folder / f"{ranks.rank}.json").write_text(json.dumps(result))
    ranks.finish()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
