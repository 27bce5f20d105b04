"""Rotary embedding and attention over a paged cache, in plain torch: prefill and decode rows mixed, grouped heads.

Called by `reference.py`, and by whoever runs a model whose other stages are not ours.
"""

import torch
from torch import Tensor

from qserve.kernels.ops import AttentionSpec, Batch, CacheLayer

_MAX_QUERY_ROWS = 128  # of a chunk computed together: bounds the scores that stand in memory at once


def split_heads(qkv: Tensor, attention: AttentionSpec) -> tuple[Tensor, Tensor, Tensor]:
    """Views of queries (tokens, num_heads, head_dim), keys and values (tokens, num_kv_heads, head_dim)."""
    heads = qkv.view(qkv.shape[0], -1, attention.head_dim)
    end = attention.num_heads + attention.num_kv_heads
    return heads[:, : attention.num_heads], heads[:, attention.num_heads : end], heads[:, end:]


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Turn the pairs (i, i + half) of each head in place; cos and sin are (tokens, half)."""
    half = cos.shape[-1]
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    left, right = heads[..., :half].clone(), heads[..., half : 2 * half].clone()
    heads[..., :half] = left * cos - right * sin
    heads[..., half : 2 * half] = right * cos + left * sin


def store(keys: Tensor, values: Tensor, slots: Tensor, cache: CacheLayer) -> None:
    """Write (tokens, num_kv_heads, head_dim) into the slots."""
    block_size = cache.keys.shape[2]
    blocks, offsets = slots // block_size, slots % block_size
    for heads, stored, scales in ((keys, cache.keys, cache.key_scales), (values, cache.values, cache.value_scales)):
        if scales is None:
            stored[blocks, :, offsets] = heads.to(stored.dtype)
        else:
            stored[blocks, :, offsets], scales[blocks, :, offsets] = quantize_heads(heads)


def quantize_heads(heads: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes and the scales of each head of (tokens, heads, dim): symmetric, ties to even.

    Every operation is one of float32, so whoever does the same has the same bits. The least scale is far below what
    any head needs, and above zero.
    """
    scales = heads.to(torch.float32).abs().amax(dim=-1).clamp_min(1e-30) * (1 / 127)
    return torch.round(heads * scales.reciprocal().unsqueeze(-1)).to(torch.int8), scales


def attend_paged(queries: Tensor, attention: AttentionSpec, batch: Batch, cache: CacheLayer) -> Tensor:
    """Queries (tokens, num_heads, head_dim) over the cache: (tokens, num_heads * value_dim).

    Chunks of as many tokens are computed together, so that the decode rows of a step are one multiplication.
    """
    output = queries.new_empty(*queries.shape[:2], cache.values.shape[3])
    starts = torch.tensor((0, *batch.chunk_tokens)).cumsum(0)[:-1]
    for num_tokens in sorted(set(batch.chunk_tokens)):
        members = [index for index, tokens in enumerate(batch.chunk_tokens) if tokens == num_tokens]
        for group in _split_by_length(members, batch.chunk_ends):
            rows = (starts[group].unsqueeze(1) + torch.arange(num_tokens)).to(queries.device)  # (chunks, tokens)
            longest = max(batch.chunk_ends[index] for index in group)
            chunks = torch.tensor(group, device=queries.device)
            keys, values = (
                _gather(part, scales, batch.block_tables[chunks], longest)
                for part, scales in ((cache.keys, cache.key_scales), (cache.values, cache.value_scales))
            )
            for start in range(0, num_tokens, _MAX_QUERY_ROWS):
                piece = rows[:, start : start + _MAX_QUERY_ROWS]
                output[piece] = _attend(queries[piece], keys, values, batch.positions[piece], attention)
    return output.flatten(1)


def _split_by_length(members: list[int], ends: tuple[int, ...]) -> list[list[int]]:
    """Chunks whose contexts are within a factor of two of each other, so that padding never costs more than that."""
    groups: dict[int, list[int]] = {}
    for index in members:
        groups.setdefault(ends[index].bit_length(), []).append(index)
    return list(groups.values())


def _gather(cache: Tensor, scales: Tensor | None, tables: Tensor, length: int) -> Tensor:
    """The first `length` positions of each table's blocks: (chunks, num_kv_heads, length, head_dim), float32."""
    tables = tables[:, : -(-length // cache.shape[2])]
    blocks = cache[tables].to(torch.float32)  # (chunks, blocks, num_kv_heads, block_size, head_dim)
    if scales is not None:
        blocks *= scales[tables].unsqueeze(-1)
    return blocks.transpose(1, 2).flatten(2, 3)[:, :, :length]


def _attend(queries: Tensor, keys: Tensor, values: Tensor, positions: Tensor, attention: AttentionSpec) -> Tensor:
    """queries (chunks, tokens, num_heads, head_dim) and their positions: (chunks, tokens, num_heads, value_dim)."""
    num_kv_heads, length = keys.shape[1:3]
    grouped = queries.view(*queries.shape[:2], num_kv_heads, -1, queries.shape[3])
    grouped = grouped.permute(0, 2, 3, 1, 4)  # (chunks, kv, heads, tokens, head_dim)
    scores = (grouped.flatten(2, 3) @ keys.transpose(-1, -2)) * attention.scale
    if attention.soft_cap is not None:
        scores = torch.tanh(scores / attention.soft_cap) * attention.soft_cap
    distances = positions.unsqueeze(-1) - torch.arange(length, device=keys.device)  # (chunks, tokens, length)
    is_hidden = distances < 0
    if attention.sliding_window is not None:
        is_hidden |= distances >= attention.sliding_window
    scores = scores.view(*grouped.shape[:-1], length).masked_fill(is_hidden[:, None, None], float("-inf"))
    mixed = torch.softmax(scores, dim=-1).flatten(2, 3) @ values
    return mixed.view(*grouped.shape[:-1], -1).permute(0, 3, 1, 2, 4).flatten(2, 3)
