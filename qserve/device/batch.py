"""The scheduled chunks of one step as flat tensors. Knows requests only as lists of token ids."""

from collections.abc import Sequence

import torch
from torch import Tensor

from qserve.engine.request import Chunk
from qserve.kernels.ops import Batch


def make_batch(chunks: Sequence[Chunk], *, block_size: int, device: torch.device) -> Batch:
    """Rows in the order of the chunks; a chunk that reaches its request's end has its last row sampled."""
    token_ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    starts = [0]
    sample_rows: list[int] = []
    for chunk in chunks:
        span = range(chunk.start, chunk.end)
        token_ids += chunk.request.token_ids[chunk.start : chunk.end]
        positions += span
        slots += [chunk.block_ids[p // block_size] * block_size + p % block_size for p in span]
        starts.append(len(token_ids))
        if chunk.is_last:
            sample_rows.append(len(token_ids) - 1)

    def tensor(values: list[int], dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)

    return Batch(
        token_ids=tensor(token_ids),
        positions=tensor(positions),
        slots=tensor(slots),
        query_starts=tensor(starts, torch.int32),
        context_lens=tensor([chunk.end for chunk in chunks], torch.int32),
        block_tables=_tables(chunks, block_size).to(device, non_blocking=True),
        sample_rows=tensor(sample_rows),
        chunk_tokens=tuple(chunk.num_tokens for chunk in chunks),
        chunk_ends=tuple(chunk.end for chunk in chunks),
    )


def _tables(chunks: Sequence[Chunk], block_size: int) -> Tensor:
    """The blocks up to each chunk's end, zeros behind: (chunks, widest) int32."""
    counts = [-(-chunk.end // block_size) for chunk in chunks]
    width = max(counts, default=0)
    rows = [[*chunk.block_ids[:count], *([0] * (width - count))] for chunk, count in zip(chunks, counts, strict=True)]
    return torch.tensor(rows, dtype=torch.int32).view(len(chunks), width)
