"""How fast memory can be read here: the limit that decoding is held against.

    python -m bench.bandwidth [--mib 76,590]

A weight is read once for each token, so bytes over bandwidth is the least time that a step can take. What fits into
the last cache is read faster than what does not: the size measured must be the size of the weights in question.
"""

import argparse
import ctypes
import json
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from qserve.bench.machine import describe_circumstances
from qserve.kernels.arena import map_memory
from qserve.kernels.build import count_cores, find_compiler

_SOURCE = Path(__file__).with_suffix(".cpp")
_REPEATS = 5
_AHEAD = (0, 512, 1024, 2048, 4096)  # bytes; which of them is best differs from size to size
_BYTES_A_REPEAT = 1 << 30  # so that starting the threads is nothing beside it


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", default="8,76,128,256,590,1024", help="sizes, with commas between")
    sizes = [int(size) for size in parser.parse_args().mib.split(",")]
    found = {size: read_bandwidth(size << 20) for size in sizes}
    table = Table("MiB", "GB/s", box=box.SIMPLE_HEAD)
    for size, bandwidth in found.items():
        table.add_row(str(size), f"{bandwidth / 1e9:.1f}")
    Console().print(table)
    rows = [{"mib": size, "bytes_per_second": bandwidth} for size, bandwidth in found.items()]
    print(json.dumps({"bench": "bandwidth", **describe_circumstances(), "rows": rows}))
    return 0


def read_bandwidth(num_bytes: int) -> float:
    """Bytes a second over all cores that this process may use: the best of several, for it is a limit.

    From huge pages, as packed weights are, and fetched ahead in whatever way is best.
    """
    words = map_memory(num_bytes).view(torch.int64)[: num_bytes // 8].fill_(1)
    read = _load().read_all
    num_threads, num_passes = count_cores(), max(1, _BYTES_A_REPEAT // num_bytes)
    best = 0.0
    for ahead in _AHEAD * _REPEATS:
        start = time.perf_counter()
        assert read(words.data_ptr(), words.numel(), num_threads, num_passes, ahead) > 0
        best = max(best, words.nbytes * num_passes / (time.perf_counter() - start))
    return best


@cache
def _load() -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "bandwidth.so"
        flags = ["-std=c++17", "-O3", "-march=native", "-fPIC", "-shared", "-pthread"]
        subprocess.run([find_compiler(), *flags, str(_SOURCE), "-o", str(library)], check=True)
        loaded = ctypes.CDLL(str(library))
    loaded.read_all.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_int, ctypes.c_int64]
    loaded.read_all.restype = ctypes.c_uint64
    return loaded


if __name__ == "__main__":
    sys.exit(main())
