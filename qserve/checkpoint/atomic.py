"""A directory that comes into being whole or not at all.

    parent/.NAME.partial-XXXX    written and synced, file by file; locked by the process that writes it
    parent/NAME                  the same directory, renamed when nothing more can go wrong

A process that dies leaves at most the first, which the next writer of the same name removes: the lock of a dead process
is free. Knows nothing of what is written.
"""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qserve.errors import UsageError


@contextmanager
def new_directory(destination: Path) -> Iterator[Path]:
    """A directory to write into; becomes `destination` when the block ends, vanishes when it raises.

    Raises UsageError where `destination` exists already, and where it cannot be written: a full disk, no permission.
    """
    destination = destination.absolute()
    _require_absent(destination)
    try:
        with _partial(destination) as partial:
            yield partial
    except OSError as error:
        raise UsageError(f"{destination} could not be written ({error}); nothing was left of it") from error


@contextmanager
def _partial(destination: Path) -> Iterator[Path]:
    destination.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{destination.name}.partial-"
    _sweep(destination.parent, prefix)
    partial = Path(tempfile.mkdtemp(prefix=prefix, dir=destination.parent))
    lock = _lock(partial)
    try:
        yield partial
        partial.chmod(0o777 & ~_umask())  # mkdtemp lets nobody else in
        _sync_all(partial)
        _require_absent(destination)
        partial.rename(destination)
        _sync(destination.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        os.close(lock)


def _require_absent(destination: Path) -> None:
    if destination.exists() or destination.is_symlink():
        raise UsageError(f"{destination} exists already; name a new directory, or remove it first")


def _lock(directory: Path) -> int:
    """Held until the descriptor is closed, at the latest by the end of the process."""
    descriptor = os.open(directory, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return descriptor


def _sweep(parent: Path, prefix: str) -> None:
    """Removes what dead writers left; what a living one holds stays."""
    for partial in parent.glob(f"{prefix}*"):
        try:
            descriptor = _lock(partial)
        except (BlockingIOError, FileNotFoundError):
            continue
        shutil.rmtree(partial, ignore_errors=True)
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_all(directory: Path) -> None:
    for folder, _, names in os.walk(directory):
        for name in names:
            _sync(Path(folder, name))
        _sync(Path(folder))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
