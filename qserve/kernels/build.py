"""Compiles the C++ kernels for a processor, once, and loads the library.

Knows nothing of tensors. Every variant is a library of its own, made from the same sources with its own instruction
set, so that no instruction of a better processor can reach a lesser one; which one is loaded is decided at run time
from what the processor says of itself. The sources use neither torch's headers nor Python's: a C++17 compiler is all.
"""

import ctypes
import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from qserve.errors import UsageError

SOURCES = Path(__file__).parent / "csrc"
COMPILERS = ("c++", "g++", "clang++")
COMMON_FLAGS = ("-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-pthread", "-Wno-psabi")

Progress = Callable[[str], None]


class KernelsUnavailable(UsageError):
    """The kernels cannot be compiled on this machine; plain torch can do their work, slowly."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One instruction set: what the processor must have, and what the compiler is told."""

    name: str
    cpu_flags: frozenset[str] = frozenset()
    compiler_flags: tuple[str, ...] = ()


_AVX2 = ("avx2", "fma", "f16c")
_AVX512 = (*_AVX2, "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni")
_AMX = (*_AVX512, "avx512_bf16", "amx_tile", "amx_int8", "amx_bf16")
_SPELLINGS = {"avx512_vnni": "avx512vnni", "avx512_bf16": "avx512bf16"}


def _variant(name: str, flags: Sequence[str], *extra: str) -> Variant:
    options = (f"-m{_SPELLINGS.get(flag, flag).replace('_', '-')}" for flag in flags)
    return Variant(name=name, cpu_flags=frozenset(flags), compiler_flags=(*options, *extra))


# Best first.
VARIANTS = (
    _variant("amx", _AMX, "-mprefer-vector-width=512"),
    _variant("avx512", _AVX512, "-mprefer-vector-width=512"),
    _variant("avx2", _AVX2),
    _variant("portable", ()),
)


def supported_variants(cpu_flags: frozenset[str] | None = None) -> tuple[Variant, ...]:
    """What this processor can run, best first; the last one runs anywhere."""
    flags = read_cpu_flags() if cpu_flags is None else cpu_flags
    return tuple(variant for variant in VARIANTS if variant.cpu_flags <= flags)


def choose_variant(name: str | None = None) -> Variant:
    """The best that this processor can run, or the one named."""
    supported = supported_variants()
    if name is None:
        return supported[0]
    for variant in supported:
        if variant.name == name:
            return variant
    names = ", ".join(variant.name for variant in supported)
    raise UsageError(f"Kernels for {name!r} cannot run on this processor, which can run: {names}.")


def read_cpu_flags() -> frozenset[str]:
    """What Linux says an x86 processor has; nothing elsewhere, where the portable kernels serve."""
    path = Path("/proc/cpuinfo")
    if not _is_x86() or not path.exists():
        return frozenset()
    for line in path.read_text().splitlines():
        if line.startswith("flags"):
            return frozenset(line.partition(":")[2].split())
    return frozenset()


def _is_x86() -> bool:
    return platform.machine() in ("x86_64", "AMD64")


def count_cores() -> int:
    """Cores that this process may really use: its affinity, cut by the control group's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, _read_quota() or cores))


def _read_quota() -> int | None:
    """Whole cores of the control group's time, version 2 or 1; None without a limit."""
    group = Path("/sys/fs/cgroup")
    try:
        if (group / "cpu.max").exists():
            quota, period = (group / "cpu.max").read_text().split()
        else:
            quota, period = ((group / "cpu" / f"cpu.cfs_{part}_us").read_text() for part in ("quota", "period"))
        return None if quota == "max" or int(quota) <= 0 else max(1, int(quota) // int(period))
    except (OSError, ValueError):
        return None


def load_library(
    variant: Variant, *, cache: Path | None = None, compiler: str | None = None, progress: Progress | None = None
) -> ctypes.CDLL:
    """The variant's library, compiled if it has not been before."""
    return ctypes.CDLL(str(build_library(variant, cache=cache, compiler=compiler, progress=progress)))


def build_library(
    variant: Variant, *, cache: Path | None = None, compiler: str | None = None, progress: Progress | None = None
) -> Path:
    """Path of the variant's library. Processes that want the same one at once wait for whoever came first.

    A library that is there needs no compiler, so one machine may compile for another that has none.
    """
    flags = (*COMMON_FLAGS, *variant.compiler_flags)
    directory = (cache or cache_directory()) / _fingerprint(flags)
    library = directory / f"libqserve-{variant.name}.so"
    if library.exists():
        return library
    compiler = compiler or find_compiler()
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            _compile(compiler, flags, library, progress or _print_progress)
    return library


def build_all() -> None:
    """Every variant of this kind of processor, whatever this one can run: for an image that others will run."""
    for variant in VARIANTS:
        if not variant.cpu_flags or _is_x86():
            build_library(variant)


def find_compiler() -> str:
    """$CXX, or the first of the usual names."""
    named = os.environ.get("CXX")
    for name in (named,) if named else COMPILERS:
        if path := shutil.which(name):
            return path
    looked_for = named or ", ".join(COMPILERS)
    raise KernelsUnavailable(
        f"No C++ compiler was found (looked for: {looked_for}), so the fast kernels cannot be built."
        " Install g++ or clang++, or name one in CXX."
    )


def cache_directory() -> Path:
    """Under $QSERVE_CACHE, or a directory in the user's cache."""
    if named := os.environ.get("QSERVE_CACHE"):
        return Path(named) / "kernels"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qserve" / "kernels"


def _fingerprint(flags: Sequence[str]) -> str:
    digest = hashlib.sha256("\0".join(flags).encode())
    for path in sorted(SOURCES.iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:20]


def _compile(compiler: str, flags: Sequence[str], library: Path, progress: Progress) -> None:
    sources = sorted(SOURCES.glob("*.cpp"))
    progress(f"Compiling {library.stem.removeprefix('lib')}: {len(sources)} files, once; kept in {library.parent}")
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        objects = [Path(scratch) / f"{source.stem}.o" for source in sources]
        commands = [
            [compiler, *flags, "-c", str(source), "-o", str(made)]
            for source, made in zip(sources, objects, strict=True)
        ]
        with ThreadPoolExecutor(count_cores()) as pool:
            list(pool.map(_run, commands))
        made = Path(scratch) / library.name
        _run([compiler, "-shared", "-pthread", "-o", str(made), *map(str, objects)])
        made.replace(library)


def _run(command: Sequence[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        errors = result.stderr.strip().splitlines()[:8]
        raise KernelsUnavailable("The kernels do not compile here. " + "\n".join([" ".join(command), *errors]))


def _print_progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    build_all()
