"""Activations as block-scaled floats, in plain torch: what comes out of quantizing an input and reading it back.

Each function maps (tokens, features) float32 to the same shape, token by token, with torchao's arithmetic; in_features
is a multiple of the block, as the weight's is. The integer kinds and float8 by token belong to the kernels.
"""

import torch
from torch import Tensor

_FLOAT8_MAX = 448.0  # of e4m3
_FLOAT8_TINY = torch.finfo(torch.float8_e4m3fn).tiny
_FLOAT4_MAX = 6.0  # of e2m1


def round_trip_float8_groups(x: Tensor) -> Tensor:
    """e4m3 with one float32 scale per 128 features."""
    blocks = _blocks(x, 128)
    scales = blocks.abs().amax(-1, keepdim=True) / _FLOAT8_MAX
    scales = torch.where(scales == 0, 1.0, scales)
    return (_float8(blocks / scales) * scales).flatten(-2)


def round_trip_mxfp8(x: Tensor) -> Tensor:
    """e4m3 with one power of two per 32 features, the smallest that keeps the largest value in range."""
    blocks, scales = _mx_blocks(x, _FLOAT8_MAX)
    return (_float8(blocks) * scales).flatten(-2)


def round_trip_mxfp4(x: Tensor) -> Tensor:
    """e2m1 with one power of two per 32 features, chosen the same way."""
    blocks, scales = _mx_blocks(x, _FLOAT4_MAX)
    return (round_float4(blocks) * scales).flatten(-2)


def round_trip_nvfp4(x: Tensor) -> Tensor:
    """e2m1 with one e4m3 scale per 16 features, itself scaled by one float32 per token."""
    blocks = _blocks(x, 16)
    token_scales = x.abs().amax(-1, keepdim=True).unsqueeze(-1) / (_FLOAT8_MAX * _FLOAT4_MAX)
    token_scales = torch.where(token_scales == 0, 1.0, token_scales)
    block_scales = blocks.abs().amax(-1, keepdim=True) / _FLOAT4_MAX / token_scales
    block_scales = _float8(block_scales.clamp(min=_FLOAT8_TINY))
    codes = round_float4(blocks * ((1.0 / token_scales) / block_scales))
    return (codes * (token_scales * block_scales)).flatten(-2)


def round_float4(x: Tensor) -> Tensor:
    """To the nearest of 0, 0.5, 1, 1.5, 2, 3, 4 and 6 with either sign; ties go to the even code."""
    magnitude = x.abs().clamp(max=_FLOAT4_MAX)
    steps = torch.exp2(torch.frexp(magnitude).exponent.clamp(1, 3) - 2.0)
    return torch.copysign(torch.round(magnitude / steps) * steps, x)


def _blocks(x: Tensor, size: int) -> Tensor:
    return x.reshape(*x.shape[:-1], -1, size)  # (tokens, blocks, size)


def _mx_blocks(x: Tensor, largest: float) -> tuple[Tensor, Tensor]:
    """Blocks divided by their power of two, and that power; 2 ** -127, which zeros get, divides nothing."""
    blocks = _blocks(x, 32)
    exponents = torch.log2(blocks.abs().amax(-1, keepdim=True) / largest).ceil().clamp(-127, 127)
    factors = torch.where(exponents == -127, 1.0, torch.exp2(-exponents))
    return (blocks * factors).clamp(-largest, largest), torch.exp2(exponents)


def _float8(x: Tensor) -> Tensor:
    return x.clamp(-_FLOAT8_MAX, _FLOAT8_MAX).to(torch.float8_e4m3fn).to(torch.float32)
