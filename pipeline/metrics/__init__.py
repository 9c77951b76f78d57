"""Every metric in one table, and where numbers go."""

from pipeline.metrics.job import Metrics
from pipeline.metrics.log import LOG, PARTS, LogStore, read_log
from pipeline.metrics.table import DEFINITIONS, ENCODE, TRAINING, Definition, Job

__all__ = ["DEFINITIONS", "ENCODE", "LOG", "PARTS", "TRAINING", "Definition", "Job", "LogStore", "Metrics", "read_log"]
