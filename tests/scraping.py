"""What Prometheus reads of a process."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families


def scraped(address: str) -> dict[str, float]:
    """Numbers by `name` or `name{label=value,...}`, of http://HOST:PORT/metrics."""
    text = urllib.request.urlopen(address, timeout=10).read().decode()  # noqa: S310
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))
            found[sample.name + (f"{{{labels}}}" if labels else "")] = sample.value
    return found


def target(file: Path) -> str:
    """The address that a discovery file tells."""
    (entry,) = json.loads(file.read_text())
    (host,) = entry["targets"]
    return f"http://{host}/metrics"
