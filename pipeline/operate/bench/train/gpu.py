"""A step of a GPU, for figures that are shares of it."""

from __future__ import annotations

from pipeline.runtime.peak import peak_flops

# The step that added CPU time is set against: Stable Diffusion 1.5's UNet at 256 px, forward and backward, as torch's
# own counter has it; 32 pictures a GPU, at 40 % of an A100's peak.
SD15_FLOPS = 537_342_853_120
STATED_BATCH, STATED_SHARE, STATED_GPU = 32, 0.4, "A100"


def stated_step_seconds() -> float:
    """Seconds of that step."""
    return SD15_FLOPS * STATED_BATCH / (STATED_SHARE * (peak_flops(STATED_GPU, "bfloat16") or 0.0))
