"""Tensors placed in an arena keep their values, begin on a cache line, and never share a byte."""

import ctypes
import mmap
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qserve.kernels.arena import Arena, give_back_free_memory, keep_free_memory, map_memory, populate_in_background

DTYPES = (torch.uint8, torch.bfloat16, torch.float32, torch.float8_e4m3fn)


def make(number: int, *, size: int) -> Tensor:
    values = torch.randn(3, size, generator=torch.Generator().manual_seed(number))
    return values.clamp(0, 200).to(DTYPES[number % len(DTYPES)])


@pytest.mark.parametrize("size", [1, 1000, 12 * 2**20])  # the last outgrows a chunk of the arena
def test_what_is_placed_stays_as_it_was(size: int) -> None:
    arena = Arena()
    originals = [make(number, size=size) for number in range(6)]
    placed = [arena.place(tensor) for tensor in originals]
    for original, copy in zip(originals, placed, strict=True):
        assert (copy.dtype, copy.shape) == (original.dtype, original.shape)
        assert torch.equal(copy.view(torch.uint8), original.view(torch.uint8))
        assert copy.data_ptr() % 64 == 0


def test_no_two_share_a_byte() -> None:
    arena = Arena()
    spans = sorted((copy.data_ptr(), copy.nbytes) for copy in (arena.place(make(n, size=77)) for n in range(50)))
    assert all(start + length <= following for (start, length), (following, _) in pairwise(spans))


def test_threads_that_place_at_once_share_no_byte() -> None:
    arena = Arena()
    originals = [make(number, size=number * 1000) for number in range(1, 60)]
    with ThreadPoolExecutor(4) as pool:
        placed = list(pool.map(arena.place, originals))
    spans = sorted((copy.data_ptr(), copy.nbytes) for copy in placed)
    assert all(start + length <= following for (start, length), (following, _) in pairwise(spans))
    for original, copy in zip(originals, placed, strict=True):
        assert torch.equal(copy.view(torch.uint8), original.view(torch.uint8))


def flags_of_memory(address: int) -> set[str]:
    """What Linux keeps of the mapping that an address is in."""
    is_inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if not first.endswith(":"):
            start, end = (int(part, 16) for part in first.split("-"))
            is_inside = start <= address < end
        elif is_inside and first == "VmFlags:":
            return set(line.split()[1:])
    return set()


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="only Linux tells")
def test_memory_may_stand_in_huge_pages() -> None:
    memory = map_memory(5 * 2**20)
    assert memory.data_ptr() % 2**21 == 0
    assert memory.nbytes >= 5 * 2**20
    assert not memory.any()
    flags = flags_of_memory(memory.data_ptr())
    assert "sh" not in flags  # shared memory gets none, whatever was advised
    assert not flags or "hg" in flags


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


@pytest.mark.skipif(sys.platform != "linux", reason="other systems find pages when they are written")
def test_populated_memory_is_resident_and_keeps_what_was_written() -> None:
    memory = map_memory(70 * 2**20)
    memory[12345], memory[-1] = 7, 9
    before = resident_bytes()
    populate_in_background(memory[100:]).join()
    assert resident_bytes() - before > 60 * 2**20
    assert (int(memory[12345]), int(memory[-1]), int(memory.count_nonzero())) == (7, 9, 2)


@pytest.mark.skipif(sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="glibc's malloc")
def test_freed_memory_is_given_back() -> None:
    keep_free_memory()
    stays = make(1, size=100)
    some = [torch.ones(2**20, dtype=torch.uint8) for _ in range(40)]
    before = resident_bytes()
    del some
    give_back_free_memory()
    assert before - resident_bytes() > 30 * 2**20
    assert torch.equal(stays, make(1, size=100))
