"""What GPUs can do, for figures that are shares of it."""

from __future__ import annotations

# Dense half precision, floating point operations a second: the vendors' data sheets
_PEAK = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "A10": 125e12,
    "V100": 125e12,
    "MI300X": 1307e12,
    "MI250": 383e12,
}

# The step that added CPU time is set against: Stable Diffusion 1.5's UNet at 256 px, forward and backward, as torch's
# own counter has it; 32 pictures a GPU, at 40 % of an A100's peak.
SD15_FLOPS = 537_342_853_120
STATED_BATCH, STATED_SHARE, STATED_GPU = 32, 0.4, "A100"


def stated_step_seconds() -> float:
    """Seconds of that step."""
    return SD15_FLOPS * STATED_BATCH / (STATED_SHARE * _PEAK[STATED_GPU])


def peak(name: str, precision: str) -> float | None:
    """Operations a second of a device by its name; None where it is not known, or in float32."""
    if precision == "float32":
        return None
    return next((rate for part, rate in _PEAK.items() if part in name), None)
