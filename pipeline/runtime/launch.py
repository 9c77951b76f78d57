"""`accelerate launch`, with its ranks' exit code kept and one line where it would print its own traceback.

The launcher's agent answers every rank that fails with exit code 1 and the stack of the agent, below the rank's own
message. Lathe's exit codes mean something (`pipeline.errors`, 128 + signal), so they are passed on.
"""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str]) -> int:
    """Run `accelerate launch ARGUMENTS` and return the exit code of the rank that failed first, or 0."""
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        launch_command(launch_command_parser().parse_args(list(arguments)))
    except ChildFailedError as failure:
        rank, first = failure.get_first_failure()
        if first.exitcode < 0:
            _say(f"rank {rank} was ended by {signal.Signals(-first.exitcode).name}, and the other ranks with it")
            return 128 - int(first.exitcode)
        if first.exitcode == 1:
            _say(f"rank {rank} failed, and the other ranks were ended; its message is above")
        return int(first.exitcode)
    except SignalException as stop:
        return 128 + int(stop.sigval)
    return 0


def _say(line: str) -> None:
    print(line, file=sys.stderr)  # noqa: T201


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
