"""What a worker process of the encode tests runs: a module of its own, so that a fresh process can import it."""

from __future__ import annotations

import multiprocessing
import os
import resource
import runpy
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from pipeline.config import EncodeConfig
from pipeline.encode.job import encode

FORK = multiprocessing.get_context("forkserver")  # a process starts in milliseconds, with these loaded
FORK.set_forkserver_preload(["pipeline.encode.job", "pipeline.storage.s3", "pipeline.cli"])


def run_worker(config: EncodeConfig, share: tuple[int, int], environment: Mapping[str, str]) -> None:
    """Encode one share with the variables given, on one thread."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    encode(config, share)


def run_command(arguments: Sequence[str], environment: Mapping[str, str], log: Path, file_bytes: int = 0) -> None:
    """`python -m pipeline`, where the slow imports are done already; stdout and stderr go to `log`.

    No file may become larger than `file_bytes`, if that is given.
    """
    os.environ.update(environment)
    torch.set_num_threads(1)
    with log.open("ab") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    if file_bytes:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
    sys.argv = ["lathe", *arguments]
    runpy.run_module("pipeline", run_name="__main__")
