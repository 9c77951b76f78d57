"""Every metric in one table, and where numbers go."""

from pipeline.metrics.follow import LogFollower
from pipeline.metrics.job import Metrics
from pipeline.metrics.log import LOG, PARTS, LogStore, read_log
from pipeline.metrics.place import Place
from pipeline.metrics.table import DEFINITIONS, ENCODE, STORAGE, TRAINING, Definition, Job, Subject, Value

__all__ = [
    "DEFINITIONS",
    "ENCODE",
    "LOG",
    "PARTS",
    "STORAGE",
    "TRAINING",
    "Definition",
    "Job",
    "LogFollower",
    "LogStore",
    "Metrics",
    "Place",
    "Subject",
    "Value",
    "read_log",
]
