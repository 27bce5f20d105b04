"""Attention over the paged cache on a GPU: a Triton kernel, a program for each row, key-value head and part of it.

What it does depends on tensors alone, never on numbers of the host, so a recorded step can be replayed for other
contexts. The softmax is made in one pass over the keys (https://arxiv.org/abs/1805.02867), by several programs where
rows are few, whose parts a second kernel joins.
"""

import triton
import triton.language as tl
from torch import Tensor

from qserve.kernels.ops import AttentionSpec, Batch, CacheLayer

_TILE = 64  # positions looked at together
_LEAST = 16  # rows and columns of a product
_PROGRAMS = 512  # from which on the GPU has enough to do
_MOST_PARTS = 64
_LEAST_PART = 256  # positions that are worth a program


def attend_paged(queries: Tensor, attention: AttentionSpec, batch: Batch, cache: CacheLayer) -> Tensor:
    """Queries (tokens, num_heads, head_dim), their rows any distance apart: (tokens, num_heads * value_dim)."""
    num_tokens, num_heads, head_dim = queries.shape
    num_kv_heads, block_size, value_dim = cache.values.shape[1:]
    num_chunks, table_width = batch.block_tables.shape
    num_parts = _count_parts(num_tokens * num_kv_heads, table_width * block_size)
    parts = queries.new_empty(num_tokens, num_heads, num_parts, value_dim)
    shares = queries.new_empty(num_tokens, num_heads, num_parts, 2)
    _attend[num_tokens, num_kv_heads, num_parts](
        *(queries, cache.keys, cache.values, cache.key_scales, cache.value_scales, parts, shares),
        *(batch.block_tables, batch.query_starts, batch.positions, num_chunks, table_width, queries.stride(0)),
        *(*cache.keys.stride()[:2], *cache.values.stride()[:2]),
        *(0, 0) if cache.key_scales is None else cache.key_scales.stride()[:2],
        *(attention.scale, attention.soft_cap, attention.sliding_window, num_parts),
        num_shared=num_heads // num_kv_heads,
        shared_width=max(triton.next_power_of_2(num_heads // num_kv_heads), _LEAST),
        head_dim=head_dim,
        head_width=max(triton.next_power_of_2(head_dim), _LEAST),
        value_dim=value_dim,
        value_width=max(triton.next_power_of_2(value_dim), _LEAST),
        block_size=block_size,
        tile=_TILE,
    )
    if num_parts == 1:
        return parts.view(num_tokens, -1)
    mixed = queries.new_empty(num_tokens, num_heads * value_dim)
    _join[num_tokens, num_heads](
        *(parts, shares, mixed, num_heads, num_parts),
        most_parts=_MOST_PARTS,
        value_dim=value_dim,
        value_width=triton.next_power_of_2(value_dim),
    )
    return mixed


def _count_parts(num_programs: int, num_positions: int) -> int:
    """As many programs as keep the GPU busy, but none for less than it is worth."""
    return max(min(_PROGRAMS // num_programs, num_positions // _LEAST_PART, _MOST_PARTS), 1)


# What changes from step to step is not compiled in: a new number would be a second's wait.
@triton.jit(do_not_specialize=["num_chunks", "table_width", "num_parts"])
def _attend(
    queries_at,
    keys_at,
    values_at,
    key_scales_at,
    value_scales_at,
    parts_at,
    shares_at,
    tables_at,
    query_starts_at,
    positions_at,
    num_chunks,
    table_width,
    query_stride,
    key_block_stride,
    key_head_stride,
    value_block_stride,
    value_head_stride,
    scale_block_stride,
    scale_head_stride,
    scale,
    soft_cap,
    window,
    num_parts,
    num_shared: tl.constexpr,
    shared_width: tl.constexpr,
    head_dim: tl.constexpr,
    head_width: tl.constexpr,
    value_dim: tl.constexpr,
    value_width: tl.constexpr,
    block_size: tl.constexpr,
    tile: tl.constexpr,
):
    """The query heads of one row that share a key-value head, over one of the parts of what they see.

    parts are (tokens, heads, parts, value_dim), each a softmax of its own; shares the largest score of each, and the
    sum of what its scores are to that.
    """
    row, kv_head, part = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    heads, columns, value_columns = tl.arange(0, shared_width), tl.arange(0, head_width), tl.arange(0, value_width)
    chunk = 0
    for start in range(0, num_chunks, tile):
        chunks = start + tl.arange(0, tile)
        is_before = (chunks < num_chunks) & (tl.load(query_starts_at + 1 + chunks, mask=chunks < num_chunks) <= row)
        chunk += tl.sum(is_before.to(tl.int32), axis=0)
    position = tl.load(positions_at + row).to(tl.int32)
    is_head = heads < num_shared
    queries = tl.load(
        queries_at + row * query_stride + (kv_head * num_shared + heads)[:, None] * head_dim + columns[None, :],
        mask=is_head[:, None] & (columns < head_dim)[None, :],
        other=0.0,
    )
    first = 0
    if window is not None:
        first = tl.maximum(position - window + 1, 0)
    length = tl.cdiv(tl.cdiv(position + 1 - first, num_parts), tile) * tile
    first += part * length
    last = tl.minimum(first + length - 1, position)
    most = tl.full((shared_width,), -1e38, tl.float32)
    total = tl.zeros((shared_width,), tl.float32)
    mixed = tl.zeros((shared_width, value_width), tl.float32)
    for start in range(first, last + 1, tile):
        seen = start + tl.arange(0, tile)
        is_seen = seen <= last
        block = tl.load(tables_at + chunk * table_width + seen // block_size, mask=is_seen, other=0).to(tl.int64)
        at = block * key_block_stride + kv_head * key_head_stride + seen % block_size * head_dim
        is_wanted = is_seen[:, None] & (columns < head_dim)[None, :]
        keys = tl.load(keys_at + at[:, None] + columns, mask=is_wanted, other=0.0).to(tl.float32)
        at = block * value_block_stride + kv_head * value_head_stride + seen % block_size * value_dim
        is_wanted = is_seen[:, None] & (value_columns < value_dim)[None, :]
        values = tl.load(values_at + at[:, None] + value_columns, mask=is_wanted, other=0.0).to(tl.float32)
        if key_scales_at is not None:
            at = block * scale_block_stride + kv_head * scale_head_stride + seen % block_size
            keys *= tl.load(key_scales_at + at, mask=is_seen, other=0.0)[:, None]
            values *= tl.load(value_scales_at + at, mask=is_seen, other=0.0)[:, None]
        scores = tl.dot(queries, tl.trans(keys), input_precision="tf32x3") * scale
        if soft_cap is not None:
            scores = (2.0 / (1.0 + tl.exp(-2.0 * scores / soft_cap)) - 1.0) * soft_cap
        scores = tl.where(is_seen[None, :], scores, float("-inf"))
        more = tl.maximum(most, tl.max(scores, axis=1))
        shrink = tl.exp(most - more)
        weights = tl.exp(scores - more[:, None])
        total = total * shrink + tl.sum(weights, axis=1)
        mixed = mixed * shrink[:, None] + tl.dot(weights, values, input_precision="tf32x3")
        most = more
    at = ((row * tl.num_programs(1) + kv_head) * num_shared + heads) * num_parts + part
    mixed /= tl.maximum(total, 1e-30)[:, None]  # of a part that is empty nothing is taken
    is_wanted = is_head[:, None] & (value_columns < value_dim)[None, :]
    tl.store(parts_at + at[:, None] * value_dim + value_columns[None, :], mixed, mask=is_wanted)
    tl.store(shares_at + at * 2, most, mask=is_head)
    tl.store(shares_at + at * 2 + 1, total, mask=is_head)


@triton.jit(do_not_specialize=["num_parts"])
def _join(
    parts_at,
    shares_at,
    mixed_at,
    num_heads,
    num_parts,
    most_parts: tl.constexpr,
    value_dim: tl.constexpr,
    value_width: tl.constexpr,
):
    """One head of one row: the parts, each as much as its share of the whole softmax is."""
    head = tl.program_id(0).to(tl.int64) * num_heads + tl.program_id(1)
    parts, columns = tl.arange(0, most_parts), tl.arange(0, value_width)
    is_part = parts < num_parts
    at = head * num_parts + parts
    most = tl.load(shares_at + at * 2, mask=is_part, other=float("-inf"))
    shares = tl.load(shares_at + at * 2 + 1, mask=is_part, other=0.0) * tl.exp(most - tl.max(most, axis=0))
    is_wanted = is_part[:, None] & (columns < value_dim)[None, :]
    values = tl.load(parts_at + at[:, None] * value_dim + columns[None, :], mask=is_wanted, other=0.0)
    mixed = tl.sum(values * shares[:, None], axis=0) / tl.sum(shares, axis=0)
    tl.store(mixed_at + head * value_dim + columns, mixed, mask=columns < value_dim)
