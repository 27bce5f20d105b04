"""The paged key-value cache: the tensors, and how many blocks of them fit into so much memory.

Knows no request: which block belongs to whom is decided in `engine`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

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
    """Zeros, so that what is read and then masked is never a NaN."""

    def empty(shape: CacheShape, width: int) -> torch.Tensor:
        return torch.zeros(num_blocks, shape.num_heads, block_size, width, dtype=dtype, device=device)

    layers = (
        CacheLayer(keys=empty(shape, shape.head_dim), values=empty(shape, shape.value_dim or shape.head_dim))
        for shape in shapes
    )
    return KVCache(layers=tuple(layers), block_size=block_size, num_blocks=num_blocks)
