"""What is done to whole rows on a GPU, in Triton kernels of a program for each row: norms, and the codes of inputs."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from qserve.kernels.ops import Norm, NormKind

_LEAST_NORMAL = torch.finfo(torch.float32).smallest_normal
_EPS = torch.finfo(torch.float32).eps


def normalize(x: Tensor, norm: Norm | None) -> Tensor:
    """As that of `reference.py`: (rows, features) float32."""
    if norm is None:
        return x
    x = x.contiguous()
    y = torch.empty_like(x)
    _normalize[(len(x),)](
        *(x, norm.weight, norm.bias, y, x.shape[1], norm.eps),
        is_layer=norm.kind is NormKind.LAYER,
        width=triton.next_power_of_2(x.shape[1]),
        num_warps=8,
    )
    return y


def quantize_int8(x: Tensor, *, is_symmetric: bool) -> tuple[Tensor, Tensor]:
    """int8 codes less their zero points, as float32, and scales (rows, 1), as those of `reference_activations.py`."""
    x = x.contiguous()
    codes, scales = torch.empty_like(x), x.new_empty(len(x), 1)
    _quantize[(len(x),)](
        *(x, codes, scales, x.shape[1], _EPS if is_symmetric else _LEAST_NORMAL),
        is_symmetric=is_symmetric,
        width=triton.next_power_of_2(x.shape[1]),
        num_warps=8,
    )
    return codes, scales


@triton.jit
def _normalize(x_at, weight_at, bias_at, y_at, num_features, eps, is_layer: tl.constexpr, width: tl.constexpr):
    features = tl.arange(0, width)
    is_feature = features < num_features
    start = tl.program_id(0).to(tl.int64) * num_features
    x = tl.load(x_at + start + features, mask=is_feature, other=0.0)
    if is_layer:
        x = tl.where(is_feature, x - tl.sum(x, axis=0) / num_features, 0.0)
    y = x * tl.rsqrt(tl.sum(x * x, axis=0) / num_features + eps) * tl.load(weight_at + features, mask=is_feature)
    if bias_at is not None:
        y += tl.load(bias_at + features, mask=is_feature)
    tl.store(y_at + start + features, y, mask=is_feature)


@triton.jit
def _quantize(x_at, codes_at, scales_at, num_features, least, is_symmetric: tl.constexpr, width: tl.constexpr):
    features = tl.arange(0, width)
    is_feature = features < num_features
    row = tl.program_id(0).to(tl.int64)
    at = row * num_features + features
    x = tl.load(x_at + at, mask=is_feature, other=0.0)  # as every row's range has zero in it, so may this one's
    low, high = tl.min(x, axis=0), tl.max(x, axis=0)
    if is_symmetric:
        scale = tl.maximum(tl.div_rn(tl.maximum(-low, high), 127.5), least)
        codes = tl.clamp(round_even(x * tl.div_rn(1.0, scale)), -128.0, 127.0)
    else:
        scale = tl.maximum(tl.div_rn(high - low, 255.0), least)
        zero_point = tl.clamp(-128.0 - round_even(tl.div_rn(low, scale)), -128.0, 127.0)
        codes = tl.clamp(round_even(x * tl.div_rn(1.0, scale)) + zero_point, -128.0, 127.0) - zero_point
    tl.store(codes_at + at, codes, mask=is_feature)
    tl.store(scales_at + row, scale)


@triton.jit
def round_even(x):
    """To the nearest whole number, ties to even: next to 1.5 * 2^23 there are no others. For |x| < 2^22."""
    return (x + 12582912.0) - 12582912.0
