"""What a process frees, it keeps for itself."""

import os
import subprocess
import sys

import pytest

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


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a setting of glibc")
def test_memory_that_was_freed_is_not_asked_for_anew() -> None:
    ends = {}
    for keeps in (True, False):
        command = [sys.executable, "-c", WORK.format(keeps=keeps)]
        own = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
        ends[keeps] = [int(line) for line in subprocess.check_output(command, text=True, env=own).split()]
    assert all(10 * kept < anew for kept, anew in zip(ends[True], ends[False], strict=True))
