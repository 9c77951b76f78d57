"""What is trained by whom, and for how long."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from pipeline.config import TrainConfig
from pipeline.errors import ConfigError

# Stable Diffusion 1.5's UNet with all widths divided by 4: a sixteenth of its work in every layer, and 32x32 latents
REFERENCE: dict[str, Any] = {
    "unet": {
        "block_out_channels": (80, 160, 320, 320),
        "down_block_types": (*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"),
        "up_block_types": ("UpBlock2D", *["CrossAttnUpBlock2D"] * 3),
        "layers_per_block": 2,
        "attention_head_dim": 8,
        "norm_num_groups": 16,
    },
    "text": {"mode": "cached"},
}
# diffusers' usual way runs these beside it: Stable Diffusion's autoencoder and text encoder, divided by 4 too
ENCODERS = {"autoencoder_widths": (32, 64, 128, 128), "text_width": 192, "text_layers": 12, "text_heads": 3}
# so little of a network that nearly all of a step is the trainer's own work
TINY: dict[str, Any] = {
    "unet": {
        "block_out_channels": (16, 16),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D"),
        "attention_head_dim": 2,
        "norm_num_groups": 8,
    },
    "text": {"mode": "cached"},
}


@dataclass(frozen=True)
class Pairs:
    """Turns of the trainer and of the bare loops, one after the other.

    Args:
        network: of the run file, `unet` and `text`; and what it says of the `engine`.
        batch: samples of one rank in a step.
        steps: of a turn.
        pairs: of turns.
        warmup: steps of everyone before the first turn.
        encoders: of the usual way, see `Encoders`; None = it takes no part.
    """

    network: dict[str, Any]
    batch: int
    steps: int
    pairs: int
    warmup: int = 3
    encoders: dict[str, Any] | None = None


@dataclass(frozen=True)
class TrainBench:
    """Sizes of the benchmark."""

    ranks: int = 1
    zero_stage: int = 2
    precision: str = "float32"
    samples: int = 4096
    reference: Pairs = field(default_factory=lambda: Pairs(REFERENCE, batch=4, steps=2, pairs=20, encoders=ENCODERS))
    tiny: Pairs = field(default_factory=lambda: Pairs(TINY, batch=16, steps=40, pairs=20, warmup=20))

    def config(self, pairs: Pairs, manifest: str, output: str) -> TrainConfig:
        """The run file of a pair's trainer: all as it comes, but that it logs once a turn and saves nothing."""
        most = 2 * (pairs.warmup + pairs.steps * (pairs.pairs + 2))
        return TrainConfig.model_validate(
            {
                "manifest": manifest,
                "output": output,
                **pairs.network,
                "engine": {
                    "zero_stage": self.zero_stage,
                    "precision": self.precision,
                    **pairs.network.get("engine", {}),
                },
                "steps": most,
                "global_batch": pairs.batch * self.ranks,
                "checkpoint": {"every": most},
                "log_every": pairs.steps,
            }
        )


_QUICK = Pairs(TINY, batch=4, steps=4, pairs=4)
SIZES = {
    "small": TrainBench(
        samples=512,
        reference=replace(_QUICK, network=REFERENCE, steps=1, warmup=1, encoders=ENCODERS),
        tiny=replace(_QUICK, steps=20, warmup=5),
    ),
    "standard": TrainBench(),
    "large": TrainBench(
        samples=65_536,
        reference=Pairs(REFERENCE, batch=64, steps=20, pairs=50, encoders=ENCODERS),
        tiny=Pairs(TINY, batch=64, steps=200, pairs=50, warmup=50),
    ),
}


def sized(name: str, *, repeats: int | None = None, **changes: Any) -> TrainBench:
    """The benchmark of one of `SIZES`.

    Args:
        name: of the size.
        repeats: pairs of turns; None = those of the size.
        **changes: other fields of TrainBench.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in SIZES:
        raise ConfigError(f"--size {name}: unknown", f"use one of {', '.join(SIZES)}")
    bench = replace(SIZES[name], **changes)
    if repeats is not None:
        bench = replace(
            bench, reference=replace(bench.reference, pairs=repeats), tiny=replace(bench.tiny, pairs=repeats)
        )
    return bench
