"""Run `qserve-train finalize` again and again, killed at its first write, its second, ... until one run survives.

    python -m tests.training.kill_at_every_write SOURCE OUT

A run is a fork, so that the libraries are imported once. Prints the number of runs that were killed.
"""

import itertools
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from training.config import Finalize
from training.finalize import finalize, rehearse


def main() -> None:
    wanted = Finalize(source=sys.argv[1], out=Path(sys.argv[2]), recipe="int4-weight-only", group_size=32)
    torch.set_num_threads(1)  # threads would not survive a fork
    rehearse(wanted, console=Console(quiet=True))  # imports everything, once for all forks
    for number in itertools.count(1):
        status = os.waitstatus_to_exitcode(_run_killed_at(number, wanted))
        if status == 0:
            break
        assert status == -signal.SIGKILL, f"run {number} ended with {status}"
        assert not wanted.out.exists(), f"killed at write {number}, and {wanted.out} is there"
    print(number - 1)


def _run_killed_at(number: int, wanted: Finalize) -> int:
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    remaining = itertools.count(1)

    def strike(event: str, arguments: tuple[Any, ...]) -> None:
        if _is_write(event, arguments) and next(remaining) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(strike)
    finalize(wanted, console=Console(quiet=True))
    os._exit(0)


def _is_write(event: str, arguments: tuple[Any, ...]) -> bool:
    """Whether Python's own record of what it does shows a change to the half-made directory."""
    is_change = event == "os.rename" or (event == "open" and bool(arguments[2] & (os.O_WRONLY | os.O_RDWR)))
    return is_change and ".partial-" in str(arguments)


if __name__ == "__main__":
    main()
