"""How a linear's input is quantized, in plain torch, written from torchao's definitions.

Each kind sees one token alone. Codes come back as float32 numbers, so that whoever multiplies them needs no other type.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from qserve.quant.weight import ActivationQuantization

_INT8_MIN, _INT8_MAX = -128, 127
_FLOAT8_MAX = 448.0  # of float8_e4m3fn
_FLOAT4_MAX = 6.0  # of e2m1
_E8M0_BIAS = 127
_FLOAT8_GROUP, _MX_GROUP, _NVFP4_GROUP = 128, 32, 16


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
    """float8_e4m3fn codes (rows, features) and scales (rows, 1); a row of zeros has scale one."""
    scales = x.abs().amax(dim=-1, keepdim=True) / _FLOAT8_MAX
    scales = torch.where(scales == 0, 1.0, scales)
    return _to_float8(x / scales), scales


def _to_float8(x: Tensor) -> Tensor:
    return x.clamp(-_FLOAT8_MAX, _FLOAT8_MAX).to(torch.float8_e4m3fn).to(torch.float32)


def _to_float4(x: Tensor) -> Tensor:
    """The nearest of 0, 0.5, 1, 1.5, 2, 3, 4, 6, ties to the even code; their distance grows with the exponent."""
    size = x.abs()
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    return (torch.round(x / step) * step).clamp(-_FLOAT4_MAX, _FLOAT4_MAX)


def _round_trip_asymmetric(x: Tensor) -> Tensor:
    codes, scales, zero_points = quantize_int8_asymmetric(x)
    return (codes - zero_points) * scales


def _round_trip_symmetric(x: Tensor) -> Tensor:
    codes, scales = quantize_int8_symmetric(x)
    return codes * scales


def _round_trip_float8(x: Tensor) -> Tensor:
    codes, scales = quantize_float8(x)
    return codes * scales


def _round_trip_float8_groups(x: Tensor) -> Tensor:
    return _round_trip_float8(x.unflatten(-1, (-1, _FLOAT8_GROUP))).flatten(-2)  # type: ignore[no-untyped-call]


def _round_trip_mx(x: Tensor, convert: Callable[[Tensor], Tensor], largest: float) -> Tensor:
    """One power of two for each group, rounded up so that nothing overflows; 2^-127 leaves the codes unscaled."""
    groups = x.unflatten(-1, (-1, _MX_GROUP))  # type: ignore[no-untyped-call]
    ratios = groups.abs().amax(dim=-1, keepdim=True) / largest
    exponents = torch.log2(ratios).ceil().clamp(-_E8M0_BIAS, _E8M0_BIAS)
    factors = torch.where(exponents == -_E8M0_BIAS, 1.0, torch.exp2(-exponents))
    codes = convert((groups * factors).clamp(-largest, largest))
    return (codes * torch.exp2(exponents)).flatten(-2)


def _round_trip_nvfp4(x: Tensor) -> Tensor:
    """Group scales in float8, themselves scaled for the token."""
    groups = x.unflatten(-1, (-1, _NVFP4_GROUP))  # type: ignore[no-untyped-call]
    largest = x.abs().amax(dim=-1, keepdim=True).unsqueeze(-1)  # (tokens, 1, 1)
    token_scales = torch.where(largest == 0, 1.0, largest / (_FLOAT8_MAX * _FLOAT4_MAX))
    group_scales = groups.abs().amax(dim=-1, keepdim=True) / _FLOAT4_MAX / token_scales
    group_scales = _to_float8(group_scales.clamp(min=torch.finfo(torch.float8_e4m3fn).tiny))
    codes = _to_float4((groups * ((1.0 / token_scales) / group_scales)).clamp(-_FLOAT4_MAX, _FLOAT4_MAX))
    return (codes * (token_scales * group_scales)).flatten(-2)


ROUND_TRIPS: Mapping[ActivationQuantization, Callable[[Tensor], Tensor]] = {
    ActivationQuantization.NONE: lambda x: x,
    ActivationQuantization.INT8_ASYMMETRIC: _round_trip_asymmetric,
    ActivationQuantization.INT8_SYMMETRIC: _round_trip_symmetric,
    ActivationQuantization.FLOAT8: _round_trip_float8,
    ActivationQuantization.FLOAT8_GROUPS: _round_trip_float8_groups,
    ActivationQuantization.MXFP8: lambda x: _round_trip_mx(x, _to_float8, _FLOAT8_MAX),
    ActivationQuantization.MXFP4: lambda x: _round_trip_mx(x, _to_float4, _FLOAT4_MAX),
    ActivationQuantization.NVFP4: _round_trip_nvfp4,
}
