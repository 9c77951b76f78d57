"""What a worker process of the encode tests runs: a module of its own, so that a fresh process can import it."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch

from pipeline.config import EncodeConfig
from pipeline.encode.job import encode


def run_worker(config: EncodeConfig, share: tuple[int, int], environment: Mapping[str, str]) -> None:
    """Encode one share with the variables given, on one thread."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    encode(config, share)
