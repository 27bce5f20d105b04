"""Scales of a channel as whole multiples of one unit: then its sum over all groups is an integer, in any order.

A float sum over groups depends on the order, and costs several operations for each group. Scales of bfloat16 have 8
bits and differ by a few powers of two inside a channel, so nearly all of them are multiples, of up to 12 bits, of one
power of two exactly. Others are rounded to such a multiple: that moves a scale by at most 2^-11 of the largest of its
channel, and bfloat16 rounds any scale by as much as 2^-9 of itself.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from qserve.quant.weight import ActivationQuantization, QuantizedWeight

_MOST = 4079  # times a code of -8 it fits in 16 bits, two digits of 8
_MOST_SHIFTED = 2039  # the same for a code less its zero point: up to 15 either way
_LONGEST_GROUP = 512  # inputs whose products with codes and one multiple stay below 2^31
_DYNAMIC = (ActivationQuantization.INT8_ASYMMETRIC, ActivationQuantization.INT8_SYMMETRIC)
_STEP = 64  # inputs: what the kernel for many rows multiplies at once
_LARGEST_INPUT = 128  # of an int8 code, and of a zero point


@dataclass(frozen=True, slots=True, kw_only=True)
class AlignedScales:
    multiples: Tensor  # (out_features, groups) int16
    units: Tensor  # (out_features,) float32, powers of two

    @property
    def values(self) -> Tensor:
        """The scales that kernels multiply with: (out_features, groups) float32."""
        return self.units.unsqueeze(1) * self.multiples


def align_scales(weight: QuantizedWeight) -> AlignedScales | None:
    """The scales of a 4-bit weight with int8 inputs and several groups; None for every other weight."""
    if not _is_alignable(weight):
        return None
    scales = weight.scales.to(torch.float64)
    most = _MOST if weight.zero_points is None else _MOST_SHIFTED
    largest = scales.abs().amax(dim=1).clamp(min=torch.finfo(torch.float32).tiny)
    units = torch.exp2(torch.ceil(torch.log2(largest / most)))
    multiples = torch.round(scales / units.unsqueeze(1)).to(torch.int16)
    return AlignedScales(multiples=multiples, units=units.to(torch.float32))


def is_narrow(weight: QuantizedWeight, multiples: Tensor) -> bool:
    """Whether no channel's sum can leave 32 bits, whatever the inputs."""
    codes = weight.codes.to(torch.int64).view(*multiples.shape, -1)
    if weight.zero_points is not None:
        codes = codes - weight.zero_points.to(torch.int64).unsqueeze(-1)
    sums = (multiples.abs() * codes.abs().sum(dim=2)).sum(dim=1)  # times codes of inputs
    fix = (multiples * codes.sum(dim=2)).sum(dim=1).abs()  # times their zero point
    return int((sums + fix).max()) * _LARGEST_INPUT < 2**31


def _is_alignable(weight: QuantizedWeight) -> bool:
    is_int4 = weight.codes.dtype == torch.int8 and weight.code_bits <= 4 and _fits(weight.zero_points)
    is_short = weight.num_groups > 1 and weight.group_size <= _LONGEST_GROUP
    is_whole = weight.num_groups * -(-weight.group_size // 16) * 16 % _STEP == 0
    return is_int4 and is_short and is_whole and weight.offsets is None and weight.activation in _DYNAMIC


def _fits(zero_points: Tensor | None) -> bool:
    if zero_points is None:
        return True
    return not zero_points.is_floating_point() and int(zero_points.min()) >= -8 and int(zero_points.max()) <= 7
