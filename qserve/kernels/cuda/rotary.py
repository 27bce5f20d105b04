"""Norms of heads, rotary embedding and the write into the cache on a GPU: a Triton kernel, a program for each head."""

import triton
import triton.language as tl
from torch import Tensor

from qserve.kernels.cuda.rows import round_even
from qserve.kernels.ops import AttentionSpec, Batch, CacheLayer, Norm, NormKind, Rotary


def can_rotate(attention: AttentionSpec) -> bool:
    """Whether its norms are such as the kernel has: RMS, over each head alone."""
    norms = (attention.query_norm, attention.key_norm)
    return all(norm is None or _is_plain(norm, attention.head_dim) for norm in norms)


def rotate_and_store(
    qkv: Tensor, attention: AttentionSpec, rotary: Rotary | None, batch: Batch, cache: CacheLayer
) -> None:
    """Normalize and turn queries and keys in place; write keys and values into their slots."""
    query_norm, key_norm = attention.query_norm, attention.key_norm
    norm = query_norm or key_norm
    _rotate_and_store[len(qkv), attention.num_heads + 2 * attention.num_kv_heads](
        *(qkv, batch.positions, batch.slots, qkv.stride(0), attention.num_heads, attention.num_kv_heads),
        *(None if each is None else each.weight for each in (query_norm, key_norm)),
        0.0 if norm is None else norm.eps,
        *(None, None, 0) if rotary is None else (rotary.cos, rotary.sin, rotary.cos.shape[1]),
        *(cache.keys, cache.values, cache.key_scales, cache.value_scales),
        *(*cache.keys.stride()[:2], *cache.values.stride()[:2]),
        *(0, 0) if cache.key_scales is None else cache.key_scales.stride()[:2],
        block_size=cache.keys.shape[2],
        head_dim=attention.head_dim,
        width=triton.next_power_of_2(attention.head_dim),
        num_warps=1,
    )


def _is_plain(norm: Norm, head_dim: int) -> bool:
    return norm.kind is NormKind.RMS and norm.bias is None and norm.weight.numel() == head_dim


@triton.jit
def _rotate_and_store(
    qkv_at,
    positions_at,
    slots_at,
    qkv_stride,
    num_heads,
    num_kv_heads,
    query_norm_at,
    key_norm_at,
    eps,
    cos_at,
    sin_at,
    half,
    keys_at,
    values_at,
    key_scales_at,
    value_scales_at,
    key_block_stride,
    key_head_stride,
    value_block_stride,
    value_head_stride,
    scale_block_stride,
    scale_head_stride,
    block_size: tl.constexpr,
    head_dim: tl.constexpr,
    width: tl.constexpr,
):
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    columns = tl.arange(0, width)
    is_column = columns < head_dim
    x_at = qkv_at + row * qkv_stride + head * head_dim
    x = tl.load(x_at + columns, mask=is_column, other=0.0)
    if head < num_heads + num_kv_heads:
        partners = tl.where(columns < half, columns + half, columns - half)
        is_turned = columns < 2 * half
        partner = tl.load(x_at + partners, mask=is_turned, other=0.0)
        tl.debug_barrier()  # all is read before anything is written in place
        scale = 1.0
        if query_norm_at is not None or key_norm_at is not None:
            scale = tl.rsqrt(tl.sum(x * x, axis=0) / head_dim + eps)
        if query_norm_at is not None and head < num_heads:
            x *= scale * tl.load(query_norm_at + columns, mask=is_column)
            partner *= scale * tl.load(query_norm_at + partners, mask=is_turned)
        if key_norm_at is not None and head >= num_heads:
            x *= scale * tl.load(key_norm_at + columns, mask=is_column)
            partner *= scale * tl.load(key_norm_at + partners, mask=is_turned)
        if cos_at is not None:
            at = tl.load(positions_at + row) * half + tl.where(columns < half, columns, columns - half)
            cos, sin = tl.load(cos_at + at, mask=is_turned), tl.load(sin_at + at, mask=is_turned)
            x = tl.where(is_turned, x * cos + tl.where(columns < half, -partner, partner) * sin, x)
        tl.store(x_at + columns, x, mask=is_column)
    slot = tl.load(slots_at + row)
    block, offset = slot // block_size, slot % block_size
    if head >= num_heads + num_kv_heads:
        kv_head = head - num_heads - num_kv_heads
        at = block * value_block_stride + kv_head * value_head_stride + offset * head_dim
        scale_at = block * scale_block_stride + kv_head * scale_head_stride + offset
        _store(x, values_at + at, value_scales_at, scale_at, columns, is_column)
    elif head >= num_heads:
        kv_head = head - num_heads
        at = block * key_block_stride + kv_head * key_head_stride + offset * head_dim
        scale_at = block * scale_block_stride + kv_head * scale_head_stride + offset
        _store(x, keys_at + at, key_scales_at, scale_at, columns, is_column)


@triton.jit
def _store(x, at, scales_at, scale_at, columns, is_column):
    """As it is, or as int8 codes: `quantize_heads` of `reference_attention.py`."""
    if scales_at is not None:
        scale = tl.maximum(tl.max(tl.abs(x), axis=0), 1e-30) * (1.0 / 127.0)
        tl.store(scales_at + scale_at, scale)
        x = round_even(x * tl.div_rn(1.0, scale))
    tl.store(at + columns, x.to(at.dtype.element_ty), mask=is_column)
