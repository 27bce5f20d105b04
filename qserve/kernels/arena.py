"""Memory in huge pages: for packed weights, in the order in which they come, and for whoever else reads much of it.

A step reads every weight once, from the first to the last. In pages of 4 KiB that is one miss of the address cache
every 64 lines, which the processor's own prefetcher does not cross; in pages of 2 MiB the read is one long stream.
Knows no layout: it copies tensors.
"""

import ctypes
import math
import mmap
import os
import sys
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

_HUGE_PAGE = 2 * 2**20
_CHUNK = 32 * 2**20
_MOST_LEARNT = 31 * 2**20
_LINE = 64  # bytes of a cache line, and of a vector
_MADV_POPULATE_WRITE = 23  # of Linux 5.14 and later
_LOWEST_PRIORITY = 19


class Arena:
    """Copies of tensors side by side, from any thread. The memory lives as long as any tensor in it."""

    def __init__(self) -> None:
        self._chunk = torch.empty(0, dtype=torch.uint8)
        self._used = 0
        self._lock = threading.Lock()

    def place(self, tensor: Tensor) -> Tensor:
        """A copy that begins on a cache line."""
        return self.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor)

    def empty(self, shape: Sequence[int], *, dtype: torch.dtype) -> Tensor:
        num_bytes = math.prod(shape) * dtype.itemsize
        with self._lock:
            start = _round_up(self._used, _LINE)
            if start + num_bytes > self._chunk.nbytes:
                self._chunk, start = map_memory(max(_CHUNK, num_bytes)), 0
            self._used = start + num_bytes
            return self._chunk[start : self._used].view(dtype).view(shape)


def map_memory(num_bytes: int) -> Tensor:
    """At least so many bytes, zero, from a page's beginning on. Memory that nobody touches costs addresses alone."""
    size = _round_up(num_bytes, _HUGE_PAGE) + _HUGE_PAGE
    if hasattr(mmap, "MADV_HUGEPAGE"):  # Linux: gives them to private memory alone
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_HUGEPAGE)
    else:
        memory = mmap.mmap(-1, size)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    return whole[-whole.data_ptr() % _HUGE_PAGE :]


def populate_in_background(memory: Tensor) -> threading.Thread:
    """Have the system find all pages of mapped memory, in a thread that yields to all others; contents stay.

    A page that is found only when it is first written costs that write 0.1 to 3 ms for each MiB. Where the system
    cannot do this, it stays so.
    """
    thread = threading.Thread(target=_populate, args=(memory,), name="qserve-pages", daemon=True)
    thread.start()
    return thread


def keep_free_memory() -> None:
    """Have glibc's malloc keep what is freed, tens of MiB of it, until `give_back_free_memory`.

    It learns from the largest that was ever freed; before, it asks the system anew for each tensor beyond 128 KiB.
    """
    torch.empty(_MOST_LEARNT, dtype=torch.uint8)


def give_back_free_memory() -> None:
    """To the system, what glibc's malloc keeps of what was freed: it has an arena for each thread that packed."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(ctypes.c_size_t(0))


def _populate(memory: Tensor) -> None:
    if sys.platform != "linux":
        return
    advise = ctypes.CDLL(None).madvise
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOWEST_PRIORITY)
    begin, end = memory.data_ptr(), memory.data_ptr() + memory.nbytes
    for start in range(begin - begin % mmap.PAGESIZE, end, _HUGE_PAGE):
        length = min(_HUGE_PAGE, end - start)  # no more: who maps or unmaps memory waits for it to be found
        if advise(ctypes.c_void_p(start), ctypes.c_size_t(length), _MADV_POPULATE_WRITE) != 0:
            return


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
