"""Where a result goes: what can be wrong with a destination is said before any work is done."""

import shutil
from pathlib import Path

from qserve.errors import UsageError

_SPARE = 64 * 2**20  # for indexes, tokenizers and the file system itself


def require_absent(out: Path) -> None:
    """A result never lands on top of something else."""
    if out.exists() or out.is_symlink():
        raise UsageError(f"{out} exists already; name a new directory with --out, or remove it first.")


def require_space(out: Path, num_bytes: int) -> None:
    """The disk of the destination holds what will be written."""
    place = out.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < num_bytes + _SPARE:
        raise UsageError(
            f"{out} needs {mebibytes(num_bytes + _SPARE)} and its disk has {mebibytes(free)} free; "
            "make room, or name another disk with --out."
        )


def mebibytes(num_bytes: int) -> str:
    """A size as people read it."""
    return f"{num_bytes / 2**20:,.1f} MiB"
