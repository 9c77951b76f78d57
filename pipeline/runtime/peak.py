"""What GPUs can do at most."""

from __future__ import annotations

import re

# Dense half precision, floating point operations a second: the vendors' data sheets. Longer names come first.
_PEAK = {
    "B200": 2250e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "A10G": 70e12,
    "A10": 125e12,
    "V100-PCIE": 112e12,
    "V100": 125e12,
    "MI300X": 1307e12,
    "MI250X": 191.5e12,  # of one of its two dies, each of which is a device
    "MI250": 181e12,
}


def peak_flops(name: str, precision: str) -> float | None:
    """Operations a second of a device by its name; None where it is not known or a part of one, or in float32."""
    if precision == "float32" or _has(name, "MIG"):
        return None
    return next((rate for part, rate in _PEAK.items() if _has(name, part)), None)


def _has(name: str, part: str) -> bool:
    """As a word: an RTX A1000 is no A100."""
    return re.search(rf"(?<![A-Za-z0-9]){re.escape(part)}(?![A-Za-z0-9])", name) is not None
