"""What is trained and saved: a fixed UNet in one rank's plain engine, on inputs that cost nothing."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from pipeline.config import AverageConfig, EngineConfig, OptimizerConfig, UNetConfig
from pipeline.data.threads import WorkerThreads
from pipeline.models import unet
from pipeline.runtime import engine, process, state
from pipeline.storage import Store
from pipeline.train.optimizer import AdamWithEMA, parameter_groups
from pipeline.train.saver import Save, Saver
from pipeline.train.shelf import Shelf, newest_and_every

CHANNELS, TEXT_WIDTH, TOKENS, RATE = 4, 128, 77, 1e-4


@dataclass
class Target:
    """A store, and who saves to it."""

    store: Store
    saver: Saver
    done: list[Save]


class _Network(torch.nn.Module):
    """The UNet's prediction alone."""

    def __init__(self, widths: tuple[int, ...], side: int) -> None:
        super().__init__()
        blocks = len(widths)
        config = UNetConfig(
            block_out_channels=widths,
            down_block_types=("CrossAttnDownBlock2D",) * blocks,
            up_block_types=("CrossAttnUpBlock2D",) * blocks,
        )
        self.unet = unet.build(config, CHANNELS, side, TEXT_WIDTH)

    def forward(self, noisy: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        output: Tensor = self.unet(noisy, timestep, text).sample
        return output


class Bed:
    """A world of one rank that trains; steps, copies and saves of it.

    Args:
        widths: of the UNet's levels.
        side: of the latents.
        batch: samples of a step.
    """

    def __init__(self, widths: tuple[int, ...], side: int, batch: int) -> None:
        config, chosen = EngineConfig(zero_stage=0), OptimizerConfig(learning_rate=RATE)
        self.ranks = process.start(config)
        torch.manual_seed(0)
        network = _Network(widths, side)
        self.parameters = sum(p.numel() for p in network.parameters())
        optimizer = AdamWithEMA(parameter_groups(network, 0.01), chosen, (AverageConfig(decay=0.999),))
        self.engine = engine.build(self.ranks, network, optimizer, config, micro_batch=batch, gradient_clip=1.0)
        device = self.ranks.device
        self._inputs = (
            torch.randn(batch, CHANNELS, side, side, device=device),
            torch.full((batch,), 500, device=device),
            torch.randn(batch, TOKENS, TEXT_WIDTH, device=device),
        )
        self._spans = state.spans(self.engine)
        pinned = device.type == "cuda"
        self._copies = [
            {key: torch.zeros(tensor.shape, pin_memory=pinned) for key, tensor in span.tensors(self.engine).items()}
            for span in self._spans
        ]
        self.state_bytes = sum(4 * copy.numel() for copies in self._copies for copy in copies.values())
        self._worker = WorkerThreads(1, "lathe-save")
        self._step = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._worker.close(5.0)
        self.ranks.finish()

    def target(self, store: Store) -> Target:
        """Who saves to a store, and keeps one checkpoint there."""
        done: list[Save] = []
        shelf = Shelf(store, newest_and_every(1))
        return Target(
            store,
            Saver(store, self.ranks, self.engine, self._worker, shelf, texts={}, when_done=done.append),
            done,
        )

    def steps(self, count: int) -> list[float]:
        """Seconds of each step."""
        return [self._timed(self._train) for _ in range(count)]

    def copy(self) -> float:
        """Seconds of one plain copy of the state, tensor by tensor, into memory that was used before."""
        tensors = [span.tensors(self.engine) for span in self._spans]

        def work() -> None:
            for copies, sources in zip(self._copies, tensors, strict=True):
                for key, copy in copies.items():
                    copy.copy_(sources[key], non_blocking=True)
            self._wait()

        return self._timed(work)

    def stall(self, target: Target) -> float:
        """Seconds that training stands still for a checkpoint; it is on its way afterwards."""
        return self._timed(lambda: target.saver.begin(self._step, counters={}, notes={}))

    def steps_until_stored(self, target: Target) -> list[float]:
        """Train until the checkpoint on its way is stored. Seconds of the steps that were whole by then."""
        found, before = [], len(target.done)
        while len(target.done) == before:
            found.append(self._timed(self._train))
            target.saver.hear(self.ranks.largest(*target.saver.flags))
        return found[:-1] or found

    def _train(self) -> None:
        prediction = self.engine(*self._inputs)
        self.engine.backward(prediction.square().mean())
        self.engine.step(RATE)
        self._step += 1
        self._wait()

    def _timed(self, work: Callable[[], object]) -> float:
        self._wait()
        started = time.perf_counter()
        work()
        return time.perf_counter() - started

    def _wait(self) -> None:
        if self.ranks.device.type == "cuda":
            torch.cuda.synchronize()
