"""What kernels whose sums are exact integers compute, in plain torch and to the bit.

Every operation is rounded to float32 as it is written here, and so must a compiled kernel's be.
"""

import torch
from torch import Tensor

from qserve.kernels.aligned_scales import align_scales, whole_weights
from qserve.kernels.reference_activations import quantize_int8_asymmetric, quantize_int8_symmetric
from qserve.quant.weight import ActivationQuantization, QuantizedWeight


def integer_linear(x: Tensor, weight: QuantizedWeight) -> Tensor:
    """What a kernel with dynamic int8 activations computes, to the bit: (tokens, out_features) float32, without bias.

    With int8 codes q of a token, its scale s and zero point z, and codes w, scales t and zero points v of the weight:

        dots[g] = sum over k in group g of q[k] * (w[k] - v[g])             exact integers
        acc     = sum over g, ascending, of t[g] * float(dots[g])           float32: multiply, then add; no fma
        fix     = sum over g, ascending, of t[g] * float(sum_k(w[k] - v[g]))   the same way; a constant of the weight
        y       = s * (acc - z * fix)                                       each operation rounded to float32

    Symmetric activations have no z and no fix: y = s * acc.

    Scales that are aligned (`aligned_scales.py`) are t[g] = u * m[g] with whole m and one power of two u a channel:

        acc     = sum over g of m[g] * dots[g]                              an exact integer
        fix     = sum over g of m[g] * sum_k(w[k] - v[g])                   an exact integer
        y       = s * (u * float(acc - z * fix))                            rounded to float32 by float and by s
    """
    assert weight.offsets is None, "integer kernels know no float offsets"
    assert weight.zero_points is None or not weight.zero_points.is_floating_point(), "nor float zero points"
    if weight.pre_scale is not None:
        x = x * weight.pre_scale.to(torch.float32)
    codes, scales, zero_points = _quantize(x, weight.activation)
    aligned = align_scales(weight)
    ones = torch.ones_like(codes[:1])
    if aligned is not None:
        sums, fix = (_sum_exactly(each, weight, aligned.multiples) for each in (codes, ones))
        return scales * (aligned.units * (sums - zero_points.to(torch.float64) * fix).to(torch.float32))
    return scales * (_sum_groups(codes, weight) - zero_points * _sum_groups(ones, weight))


_MOST_EXACT = torch.tensor(127.0 * 256)  # of an exact input: two signed digits of base 256
_NOTHING = 1e-24  # a row without a larger number is a row of zeros


def exact_linear(x: Tensor, weight: QuantizedWeight) -> Tensor:
    """A 4-bit weight with aligned scales times float inputs: (tokens, out_features) float32, without bias.

    An input is a whole number q of 16 bits times its token's scale s, a weight a whole number w of 16 bits times its
    channel's unit u:

        y = s * (u * float(sum over k of q[k] * w[k]))       the sum exact, each operation rounded to float32
    """
    aligned = align_scales(weight)
    assert aligned is not None, "this weight's scales are multiplied group by group"
    if weight.pre_scale is not None:
        x = x * weight.pre_scale.to(torch.float32)
    largest = x.abs().amax(dim=1, keepdim=True)
    factors = torch.where(largest > _NOTHING, _MOST_EXACT / largest, 0.0)
    numbers = torch.round(x * factors).to(torch.float64)
    sums = numbers @ whole_weights(weight, aligned).flatten(1).to(torch.float64).T
    return largest / _MOST_EXACT * (aligned.units * sums.to(torch.float32))


def _quantize(x: Tensor, activation: ActivationQuantization) -> tuple[Tensor, Tensor, Tensor]:
    if activation is ActivationQuantization.INT8_SYMMETRIC:
        codes, scales = quantize_int8_symmetric(x)
        return codes, scales, torch.zeros_like(scales)
    assert activation is ActivationQuantization.INT8_ASYMMETRIC, activation
    return quantize_int8_asymmetric(x)


def _sum_exactly(codes: Tensor, weight: QuantizedWeight, multiples: Tensor) -> Tensor:
    """sum_g m[g] * dots[g]: (tokens, out_features) float64, which holds integers of this size exactly."""
    integers = _shifted_codes(weight) * multiples.to(torch.float64).unsqueeze(-1)
    return codes.to(torch.float64) @ integers.flatten(1).T


def _shifted_codes(weight: QuantizedWeight) -> Tensor:
    """w - v: (out_features, groups, group_size) float64."""
    integers = weight.codes.to(torch.float64).view(*weight.scales.shape, weight.group_size)
    return integers if weight.zero_points is None else integers - weight.zero_points.to(torch.float64).unsqueeze(-1)


def _sum_groups(codes: Tensor, weight: QuantizedWeight) -> Tensor:
    """sum_g t[g] * dots[g] in ascending order: (tokens, out_features) float32. float64 holds every dot exactly."""
    out_features, num_groups = weight.scales.shape
    integers = _shifted_codes(weight)
    inputs = codes.to(torch.float64).view(-1, num_groups, weight.group_size)
    scales = weight.scales.to(torch.float32)
    total = torch.zeros(codes.shape[0], out_features, device=codes.device)
    for group in range(num_groups):
        dots = (inputs[:, group] @ integers[:, group].T).to(torch.float32)
        total = total + scales[:, group] * dots
    return total
