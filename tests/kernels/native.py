"""Random weights and batches for the tests of the compiled kernels, and the kernels of each variant."""

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from qserve.kernels.build import supported_variants
from qserve.kernels.native import NativeOps, open_native
from qserve.kernels.ops import Batch
from qserve.quant.weight import ActivationQuantization, QuantizedWeight

VARIANTS = tuple(variant.name for variant in supported_variants())


@cache
def open_variant(name: str, num_threads: int = 2) -> NativeOps:
    """Compiled on the first run on a machine, from the user's cache afterwards."""
    return open_native(variant=name, num_threads=num_threads)


def make_weight(
    out_features: int,
    in_features: int,
    group_size: int,
    *,
    bits: int = 4,
    activation: ActivationQuantization = ActivationQuantization.NONE,
    has_zeros: bool = False,
    has_offsets: bool = False,
    scale_dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(seed)
    limit = 1 << (bits - 1)
    groups = in_features // group_size

    def integers(*shape: int) -> Tensor:
        return torch.randint(-limit, limit, shape, generator=generator).to(torch.int8)

    return QuantizedWeight(
        codes=integers(out_features, in_features),
        scales=(torch.rand(out_features, groups, generator=generator) * 0.02 + 0.001).to(scale_dtype),
        zero_points=integers(out_features, groups) if has_zeros else None,
        offsets=(torch.randn(out_features, groups, generator=generator) * 0.05).to(scale_dtype)
        if has_offsets
        else None,
        group_size=group_size,
        bits=bits,
        dtype=torch.float32,
        activation=activation,
    )


def make_inputs(rows: int, features: int, *, seed: int = 0) -> Tensor:
    """Rows of different sizes, one of zeros, with a few values far from the rest."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, features, generator=generator) * torch.rand(rows, 1, generator=generator) * 4
    x[:, ::37] *= 30
    if rows > 2:
        x[2] = 0
    return x


def make_batch(chunks: Sequence[tuple[int, int]], tables: Sequence[Sequence[int]], block_size: int) -> Batch:
    """chunks are (start, end) positions, tables the blocks of each."""
    positions = [position for start, end in chunks for position in range(start, end)]
    slots = [
        table[position // block_size] * block_size + position % block_size
        for (start, end), table in zip(chunks, tables, strict=True)
        for position in range(start, end)
    ]
    sizes = [end - start for start, end in chunks]
    widest = max(map(len, tables))
    return Batch(
        token_ids=torch.zeros(len(positions), dtype=torch.int64),
        positions=torch.tensor(positions),
        slots=torch.tensor(slots),
        query_starts=torch.tensor([0, *sizes]).cumsum(0).to(torch.int32),
        context_lens=torch.tensor([end for _, end in chunks], dtype=torch.int32),
        block_tables=torch.tensor([[*table, *[0] * (widest - len(table))] for table in tables], dtype=torch.int32),
        sample_rows=torch.zeros(0, dtype=torch.int64),
        chunk_tokens=tuple(sizes),
        chunk_ends=tuple(end for _, end in chunks),
    )


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())
