"""The paged key-value cache: the tensors, and how many blocks of them fit into so much memory.

Knows no request: which block belongs to whom is decided in `engine`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from qserve.kernels.arena import map_memory
from qserve.kernels.ops import CacheLayer


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheShape:
    """What one layer keeps of a position; values are as wide as keys unless `value_dim` says otherwise."""

    num_heads: int
    head_dim: int
    value_dim: int | None = None

    @property
    def num_elements(self) -> int:
        return self.num_heads * (self.head_dim + (self.value_dim or self.head_dim))


@dataclass(frozen=True, slots=True, kw_only=True)
class KVCache:
    """Keys and values of all layers; block b is the same run of positions in each of them."""

    layers: tuple[CacheLayer, ...]
    block_size: int
    num_blocks: int

    @property
    def num_bytes(self) -> int:
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.layers)


def block_bytes(shapes: Sequence[CacheShape], *, block_size: int, dtype: torch.dtype) -> int:
    """What one block costs in all layers together."""
    return sum(shape.num_elements for shape in shapes) * block_size * dtype.itemsize


def make_cache(
    shapes: Sequence[CacheShape], *, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
) -> KVCache:
    """Zeros, so that what is read and then masked is never a NaN.

    On a CPU all layers stand in one mapping of huge pages, for a step reads all over it. Memory is taken as blocks are
    first written.
    """
    widths = [
        (shape.num_heads, width) for shape in shapes for width in (shape.head_dim, shape.value_dim or shape.head_dim)
    ]
    sizes = [num_blocks * block_size * num_heads * width for num_heads, width in widths]
    if device.type == "cpu":
        whole = map_memory(sum(sizes) * dtype.itemsize)[: sum(sizes) * dtype.itemsize].view(dtype)
    else:
        whole = torch.zeros(sum(sizes), dtype=dtype, device=device)
    parts = [
        part.view(num_blocks, num_heads, block_size, width)
        for part, (num_heads, width) in zip(torch.split(whole, sizes), widths, strict=True)
    ]
    layers = (CacheLayer(keys=keys, values=values) for keys, values in zip(parts[::2], parts[1::2], strict=True))
    return KVCache(layers=tuple(layers), block_size=block_size, num_blocks=num_blocks)
