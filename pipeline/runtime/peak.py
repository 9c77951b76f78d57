"""What GPUs can do at most."""

from __future__ import annotations

# Dense half precision, floating point operations a second: the vendors' data sheets. Longer names come first.
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


def peak_flops(name: str, precision: str) -> float | None:
    """Operations a second of a device by its name; None where it is not known, or in float32."""
    if precision == "float32":
        return None
    return next((rate for part, rate in _PEAK.items() if part in name), None)
