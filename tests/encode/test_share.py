"""A worker's share: the one given, or what its launcher left in the environment.

The SLURM variables are as SLURM 22.05 sets them in batch scripts, arrays and steps.
"""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.encode.share import Share, find_share
from pipeline.errors import ConfigError

BATCH = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0"}  # a batch script has these too


def array(identity: int, identities: list[int], step: int = 1) -> dict[str, str]:
    facts = {"ID": identity, "COUNT": len(identities), "MIN": min(identities), "MAX": max(identities), "STEP": step}
    return {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in facts.items()} | BATCH


def step(index: int, count: int) -> dict[str, str]:
    return {
        "SLURM_STEP_ID": "0",
        "SLURM_PROCID": str(index),
        "SLURM_STEP_NUM_TASKS": str(count),
        "SLURM_NTASKS": str(count),
    }


def ranks(index: int, count: int, launchers: int | None = 1) -> dict[str, str]:
    told = {} if launchers is None else {"GROUP_WORLD_SIZE": str(launchers)}
    return {"RANK": str(index), "WORLD_SIZE": str(count), **told}


def pod(index: int, count: int | None) -> dict[str, str]:
    told = {} if count is None else {"LATHE_TASKS": str(count)}
    return {"JOB_COMPLETION_INDEX": str(index), **told}


def place(environment: dict[str, str]) -> tuple[int, int]:
    share = find_share(None, environment)
    return share.index, share.count


def test_alone_it_is_everything_and_nothing_was_found() -> None:
    assert find_share(None, {"PATH": "/bin"}) == Share(0, 1, "")


def test_the_share_given_overrules_whatever_the_environment_says() -> None:
    broken = {"RANK": "7", "WORLD_SIZE": "x", "LATHE_TASKS": "3"}
    assert find_share("2/5", broken) == Share(2, 5, "")


@pytest.mark.parametrize("task", ["2/2", "x", "1", "/2", "1/", "-1/2", "1/2/3", "0/0", " 0/1", "٣/٤", "0x1/2", ""])
def test_what_is_no_share_is_refused(task: str) -> None:
    with pytest.raises(ConfigError, match="--task"):
        find_share(task, {})


@pytest.mark.parametrize(
    ("identities", "step"), [(range(8), 1), (range(1, 17), 1), (range(0, 15, 2), 2), ((5,), 1), ((3, 4), 1)]
)
def test_a_regular_array_is_divided_by_place(identities: range, step: int) -> None:
    got = [place(array(identity, list(identities), step)) for identity in identities]
    assert got == [(i, len(identities)) for i in range(len(identities))]


@pytest.mark.parametrize(
    ("identities", "step"),
    [
        ((0, 3, 7), 1),
        ((1, 3, 5, 7), 1),  # SLURM tells step 1 of every list
        ((0, 2, 4, 6, 7, 9), 2),  # 0-6:2,7,9
        ((0, 2, 4, 5, 9), 2),  # its count is what a whole-number division would give
    ],
)
def test_an_array_with_gaps_is_refused_by_each_task_with_the_remedy(identities: tuple[int, ...], step: int) -> None:
    for identity in identities:
        with pytest.raises(ConfigError, match="gaps") as error:
            find_share(None, array(identity, list(identities), step))
        assert "--task" in error.value.remedy


def test_a_batch_script_is_no_srun_task() -> None:
    assert place({**BATCH, "SLURM_NTASKS": "4", "SLURM_NPROCS": "4", "SLURM_JOB_ID": "6"}) == (0, 1)


def test_a_step_counts_its_own_tasks() -> None:
    assert place({**step(1, 2), "SLURM_NPROCS": "4"}) == (1, 2)


def test_array_and_step_and_ranks_are_combined() -> None:
    share = find_share(None, array(5, [4, 5]) | step(1, 2) | ranks(2, 4))
    assert (share.index, share.count) == (14, 16)
    assert str(share) == ("share 14/16: SLURM array task 1 of 2, srun task 1 of 2, rank 2 of 4, counted from 0")


def test_ranks_counted_over_srun_tasks_are_not_counted_again() -> None:
    assert place(step(1, 2) | ranks(5, 8, launchers=2)) == (5, 8)
    assert place(step(1, 2) | ranks(1, 2, launchers=None)) == (1, 2)  # RANK=$SLURM_PROCID


def test_ranks_that_do_not_fit_the_srun_tasks_are_refused() -> None:
    with pytest.raises(ConfigError, match="rank 1 of 8, srun task 0 of 2"):
        find_share(None, step(0, 2) | ranks(1, 8, launchers=4))
    with pytest.raises(ConfigError, match="do not fit"):
        find_share(None, step(0, 2) | ranks(1, 2, launchers=None))


def test_pods_of_an_indexed_job() -> None:
    assert find_share(None, pod(3, 8)) == Share(3, 8, "Kubernetes Job index 3 of 8")
    assert place(pod(3, 8) | ranks(1, 2)) == (7, 16)
    assert place(pod(1, 2) | ranks(5, 8, launchers=2)) == (5, 8)
    assert place(pod(1, None) | ranks(5, 8, launchers=2)) == (5, 8)
    assert place(pod(1, None) | ranks(1, 2, launchers=None)) == (1, 2)


@pytest.mark.parametrize(
    ("environment", "said", "remedy"),
    [
        (pod(3, None), "LATHE_TASKS", "completions"),
        (pod(3, None) | ranks(0, 2), "LATHE_TASKS", "completions"),
        (pod(8, 8), "JOB_COMPLETION_INDEX=8 is not below LATHE_TASKS=8", "--task"),
        ({"LATHE_TASKS": "8"}, "JOB_COMPLETION_INDEX is not", "Indexed"),
        (array(0, [0, 1]) | pod(0, 2), "SLURM array and of a Kubernetes", "--task"),
        ({"RANK": "1"}, "WORLD_SIZE is not", "--task"),
        ({"WORLD_SIZE": "2"}, "RANK is not", "--task"),
        (ranks(2, 2), "RANK=2", "--task"),
        (ranks(0, 0), "RANK=0", "--task"),
        ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK=one is not a number", "--task"),
        ({"SLURM_ARRAY_TASK_ID": "1"}, "without SLURM_ARRAY_TASK_COUNT", "--task"),
        (step(2, 2), "SLURM_PROCID=2", "--task"),
    ],
)
def test_what_does_not_fit_together_is_refused(environment: dict[str, str], said: str, remedy: str) -> None:
    with pytest.raises(ConfigError, match=said) as error:
        find_share(None, environment)
    assert remedy in error.value.remedy


COUNTS = st.integers(1, 5)


@given(COUNTS, COUNTS, COUNTS, st.integers(0, 3), st.integers(1, 3), st.booleans())
def test_all_workers_together_take_every_share_once(
    jobs: int, steps: int, processes: int, first: int, stride: int, kubernetes: bool
) -> None:
    identities = [first + i * stride for i in range(jobs)]
    got = []
    for j, s, r in itertools.product(range(jobs), range(steps), range(processes)):
        outer = pod(j, jobs) if kubernetes else array(identities[j], identities, stride)
        inner = {} if kubernetes else step(s, steps)
        if not (kubernetes and s):
            got.append(place(outer | inner | ranks(r, processes)))
    count = jobs * processes * (1 if kubernetes else steps)
    assert sorted(got) == [(i, count) for i in range(count)]
