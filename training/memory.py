"""Memory that is let go is kept for the next tensor, and lies in huge pages. Knows nothing of models.

glibc takes every large block from the system by a call of its own and gives it back on release. Its pages are then
cleared and entered one by one at first touch, which took a quarter of a training step.
"""

import ctypes
import os

import torch

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h
_HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"


def keep_released_memory() -> None:
    """For this process; where the C library is another than glibc, nothing. To be called before there are tensors."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, -1)
    os.environ[_HUGE_PAGES] = "1"
    torch.empty(2**20)  # torch reads the variable now, once
    del os.environ[_HUGE_PAGES]  # not for the processes that this one starts
