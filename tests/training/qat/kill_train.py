"""Train a run killed at its first write, another killed at its second, ...; each is then finished by the same command.

    python -m tests.training.qat.kill_train SOURCE TEXT FOLDER

Every run must end in the files of one that nobody killed. A run is a fork, so that the libraries are imported once.
Prints the number of runs that were killed.
"""

import itertools
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.training.qat.running import begin, fingerprint, go_on, trained

CHANGES = {"tokens": 256, "save_every": 2}  # 4 steps, committed twice


def main() -> None:
    torch.set_num_threads(1)  # threads would not survive a fork
    source, text, folder = map(Path, sys.argv[1:])
    wanted = fingerprint(trained(source, text, folder / "whole", **CHANGES).find(None))
    run = folder / "killed"
    for number in itertools.count(1):
        status = forked(lambda: whole_run(source, text, run), kill_at=number, within=run)
        if status == 0:
            break
        assert status == -signal.SIGKILL, f"run {number} ended with {status}"
        assert forked(lambda: whole_run(source, text, run), kill_at=0, within=run) == 0, f"killed at {number}"
        found = fingerprint(run / "checkpoints" / "step-000004")
        assert found == wanted, f"killed at write {number}, and went on to another end"
        assert not [*run.rglob("*.partial-*")], f"killed at write {number}, and something was left"
        shutil.rmtree(run)
    print(number - 1)


def whole_run(source: Path, text: Path, run: Path) -> None:
    begin(source, run)
    assert go_on(run, text, **CHANGES)


def forked(act: Callable[[], None], *, kill_at: int, within: Path) -> int:
    """How a child that does this ended, killed at one of its writes within a directory, 0 being none."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    counted = itertools.count(1)

    def strike(event: str, arguments: tuple[Any, ...]) -> None:
        if is_write(event, arguments, within) and next(counted) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(strike)
    act()
    os._exit(0)


def is_write(event: str, arguments: tuple[Any, ...], within: Path) -> bool:
    """Whether Python's own record of what it does shows a change to the directory, or to its half-made beginning."""
    is_change = event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir")
    is_change |= event == "open" and bool(arguments[2] & (os.O_WRONLY | os.O_RDWR))
    named = str(arguments)
    return is_change and (str(within) in named or f".{within.name}.partial-" in named or "step-" in named)


if __name__ == "__main__":
    main()
