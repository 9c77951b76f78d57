"""What is compared: the whole trainer, and bare DeepSpeed loops of the same network with one batch in memory."""

from __future__ import annotations

import deepspeed
import torch
from torch import nn

from pipeline.config import TrainConfig
from pipeline.data.datasets import open_datasets
from pipeline.data.manifest import Manifest
from pipeline.diffusion.loss import weighted_loss
from pipeline.runtime.process import Process
from pipeline.storage import open_store
from pipeline.train.examples import Example
from pipeline.train.network import build_network
from pipeline.train.optimizer import AdamWithEMA, parameter_groups
from pipeline.train.telling import engine_configuration
from pipeline.train.trainer import Trainer


class WholeTrainer:
    """`lathe train`, stopped between two steps for as long as others have their turn."""

    def __init__(self, config: TrainConfig, ranks: Process) -> None:
        datasets = open_datasets(config.sources, global_batch=config.global_batch, mixing=config.loader.mixing)
        self.trainer = Trainer(config, ranks, datasets, open_store(config.output))
        self._steps = self.trainer.steps()
        self.manifest = datasets.manifests[0]
        self.parameters = sum(self.trainer.sizes.values())

    def __call__(self, steps: int) -> None:
        """So many steps."""
        for _ in range(steps):
            next(self._steps)

    def one_example(self) -> Example:
        """A batch in memory, for the others. After the first step."""
        trainer = self.trainer
        batch = trainer.loader.take(lambda: False)
        if batch is None:
            raise AssertionError("the loader has no end")
        return trainer.examples.of(batch, 1.0)


class BareLoop:
    """DeepSpeed's engine, forward, backward, step; nothing else.

    Args:
        config: the trainer's run file.
        ranks: this rank among the others.
        manifest: of the latents, for the network's geometry.
        example: the batch that every step is made with.
        averaged: keep the run's averages too, in the optimizer.
    """

    def __init__(
        self, config: TrainConfig, ranks: Process, manifest: Manifest, example: Example, *, averaged: bool = False
    ) -> None:
        network = build_network(config, manifest).to(ranks.device)
        self._example = example
        self._engine, *_ = deepspeed.initialize(
            model=network,
            optimizer=_optimizer(network, config, averaged=averaged),
            config=engine_configuration(config, ranks.world_size),
            dist_init_required=False,
        )

    def __call__(self, steps: int) -> None:
        """So many steps."""
        example = self._example
        for _ in range(steps):
            prediction = self._engine(*example.inputs)
            self._engine.backward(weighted_loss(prediction, example.target, example.weight))
            self._engine.step()


def _optimizer(network: nn.Module, config: TrainConfig, *, averaged: bool) -> torch.optim.Optimizer:
    chosen = config.optimizer
    groups = parameter_groups(network, chosen.weight_decay)
    if averaged:
        return AdamWithEMA(groups, chosen, config.ema.averages)
    return torch.optim.AdamW(groups, lr=chosen.learning_rate, betas=chosen.betas, eps=chosen.epsilon, fused=True)
