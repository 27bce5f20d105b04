"""The paged key-value cache: the tensors, and how many blocks of them fit into so much memory.

Knows no request: which block belongs to whom is decided in `engine`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qserve.kernels.arena import map_memory
from qserve.kernels.ops import CacheLayer

_LINE = 64  # bytes of a cache line: each head of a block begins on one


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheShape:
    """What one layer keeps of a position; values are as wide as keys unless `value_dim` says otherwise."""

    num_heads: int
    head_dim: int
    value_dim: int | None = None

    @property
    def widths(self) -> tuple[int, int]:
        """Of a key and a value."""
        return self.head_dim, self.value_dim or self.head_dim

    def scale_bytes(self, *, block_size: int, dtype: torch.dtype) -> int:
        """Of the scales that int8 codes have, in a block for one head."""
        return 2 * block_size * torch.float32.itemsize if dtype is torch.int8 else 0

    def head_bytes(self, *, block_size: int, dtype: torch.dtype) -> int:
        """What a block keeps of one head."""
        used = self.scale_bytes(block_size=block_size, dtype=dtype) + block_size * sum(self.widths) * dtype.itemsize
        return -(-used // _LINE) * _LINE


@dataclass(frozen=True, slots=True, kw_only=True)
class KVCache:
    """Keys and values of all layers; block b is the same run of positions in each of them."""

    layers: tuple[CacheLayer, ...]
    block_size: int
    num_blocks: int
    memory: Tensor  # all of it, bytes

    @property
    def num_bytes(self) -> int:
        return self.memory.nbytes


def block_bytes(shapes: Sequence[CacheShape], *, block_size: int, dtype: torch.dtype) -> int:
    """What one block costs in all layers together."""
    return sum(shape.num_heads * shape.head_bytes(block_size=block_size, dtype=dtype) for shape in shapes)


def make_cache(
    shapes: Sequence[CacheShape], *, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
) -> KVCache:
    """Zeros, so that what is read and then masked is never a NaN.

    On a CPU all layers stand in one mapping of huge pages, for a step reads all over it. Memory is taken as blocks are
    first written, or when it is populated.
    """
    num_bytes = num_blocks * block_bytes(shapes, block_size=block_size, dtype=dtype)
    if device.type == "cpu":
        whole = map_memory(num_bytes)[:num_bytes]
    else:
        whole = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    sizes = [num_blocks * block_bytes([shape], block_size=block_size, dtype=dtype) for shape in shapes]
    layers = (
        _make_layer(part.view(num_blocks, shape.num_heads, -1), shape, block_size=block_size, dtype=dtype)
        for part, shape in zip(torch.split(whole, sizes), shapes, strict=True)
    )
    return KVCache(layers=tuple(layers), block_size=block_size, num_blocks=num_blocks, memory=whole)


def _make_layer(whole: Tensor, shape: CacheShape, *, block_size: int, dtype: torch.dtype) -> CacheLayer:
    """Of memory (num_blocks, num_heads, bytes): what a step reads of a block and a head is one run.

    key scales | value scales | keys | values | to a cache line's end
    """
    scales_end = shape.scale_bytes(block_size=block_size, dtype=dtype)
    sizes = [block_size * width * dtype.itemsize for width in shape.widths]
    parts = torch.split(whole[..., scales_end : scales_end + sum(sizes)], sizes, dim=-1)
    keys, values = (
        part.view(dtype).view(*whole.shape[:2], block_size, width)
        for part, width in zip(parts, shape.widths, strict=True)
    )
    if scales_end == 0:
        return CacheLayer(keys=keys, values=values)
    key_scales, value_scales = torch.split(whole[..., :scales_end].view(torch.float32), block_size, dim=-1)
    return CacheLayer(keys=keys, values=values, key_scales=key_scales, value_scales=value_scales)
