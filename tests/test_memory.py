"""What a process frees, it keeps for itself."""

import os
import subprocess
import sys

import psutil
import pytest

from pipeline.memory import limit_bytes

WORK = """
import ctypes, resource, threading
from pipeline.memory import keep_freed
if {keeps}:
    keep_freed()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def work(rounds):
    for _ in range(rounds):
        held = [bytearray(5 << 20) for _ in range(40)]
        del held
def in_thread(rounds):
    thread = threading.Thread(target=work, args=(rounds,))
    thread.start(), thread.join()
for run in (work, in_thread):
    run(2)
    before = faults()
    run(5)
    print(faults() - before)
"""


@pytest.mark.alone
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a setting of glibc")
def test_memory_that_was_freed_is_not_asked_for_anew() -> None:
    ends = {}
    for keeps in (True, False):
        command = [sys.executable, "-c", WORK.format(keeps=keeps)]
        own = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
        ends[keeps] = [int(line) for line in subprocess.check_output(command, text=True, env=own).split()]
    assert all(10 * kept < anew for kept, anew in zip(ends[True], ends[False], strict=True))


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"proc/self/cgroup": "0::/job/step\n", "sys/fs/cgroup/job/step/memory.max": "max\n"}, None),
        (
            {
                "proc/self/cgroup": "0::/job/step\n",
                "sys/fs/cgroup/job/step/memory.max": "max\n",
                "sys/fs/cgroup/job/memory.max": "4096000\n",
            },
            4096000,
        ),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "8192\n"}, 8192),
        ({"proc/self/cgroup": "4:memory:/j\n", "sys/fs/cgroup/memory/j/memory.limit_in_bytes": "4096\n"}, 4096),
        ({"proc/self/cgroup": "4:memory:/\n", "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{2**63}\n"}, None),
        ({}, None),
    ],
    ids=["none", "around", "container", "v1", "v1 none", "no groups"],
)
def test_the_limit_is_that_of_the_tightest_group(tmp_path, files, expected):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert limit_bytes(tmp_path) == (expected or psutil.virtual_memory().total)
