"""Numbers as a person reads them."""

from __future__ import annotations

import math


def number(value: float) -> str:
    """Three significant digits, without an exponent where it can be read without; a dash for what is no number."""
    if not math.isfinite(value):
        return "\u2013"
    if value == 0:
        return "0"
    if not 1e-4 <= abs(value) < 1e6:
        return f"{value:.2e}"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    text = f"{value:,.{digits}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
