"""The `lathe` command line: parse, load the run file, call one function."""

from pipeline.cli.app import main

__all__ = ["main"]
