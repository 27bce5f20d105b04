"""On what, and of what version, something was measured: a figure without it says nothing."""

import os
import platform
import re
import subprocess
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from qserve import __version__

# What decides which kernels can run, by the names that Linux gives: x86 first, then ARM.
_EXTENSIONS = (
    *("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16"),
    *("asimddp", "i8mm", "bf16", "sve"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """This machine, as the process sees it."""

    cpu: str
    cores: int
    extensions: tuple[str, ...]
    memory_gib: float | None
    system: str
    python: str

    @property
    def line(self) -> str:
        memory = "" if self.memory_gib is None else f", {self.memory_gib:.0f} GiB"
        return f"{self.cpu}, {self.cores} cores{memory}; {' '.join(self.extensions) or 'no known vector extensions'}"


def look_at_machine() -> Machine:
    text = _read("/proc/cpuinfo")
    flags = set((_find(r"^(?:flags|Features)\s*:\s*(.*)$", text) or "").split())
    memory = _find(r"^MemTotal:\s*(\d+) kB$", _read("/proc/meminfo"))
    return Machine(
        cpu=_find(r"^model name\s*:\s*(.*)$", text) or platform.processor() or platform.machine(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        extensions=tuple(name for name in _EXTENSIONS if name in flags),
        memory_gib=int(memory) / 2**20 if memory else None,
        system=platform.platform(terse=True),
        python=platform.python_version(),
    )


def describe_circumstances() -> dict[str, Any]:
    """What every result begins with."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": asdict(look_at_machine()),
        "qserve": {"version": __version__, "commit": find_commit()},
    }


def find_commit() -> str | None:
    """Of the checkout that this runs from, with a mark if it was changed; None where it was installed."""
    home = Path(__file__).parents[2]
    if not (home / ".git").exists():
        return None
    try:
        told = subprocess.run(
            ["git", "-C", str(home), "describe", "--always", "--dirty", "--exclude", "*"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return told.stdout.strip()


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""  # not Linux


def _find(pattern: str, text: str) -> str | None:
    found = re.search(pattern, text, flags=re.MULTILINE)
    return found[1].strip() if found else None
