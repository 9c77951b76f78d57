"""Which share of the source shards is this worker's, from what its launcher left in the environment.

Workers never talk to each other, so each must know its place by itself. From the outside in there may be: a SLURM
array or an indexed Kubernetes Job, whose tasks know nothing of each other; the tasks of one `srun`; the ranks of
torchrun or accelerate. Each divides the share of the one around it. Ranks that were counted over several srun tasks
or pods are the whole division, and those are not counted again.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.errors import ConfigError

_SAY_IT = "say the share yourself: --task I/N, with I from 0 to N-1"


@dataclass(frozen=True)
class Share:
    """Every count-th source shard from the index-th on.

    Args:
        index: 0 to count - 1.
        count: workers in all.
        source: what of the environment says so, such as "SLURM array task 3 of 8"; empty where it was given, or alone.
    """

    index: int
    count: int
    source: str = ""

    def __str__(self) -> str:
        return f"share {self.index}/{self.count}" + (f": {self.source}, counted from 0" if self.source else "")


def find_share(task: str | None, environment: Mapping[str, str]) -> Share:
    """This worker's share: the one given, or the one that its launcher tells; else everything.

    Args:
        task: I/N as given to `--task`, or None.
        environment: the process's environment variables.

    Raises:
        ConfigError: not a share, or an environment that does not tell which; the remedy says how to give it.
    """
    if task is not None:
        return _given(task)
    ranks = _ranks(environment)
    array, pod = _slurm_array(environment), _kubernetes(environment, ranks)
    if array and pod:
        raise ConfigError("the environment is that of a SLURM array and of a Kubernetes Job", _SAY_IT)
    places = [place for place in (pod, _srun(environment)) if place and not _spans(ranks, place, environment)]
    layers = [layer for layer in (array, *places, ranks) if layer and layer.count > 1]
    index, count = 0, 1
    for layer in layers:
        index, count = index * layer.count + layer.index, count * layer.count
    return Share(index, count, ", ".join(layer.source for layer in layers))


def _given(task: str) -> Share:
    match = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", task)
    if not match or int(match[1]) >= int(match[2]):
        raise ConfigError(f"--task {task}: not a share", "write I/N with I from 0 to N-1, for example --task 0/4")
    return Share(int(match[1]), int(match[2]))


def _slurm_array(environment: Mapping[str, str]) -> Share | None:
    """The array's task by its place among the ids, which only a regular array tells: 0-7, 1-16%4, 0-14:2.

    Of a list such as 0,3,7 SLURM tells the count, the ends and a step of 1 (or that of the list's first range).
    """
    identity = _number(environment, "SLURM_ARRAY_TASK_ID")
    if identity is None:
        return None
    names = ("COUNT", "MIN", "MAX", "STEP")
    count, first, last, step = (_number(environment, f"SLURM_ARRAY_TASK_{name}") for name in names)
    if count is None or first is None or last is None:
        raise ConfigError("SLURM_ARRAY_TASK_ID is set without SLURM_ARRAY_TASK_COUNT, _MIN and _MAX", _SAY_IT)
    step = step or 1
    index, off_step = divmod(identity - first, step)
    if off_step or last - first != (count - 1) * step or not 0 <= index < count:
        raise ConfigError(
            f"task {identity} of a SLURM array with gaps ({count} tasks from {first} to {last}): its place is not told",
            f"submit an array without gaps, such as --array=0-{max(count, 1) - 1}, or give --task I/N",
        )
    return Share(index, count, f"SLURM array task {index} of {count}")


def _kubernetes(environment: Mapping[str, str], ranks: Share | None) -> Share | None:
    """The pod of an indexed Job. Kubernetes tells it its index, not how many there are: the Job's file must."""
    index, count = _number(environment, "JOB_COMPLETION_INDEX"), _number(environment, "LATHE_TASKS")
    if index is None and count is None:
        return None
    if index is None:
        raise ConfigError(
            "LATHE_TASKS is set, but JOB_COMPLETION_INDEX is not", "set completionMode: Indexed in the Kubernetes Job"
        )
    if count is None:
        if ranks and ranks.count > 1 and environment.get("GROUP_WORLD_SIZE") != "1":
            return None  # ranks counted over the pods
        raise ConfigError(
            "JOB_COMPLETION_INDEX is set, but LATHE_TASKS, the number of tasks, is not",
            "set LATHE_TASKS in the container's env to the Job's completions, or give --task I/N",
        )
    return _within("JOB_COMPLETION_INDEX", index, "LATHE_TASKS", count, "Kubernetes Job index")


def _srun(environment: Mapping[str, str]) -> Share | None:
    """The task of an srun. A batch script has SLURM_PROCID=0 too, and the job's SLURM_NTASKS, but is no step."""
    if "SLURM_STEP_ID" not in environment and "SLURM_STEPID" not in environment:
        return None
    index = _number(environment, "SLURM_PROCID")
    tasks = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environment else "SLURM_NTASKS"
    count = _number(environment, tasks)
    if index is None or count is None:
        return None
    return _within("SLURM_PROCID", index, tasks, count, "srun task")


def _ranks(environment: Mapping[str, str]) -> Share | None:
    index, count = _number(environment, "RANK"), _number(environment, "WORLD_SIZE")
    if index is None and count is None:
        return None
    if index is None or count is None:
        there, absent = ("RANK", "WORLD_SIZE") if count is None else ("WORLD_SIZE", "RANK")
        raise ConfigError(f"{there} is set, but {absent} is not", f"unset {there}, or give --task I/N")
    return _within("RANK", index, "WORLD_SIZE", count, "rank")


def _spans(ranks: Share | None, place: Share, environment: Mapping[str, str]) -> bool:
    """Whether the ranks were counted over all these places, rather than within this one.

    torchrun and accelerate tell over how many launchers they counted. Without them, RANK and WORLD_SIZE may have been
    set from the place itself.
    """
    launchers = _number(environment, "GROUP_WORLD_SIZE")
    if ranks is None or 1 in (ranks.count, place.count, launchers):
        return False
    if launchers == place.count or (launchers is None and (ranks.index, ranks.count) == (place.index, place.count)):
        return True
    raise ConfigError(
        f"the environment tells two shares that do not fit: {ranks.source}, {place.source}",
        "start one torchrun in each srun task or pod, or give --task I/N",
    )


def _within(index_name: str, index: int, count_name: str, count: int, what: str) -> Share:
    if index >= count:
        raise ConfigError(f"{index_name}={index} is not below {count_name}={count}", _SAY_IT)
    return Share(index, count, f"{what} {index} of {count}")


def _number(environment: Mapping[str, str], name: str) -> int | None:
    text = environment.get(name, "")
    if not text:
        return None
    if not re.fullmatch("[0-9]{1,18}", text):
        raise ConfigError(f"{name}={text} is not a number", f"unset {name}, or give --task I/N")
    return int(text)
