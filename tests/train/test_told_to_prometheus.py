"""What a run tells Prometheus: by every rank, the values of its own log, through kills and restarts; at no cost."""

from __future__ import annotations

import os
import resource
import signal
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from scraping import scraped, target
from torch.utils._python_dispatch import TorchDispatchMode
from training_run import SMALL, Run, finish, ranks_of

from pipeline.config import TrainConfig
from pipeline.data.datasets import open_datasets
from pipeline.errors import LatheError
from pipeline.metrics import DEFINITIONS, read_log
from pipeline.runtime import process
from pipeline.stopping import SAID
from pipeline.storage import open_store
from pipeline.train.progress import Progress
from pipeline.train.skipped_steps import LIMIT, SkippedSteps
from pipeline.train.speed import memory
from pipeline.train.trainer import Trainer


@pytest.mark.ranks
def test_every_rank_is_found_and_tells_what_the_log_has(tmp_path, latents):
    targets = tmp_path / "targets"
    settings: dict[str, Any] = {
        "metrics": {"discovery": str(targets), "peak_flops": 1e12},
        "engine": {**SMALL["engine"], "zero_stage": 0},
        "steps": 100_000,
        "optimizer": {"warmup_steps": 3, "schedule": "constant"},
    }
    run = Run(tmp_path, latents, **settings)
    child = run.launch()
    try:
        run.wait_for_step(6, child)
        files = [targets / f"lathe-train-run-{rank}.json" for rank in (0, 1)]
        mine, other = (scraped(target(file)) for file in files)
        lines = {line["step"]: line for line in read_log(run.store) if "loss" in line}
        for rank in ranks_of(child):
            rank.send_signal(signal.SIGKILL)
    finally:
        child.kill()
        child.communicate()
    assert sorted(targets.iterdir()) == files  # so that somebody notices

    line = lines[int(mine["lathe_train_step"])]
    definitions = {d.key: d for d in DEFINITIONS if "train" in d.jobs}
    assert set(line) - {"step", "time"} <= set(definitions)
    for key, value in line.items():
        if key != "time" and not key.startswith("checkpoint_"):  # there may be a newer one
            labels = definitions[key].labels
            for label, number in value.items() if labels else [("", value)]:
                series = f"lathe_train_{key}" + "".join(f"{{{name}={label}}}" for name in labels)
                assert mine[series] == pytest.approx(number, rel=1e-8), key
    parts = ("data_wait", "ranks_wait", "forward_backward", "optimizer", "logging")
    assert sum(line[f"{part}_seconds"] for part in parts) == pytest.approx(line["step_seconds"], rel=0.35)
    assert (line["restarts"], line["world_size"]) == (0, 2)
    assert line["straggler_ratio"] >= 1
    assert 0 < line["mfu_ratio"] < 1
    assert line["noise_level_loss"]

    told = {name for name in other if name.startswith("lathe_train_")}
    local = {d.name("train") for d in definitions.values() if d.scope == "local" and "device" not in d.key}
    assert told == local
    assert other["lathe_train_rank_step"] >= line["step"]
    assert abs(time.time() - other["lathe_train_rank_last_step_timestamp_seconds"]) < 60
    assert other["lathe_storage_requests_total{operation=read}"] > 0

    again = run.launch()
    run.wait_for_step(line["step"] + 20, again)
    os.kill(again.pid, signal.SIGTERM)
    finish(again, code=128 + signal.SIGTERM)
    assert read_log(run.store)[-1]["restarts"] == 1
    assert list(targets.iterdir()) == []


def test_losses_and_weights_are_the_same_with_and_without(tmp_path, latents):
    config = TrainConfig.model_validate(
        {
            "manifest": latents,
            **SMALL,
            "engine": {"zero_stage": 0, "accumulation": 2},
            "output": str(tmp_path / "run"),
            "metrics": {"pushgateway": "http://127.0.0.1:9"},
        }
    )
    ranks = process.start(config.engine)
    try:
        found = [_trained(config, ranks, tmp_path / name, told=told) for name, told in (("on", True), ("off", False))]
    finally:
        ranks.finish()
    assert found[0] == found[1]


def test_a_process_that_can_open_no_files_tells_what_it_knows():
    files = resource.getrlimit(resource.RLIMIT_NOFILE)
    cpu = torch.device("cpu")
    assert set(memory(cpu)) == {"resident_memory_bytes", "host_memory_available_bytes"}
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, files[1]))
        found = memory(cpu)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, files)
    assert found == {}


@pytest.mark.alone
@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
def test_one_that_is_stopped_before_its_first_step_says_so_and_is_not_missed(tmp_path, latents, number):
    targets = tmp_path / "targets"
    run = Run(tmp_path, latents, metrics={"discovery": str(targets)}, engine={"zero_stage": 0})
    run.output.mkdir()
    (run.output / "metrics.jsonl").write_text('{"step": 1, "time": 0, "loss": 1}\n' * 500_000)  # to be read until then
    child = run.start(ranks=1)
    while not (targets.exists() and list(targets.glob("*.json"))):
        assert child.poll() is None, child.communicate()[0]
        time.sleep(0.01)
    os.kill(child.pid, number)
    assert SAID in finish(child, code=128 + number)
    assert not list(targets.iterdir())


@pytest.mark.alone
def test_one_that_is_asked_to_stop_after_its_last_step_has_finished(tmp_path, latents):
    class Gateway(BaseHTTPRequestHandler):
        def do_PUT(self):
            asked.append(self.command)
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.end_headers()

        do_DELETE = do_PUT  # noqa: N815

    asked: list[str] = []
    with ThreadingHTTPServer(("127.0.0.1", 0), Gateway) as gateway:
        threading.Thread(target=gateway.serve_forever, args=(0.01,), daemon=True).start()
        pushed = {"pushgateway": f"http://127.0.0.1:{gateway.server_port}", "pushgateway_linger_seconds": 600}
        run = Run(tmp_path, latents, steps=4, metrics=pushed, engine={"zero_stage": 0})
        child = run.start(ranks=1)
        run.wait_for_step(4, child)
        while "stay at the Pushgateway" not in (tmp_path / "0.said").read_text():
            assert child.poll() is None, child.communicate()[0]
            time.sleep(0.01)
        os.kill(child.pid, signal.SIGTERM)
        assert "stopped" not in finish(child)
        gateway.shutdown()
    assert asked[-1] == "DELETE"


def test_steps_that_are_not_finite_are_told_before_they_end_the_run(tmp_path, make_latents, monkeypatch):
    def spoil(number: int, moments: Any) -> None:
        moments[0, 0, 0] = float("nan")

    latents = make_latents(tmp_path / "spoilt", change=spoil)
    changes = {"output": str(tmp_path / "run"), "log_every": 20, "engine": {"zero_stage": 0, "precision": "float16"}}
    config = TrainConfig.model_validate({"manifest": latents, **SMALL, **changes})
    ranks = process.start(config.engine)
    try:
        trainer = Trainer(config, ranks, open_datasets(config.sources, global_batch=8), open_store(config.output))

        def told(key: str) -> float | None:
            return trainer.metrics.registry.get_sample_value(f"lathe_train_{key}")

        seen, step, resume = [], trainer.train_step, trainer.saves.resume

        def resumed(progress: Progress) -> None:
            resume(progress)
            progress.step, progress.skipped = 3, SkippedSteps(total=2)

        def watched(batch: Any) -> torch.Tensor:
            seen.append((told("skipped_steps"), told("checkpoint_step"), told("loss_scale")))
            return step(batch)

        monkeypatch.setattr(trainer.saves, "resume", resumed)
        monkeypatch.setattr(trainer, "train_step", watched)
        with pytest.raises(LatheError, match="not finite in 10 steps in a row"):
            trainer.run()
        assert seen[0] == (2, 3, 65536)  # against which an increase is seen
        assert seen == sorted(seen)
        assert 2 < seen[-1][0] < 2 + LIMIT
        assert told("skipped_steps") == 2 + LIMIT
        assert told("loss") is None  # no line of the log was due
        trainer.metrics.close()
    finally:
        ranks.finish()


class _Waits(TorchDispatchMode):
    """Counts how often the host asks for a number of the device, or for a tensor of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        ops = torch.ops.aten
        self.count += func in (ops._local_scalar_dense.default, ops.is_nonzero.default, ops._to_copy.default)
        return func(*args, **(kwargs or {}))


def test_between_lines_of_the_log_nothing_is_waited_for_nor_reduced(tmp_path, latents, monkeypatch):
    config = TrainConfig.model_validate(
        {
            "manifest": latents,
            **SMALL,
            "engine": {"zero_stage": 0},
            "output": str(tmp_path / "run"),
            "log_every": 10,
            "checkpoint": {"every": 100},
        }
    )
    reductions = []
    plain = torch.distributed.all_reduce
    monkeypatch.setattr(
        torch.distributed, "all_reduce", lambda *args, **kwargs: reductions.append(1) or plain(*args, **kwargs)
    )
    ranks = process.start(config.engine)
    try:
        found = {}
        for told in (True, False):
            trainer = Trainer(config, ranks, open_datasets(config.sources, global_batch=8), open_store(config.output))
            if not told:
                trainer.levels = None
            steps = trainer.steps()
            next(steps)
            with _Waits() as waits:
                before = len(reductions)
                for _ in range(3):
                    next(steps)
                found[told] = waits.count, len(reductions) - before
            steps.close()
            trainer.metrics.close()
    finally:
        ranks.finish()
    assert found[True] == found[False]
    assert found[True][1] == 3  # of the flags that travel with each step


def _trained(config: TrainConfig, ranks: process.Process, output: Path, *, told: bool) -> tuple[list[float], int]:
    """Losses of 5 steps, and the weights' digest."""
    metrics = config.metrics if told else config.metrics.model_copy(update={"prometheus": False, "pushgateway": None})
    config = config.model_copy(update={"output": str(output), "metrics": metrics})
    datasets = open_datasets(config.sources, global_batch=config.global_batch)
    trainer = Trainer(config, ranks, datasets, open_store(config.output))
    if not told:
        trainer.levels = None
    steps = trainer.steps()
    for _ in range(5):
        next(steps)
    steps.close()
    lines = [line for line in read_log(open_store(config.output)) if "loss" in line]
    assert all(("noise_level_loss" in line) == told for line in lines)
    weights = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    return [line["loss"] for line in lines], hash(weights.numpy().tobytes())
