"""Scales of a channel as whole multiples of one unit: then its sum over all groups is an integer, in any order.

A float sum over groups depends on the order, and costs several operations for each group. Scales of bfloat16 have 8
bits and differ by a few powers of two inside a channel, so nearly all of them are multiples, of up to 12 bits, of one
power of two exactly. Others are rounded to such a multiple: that moves a scale by at most 2^-11 of the largest of its
channel, and bfloat16 rounds any scale by as much as 2^-9 of itself.

Where inputs are floats, an offset or a zero point adds a whole number too to every weight of its group, a constant
beside the multiple. A weight is then, in units, a whole number of 16 bits:

    weight = multiple * (code + bias) + constant        with the bias that makes packed codes unsigned
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from qserve.quant.weight import ActivationQuantization, QuantizedWeight

_MOST = 4079  # times a code of -8 it fits in 16 bits, two digits of 8
_MOST_SHIFTED = 2039  # the same for a code less its zero point: up to 15 either way
_MOST_WEIGHT = 8 * _MOST  # of one with an offset
_LEAST_MULTIPLE = 128  # of the largest scale of a channel beside its offsets: smaller ones would lose too much
_LONGEST_GROUP = 512  # inputs whose products with codes and one multiple stay below 2^31
_LONGEST_MOVED_GROUP = 256  # with constants: kernels hold the sum of as many int8 numbers in 16 bits
_MOST_INPUTS = 2**15  # whose products of digits of 8 bits stay below 2^31
_DYNAMIC = (ActivationQuantization.INT8_ASYMMETRIC, ActivationQuantization.INT8_SYMMETRIC)
_STEP = 64  # inputs: what the kernel for many rows multiplies at once
_TINY = torch.finfo(torch.float32).tiny / _MOST  # the least unit
_PIECE = 2**20  # numbers
_TILE = 16  # rows
_LARGEST_INPUT = 128  # of an int8 code, and of a zero point


@dataclass(frozen=True, slots=True, kw_only=True)
class AlignedScales:
    multiples: Tensor  # (out_features, groups) int16
    units: Tensor  # (out_features,) float32, powers of two where scales are exact multiples of one
    offsets: Tensor | None = None  # (out_features, groups) int16: in units too, those of the weight

    @property
    def values(self) -> Tensor:
        """The scales that kernels multiply with: (out_features, groups) float32."""
        return self.units.unsqueeze(1) * self.multiples


def align_scales(weight: QuantizedWeight) -> AlignedScales | None:
    """The scales of a 4-bit weight with several groups, whose sum over them is to be exact; None for every other."""
    if not _is_alignable(weight):
        return None
    scales = weight.scales.to(torch.float64)
    largest = scales.abs().amax(dim=1, keepdim=True)
    if weight.activation in _DYNAMIC:
        most = largest / (_MOST if weight.zero_points is None else _MOST_SHIFTED)
        return _round(weight, _powers_of_two(most))
    least = _largest_weights(weight) / (_MOST_WEIGHT - 8)  # 8: what rounding may add
    units = _powers_of_two(least)
    is_exact = (torch.round(scales / units) * units == scales).all(dim=1, keepdim=True)
    units = torch.where(is_exact, units, least.clamp(min=_TINY).to(torch.float32).to(torch.float64))
    is_fine = (largest / units >= _LEAST_MULTIPLE) | (largest == 0)
    return _round(weight, units) if bool(is_fine.all()) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Sums:
    """Of each channel's weights in units: (out_features,) int32, which _MOST_INPUTS numbers of 16 bits cannot leave."""

    sums: Tensor
    magnitudes: Tensor

    @property
    def is_narrow(self) -> bool:
        """Whether no channel's sum of weights times one int8 number an input can leave 32 bits, whatever the inputs."""
        most = self.magnitudes + self.sums.abs()  # times codes of inputs, and times their zero point
        return int(most.max()) * _LARGEST_INPUT < 2**31


def sum_weights(weight: QuantizedWeight, aligned: AlignedScales) -> Sums:
    pieces = [whole_weights(weight, aligned, rows=rows) for rows in pieces_of(weight.codes)]
    return Sums(
        sums=torch.cat([piece.sum(dim=(1, 2), dtype=torch.int32) for piece in pieces]),
        magnitudes=torch.cat([piece.abs_().sum(dim=(1, 2), dtype=torch.int32) for piece in pieces]),
    )


def pieces_of(codes: Tensor) -> list[slice]:
    """Rows that are taken at once, whole tiles of them: what is made of them on the way is to stay in the caches."""
    size = max(1, _PIECE // codes.shape[1] // _TILE) * _TILE
    return [slice(start, start + size) for start in range(0, codes.shape[0], size)]


def whole_weights(weight: QuantizedWeight, aligned: AlignedScales, *, rows: slice = slice(None)) -> Tensor:
    """The weights in units: (out_features, groups, group_size) int16. A number that wraps on the way wraps back."""
    multiples = aligned.multiples[rows]
    numbers = weight.codes[rows].view(*multiples.shape, -1)
    if weight.zero_points is not None:
        numbers = numbers - weight.zero_points[rows].unsqueeze(-1)  # of 4 bits both
    numbers = numbers * multiples.unsqueeze(-1)
    return numbers if aligned.offsets is None else numbers.add_(aligned.offsets[rows].unsqueeze(-1))


def _powers_of_two(numbers: Tensor) -> Tensor:
    return torch.exp2(torch.ceil(torch.log2(numbers.clamp(min=_TINY))))


def _round(weight: QuantizedWeight, units: Tensor) -> AlignedScales:
    return AlignedScales(
        multiples=_to_int16(weight.scales, units),
        units=units.flatten().to(torch.float32),
        offsets=None if weight.offsets is None else _to_int16(weight.offsets, units),
    )


def _to_int16(numbers: Tensor, units: Tensor) -> Tensor:
    return torch.round(numbers.to(torch.float64) / units).to(torch.int16)


def _largest_weights(weight: QuantizedWeight) -> Tensor:
    """Of each channel, with any code: (out_features, 1) float64."""
    zeros, offsets = (0 if part is None else part.to(torch.float64) for part in (weight.zero_points, weight.offsets))
    ends = [((code - zeros) * weight.scales.to(torch.float64) + offsets).abs() for code in (-8, 7)]
    return torch.maximum(*ends).amax(dim=1, keepdim=True)


def _is_alignable(weight: QuantizedWeight) -> bool:
    is_int4 = weight.codes.dtype == torch.int8 and weight.code_bits <= 4 and _fits(weight.zero_points)
    is_moved = weight.activation not in _DYNAMIC and (weight.offsets is not None or weight.zero_points is not None)
    longest = _LONGEST_MOVED_GROUP if is_moved else _LONGEST_GROUP
    is_short = weight.num_groups > 1 and weight.group_size <= longest
    num_inputs = weight.num_groups * -(-weight.group_size // 16) * 16
    is_whole = num_inputs % _STEP == 0 and num_inputs <= _MOST_INPUTS
    return is_int4 and is_short and is_whole and (weight.offsets is None or is_moved)


def _fits(zero_points: Tensor | None) -> bool:
    if zero_points is None:
        return True
    return not zero_points.is_floating_point() and int(zero_points.min()) >= -8 and int(zero_points.max()) <= 7
