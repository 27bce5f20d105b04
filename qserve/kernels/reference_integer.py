"""How activations are quantized, and what an integer kernel computes with them, in plain torch.

Written from torchao's definitions; every operation is rounded to float32, and so must a compiled kernel's be.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from qserve.quant.weight import ActivationQuantization, QuantizedWeight

_INT8_MIN, _INT8_MAX = -128, 127
_FLOAT8_MAX = 448.0  # of float8_e4m3fn


def quantize_int8_asymmetric(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """int8 codes (tokens, features), scales and zero points (tokens, 1), as torchao's choose_qparams_affine has them.

    The code is round(x * (1 / scale)) + zero point, which is not always round(x / scale) + zero point. Codes and zero
    points come back as float32 whole numbers.
    """
    low = x.amin(dim=-1, keepdim=True).clamp(max=0.0)
    high = x.amax(dim=-1, keepdim=True).clamp(min=0.0)
    scales = ((high - low) / float(_INT8_MAX - _INT8_MIN)).clamp(min=torch.finfo(torch.float32).smallest_normal)
    zero_points = (_INT8_MIN - torch.round(low / scales)).clamp(_INT8_MIN, _INT8_MAX)
    codes = (torch.round(x * (1.0 / scales)) + zero_points).clamp(_INT8_MIN, _INT8_MAX)
    return codes, scales, zero_points


def quantize_int8_symmetric(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales as above, without zero points, as torchao's Int8Tensor has them."""
    scales = (x.abs().amax(dim=-1, keepdim=True) / (float(_INT8_MAX - _INT8_MIN) / 2)).clamp(
        min=torch.finfo(torch.float32).eps
    )
    return torch.round(x * (1.0 / scales)).clamp(_INT8_MIN, _INT8_MAX), scales


def quantize_float8(x: Tensor) -> tuple[Tensor, Tensor]:
    """float8_e4m3fn codes as float32 (tokens, features) and scales (tokens, 1); a row of zeros has scale one."""
    scales = x.abs().amax(dim=-1, keepdim=True) / _FLOAT8_MAX
    scales = torch.where(scales == 0, 1.0, scales)
    codes = (x / scales).clamp(-_FLOAT8_MAX, _FLOAT8_MAX).to(torch.float8_e4m3fn)
    return codes.to(torch.float32), scales


def _round_trip_asymmetric(x: Tensor) -> Tensor:
    codes, scales, zero_points = quantize_int8_asymmetric(x)
    return (codes - zero_points) * scales


def _round_trip_symmetric(x: Tensor) -> Tensor:
    codes, scales = quantize_int8_symmetric(x)
    return codes * scales


def _round_trip_float8(x: Tensor) -> Tensor:
    codes, scales = quantize_float8(x)
    return codes * scales


ROUND_TRIPS: Mapping[ActivationQuantization, Callable[[Tensor], Tensor]] = {
    ActivationQuantization.NONE: lambda x: x,
    ActivationQuantization.INT8_ASYMMETRIC: _round_trip_asymmetric,
    ActivationQuantization.INT8_SYMMETRIC: _round_trip_symmetric,
    ActivationQuantization.FLOAT8: _round_trip_float8,
}


def integer_linear(x: Tensor, weight: QuantizedWeight) -> Tensor:
    """What a kernel with dynamic int8 activations computes, to the bit: (tokens, out_features) float32, without bias.

    With int8 codes q of a token, its scale s and zero point z, and codes w, scales t and zero points v of the weight:

        dots[g] = sum over k in group g of q[k] * (w[k] - v[g])             exact integers
        acc     = sum over g, ascending, of t[g] * float(dots[g])           float32: multiply, then add; no fma
        fix     = sum over g, ascending, of t[g] * float(sum_k(w[k] - v[g]))   the same way; a constant of the weight
        y       = s * (acc - z * fix)                                       each operation rounded to float32

    Symmetric activations have no z and no fix: y = s * acc.
    """
    assert weight.offsets is None, "integer kernels know no float offsets"
    if weight.pre_scale is not None:
        x = x * weight.pre_scale.to(torch.float32)
    if weight.activation is ActivationQuantization.INT8_SYMMETRIC:
        codes, scales = quantize_int8_symmetric(x)
        return scales * _sum_groups(codes, weight)
    assert weight.activation is ActivationQuantization.INT8_ASYMMETRIC, weight.activation
    codes, scales, zero_points = quantize_int8_asymmetric(x)
    fix = _sum_groups(torch.ones_like(codes[:1]), weight)  # (1, out_features)
    return scales * (_sum_groups(codes, weight) - zero_points * fix)


def _sum_groups(codes: Tensor, weight: QuantizedWeight) -> Tensor:
    """sum_g t[g] * dots[g] in ascending order: (tokens, out_features) float32. float64 holds every dot exactly."""
    out_features, num_groups = weight.scales.shape
    integers = weight.codes.to(torch.float64).view(out_features, num_groups, weight.group_size)
    if weight.zero_points is not None:
        integers = integers - weight.zero_points.to(torch.float64).unsqueeze(-1)
    inputs = codes.to(torch.float64).view(-1, num_groups, weight.group_size)
    scales = weight.scales.to(torch.float32)
    total = torch.zeros(codes.shape[0], out_features, device=codes.device)
    for group in range(num_groups):
        dots = (inputs[:, group] @ integers[:, group].T).to(torch.float32)
        total = total + scales[:, group] * dots
    return total
