"""What an integer kernel with dynamic int8 activations computes, in plain torch and exact to the bit.

Every operation is rounded to float32 as it is written here, and so must a compiled kernel's be.
"""

import torch
from torch import Tensor

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
    """
    assert weight.offsets is None, "integer kernels know no float offsets"
    assert weight.zero_points is None or not weight.zero_points.is_floating_point(), "nor float zero points"
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
