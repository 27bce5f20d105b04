"""Tensors placed in an arena keep their values, begin on a cache line, and never share a byte."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from qserve.kernels.arena import Arena

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
