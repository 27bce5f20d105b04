"""Lays weights out for the C++ kernels; what is drawn here is what they read.

Knows no processor: all of them read one layout. Output channels go in tiles of 16, one lane each, and a tile is
one run of memory, group after group. Numbers keep their stored width: nothing is widened.

    integer codes   (tiles, groups, units, 2, 16 channels, 4)     a unit is 8 inputs: the first four, the other four
        8 bits      one byte each, code + 128
        4 bits      one byte for both halves of a unit, the first in the low nibble:

                        byte  | channel 0           | channel 1           | ... channel 15
                        low   | k0   k1   k2   k3   | k0   k1   k2   k3   |
                        high  | k4   k5   k6   k7   | k4   k5   k6   k7   |

    float values    (tiles, groups, pairs, 16 channels, 2)        float32: (tiles, groups, pairs, 2, 16 channels)
    scales, zeros, offsets                                        (tiles, groups, 16 channels)
    aligned scales  int16 multiples like scales, and              (tiles, 16 channels) units
                    with exact inputs int16 constants as offsets, and no zeros

A group is padded at its end with codes that mean zero, a last tile with channels of them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from qserve.kernels.aligned_scales import AlignedScales, Sums, align_scales, pieces_of, sum_weights
from qserve.kernels.stages import FLOAT_TYPES, Form, WeightStruct, address
from qserve.quant.weight import ActivationQuantization, QuantizedWeight, Weight

LANES = 16
_DYNAMIC = (ActivationQuantization.INT8_ASYMMETRIC, ActivationQuantization.INT8_SYMMETRIC)
_MIDDLE_CODE = 7  # of unsigned ones: kernels count from it, see aligned.h
# What the kernels quantize themselves; any other kind is a float input to them, rounded before it comes.
KERNEL_ACTIVATIONS = {
    ActivationQuantization.NONE: 0,
    ActivationQuantization.INT8_ASYMMETRIC: 1,
    ActivationQuantization.INT8_SYMMETRIC: 2,
    ActivationQuantization.FLOAT8: 3,
}


_PARTS = ("codes", "scales", "units", "zeros", "offsets", "fix", "pre_scale")  # a packed weight's tensors


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedWeight:
    """The tensors of one packed weight, and the numbers that describe them."""

    codes: Tensor
    scales: Tensor | None = None
    units: Tensor | None = None  # where scales are whole multiples of them
    zeros: Tensor | None = None
    offsets: Tensor | None = None
    fix: Tensor | None = None
    pre_scale: Tensor | None = None
    form: Form
    value_type: int = 0
    activation: ActivationQuantization
    planes: int
    out_features: int
    in_features: int
    group_size: int
    padded_group: int
    code_bias: int = 0
    is_narrow: bool = False  # with units: sums fit in 32 bits

    @property
    def num_groups(self) -> int:
        return self.in_features // self.group_size

    @property
    def name(self) -> str:
        """What the kernel multiplies, for people: int4 codes with 8- or 16-bit inputs, or floats."""
        if self.form is Form.FLOAT:
            return next(
                str(dtype).removeprefix("torch.") for dtype, number in FLOAT_TYPES.items() if number == self.value_type
            )
        return f"{self.form.name.lower()}-x{8 * self.planes}"

    @property
    def num_bytes(self) -> int:
        parts = (getattr(self, name) for name in _PARTS)
        return sum(part.nbytes for part in parts if part is not None)

    def placed(self, place: Callable[[Tensor], Tensor]) -> "PackedWeight":
        """With every tensor where `place` puts it, but the codes, for which there was room from the beginning."""
        parts = {name: getattr(self, name) for name in _PARTS if name != "codes"}
        placed: dict[str, Any] = {name: place(part) for name, part in parts.items() if part is not None}
        return replace(self, **placed)

    def to_struct(self, *, column: int) -> WeightStruct:
        return WeightStruct(
            codes=address(self.codes),
            scales=address(self.scales),
            units=address(self.units),
            zeros=address(self.zeros),
            offsets=address(self.offsets),
            fix=address(self.fix),
            pre_scale=address(self.pre_scale),
            form=self.form,
            value_type=self.value_type,
            scale_type=FLOAT_TYPES[self.scales.dtype] if self.scales is not None and self.units is None else 0,
            offset_type=0 if self.offsets is None or self.units is not None else FLOAT_TYPES[self.offsets.dtype],
            activation=KERNEL_ACTIVATIONS.get(self.activation, 0),
            planes=self.planes,
            out_features=self.out_features,
            in_features=self.in_features,
            group_size=self.group_size,
            padded_group=self.padded_group,
            groups=self.num_groups,
            code_bias=self.code_bias,
            column=column,
            is_narrow=self.is_narrow,
        )


class Empty(Protocol):
    """Where codes find room: memory of so many numbers of a type, whatever is in it."""

    def __call__(self, shape: Sequence[int], *, dtype: torch.dtype) -> Tensor: ...


def _new(shape: Sequence[int], *, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype)


def pack_weight(weight: Weight, *, is_rounded: bool = False, empty: Empty = _new) -> PackedWeight:
    """Lay out one weight, quantized or not. An input that `is_rounded` comes scaled and quantized already."""
    if is_rounded and isinstance(weight, QuantizedWeight):
        weight = replace(weight, activation=ActivationQuantization.NONE, pre_scale=None)
    if isinstance(weight, Tensor):
        return _pack_plain(weight, empty)
    if weight.codes.dtype == torch.int8:
        return _pack_integer(weight, empty)
    return _pack_float(weight, empty)


def _pack_plain(weight: Tensor, empty: Empty) -> PackedWeight:
    values = weight if weight.dtype in FLOAT_TYPES else weight.to(torch.float32)
    return _pack_values(values, empty, group_size=values.shape[1], activation=ActivationQuantization.NONE)


def _pack_float(weight: QuantizedWeight, empty: Empty) -> PackedWeight:
    if weight.zero_points is not None or weight.offsets is not None:  # no format of today has either
        return _pack_plain(weight.dequantize(), empty)
    return _pack_values(
        weight.codes,
        empty,
        group_size=weight.group_size,
        activation=weight.activation,
        scales=_tile(weight.scales),
        pre_scale=_widen(weight.pre_scale),
    )


def _pack_values(
    values: Tensor,
    empty: Empty,
    *,
    group_size: int,
    activation: ActivationQuantization,
    scales: Tensor | None = None,
    pre_scale: Tensor | None = None,
) -> PackedWeight:
    out_features, in_features = values.shape
    padded_group = _round_up(group_size, 32 if group_size == in_features else 16)
    bits = _bits(values)

    def arrange(rows: slice) -> Tensor:
        return _pair(_split(bits[rows], group_size, padded_group, 2))

    return PackedWeight(
        codes=_arrange(bits, arrange, empty).view(bits.dtype),
        scales=scales,
        pre_scale=pre_scale,
        form=Form.FLOAT,
        value_type=FLOAT_TYPES[values.dtype],
        activation=activation,
        planes=1 if activation is ActivationQuantization.FLOAT8 else 2,
        out_features=out_features,
        in_features=in_features,
        group_size=group_size,
        padded_group=padded_group,
    )


def _pack_integer(weight: QuantizedWeight, empty: Empty) -> PackedWeight:
    if weight.zero_points is not None and weight.zero_points.is_floating_point():
        weight = _fold_zero_points(weight, weight.zero_points)
    out_features, in_features = weight.shape
    code_bias = _choose_bias(weight)
    is_nibble, is_dynamic = code_bias < 128, weight.activation in _DYNAMIC
    padded_group = _round_up(weight.group_size, 64 if weight.num_groups == 1 else 16)

    def arrange(rows: slice) -> Tensor:
        codes = weight.codes[rows].view(torch.uint8) + code_bias  # wraps to where it would come without wrapping
        return _halve(_split(codes, weight.group_size, padded_group, 8, fill=code_bias), is_nibble=is_nibble)

    is_asymmetric = weight.activation is ActivationQuantization.INT8_ASYMMETRIC
    aligned = align_scales(weight)
    sums = None if aligned is None else sum_weights(weight, aligned)
    if aligned is None or is_dynamic:
        zeros, offsets = _pack_zeros(weight, code_bias), _tile(weight.offsets)
    else:
        zeros, offsets = None, _pack_constants(weight, aligned, code_bias)
    return PackedWeight(
        codes=_arrange(weight.codes, arrange, empty).view(torch.uint8),
        scales=_tile(weight.scales) if aligned is None else _tile_numbers(aligned.multiples, fill=0),
        units=None if aligned is None else F.pad(aligned.units, (0, -out_features % LANES)),
        zeros=zeros,
        offsets=offsets,
        fix=_sum_rows(weight, sums) if is_asymmetric else None,
        pre_scale=_widen(weight.pre_scale),
        form=Form.INT4 if is_nibble else Form.INT8,
        activation=weight.activation,
        planes=1 if is_dynamic else 2,
        out_features=out_features,
        in_features=in_features,
        group_size=weight.group_size,
        padded_group=padded_group,
        code_bias=code_bias,
        is_narrow=sums is not None and sums.is_narrow,
    )


def _fold_zero_points(weight: QuantizedWeight, zero_points: Tensor) -> QuantizedWeight:
    """Learned zero points are floats: -zero * scale is as good an offset."""
    offsets = -zero_points.to(torch.float32) * weight.scales.to(torch.float32)
    if weight.offsets is not None:
        offsets = offsets + weight.offsets.to(torch.float32)
    return replace(weight, zero_points=None, offsets=offsets)


def _choose_bias(weight: QuantizedWeight) -> int:
    """What makes codes and zero points unsigned: 8 or 0 where 4 bits hold both, else 128."""
    numbers = [weight.codes] if weight.zero_points is None else [weight.codes, weight.zero_points]
    low = min(int(each.min()) for each in numbers)
    high = max(int(each.max()) for each in numbers)
    return next((bias for bias in (8, 0) if low + bias >= 0 and high + bias <= 15), 128)


def _pack_constants(weight: QuantizedWeight, aligned: AlignedScales, code_bias: int) -> Tensor | None:
    """What the middle code stands for, where it is not everywhere a whole number of multiples."""
    if aligned.offsets is None and (weight.zero_points is None or not bool(weight.zero_points.any())):
        return None
    zeros = code_bias if weight.zero_points is None else code_bias + weight.zero_points.to(torch.int16)
    constants = (_MIDDLE_CODE - zeros) * aligned.multiples
    return _tile_numbers(constants if aligned.offsets is None else constants + aligned.offsets, fill=0)


def _pack_zeros(weight: QuantizedWeight, code_bias: int) -> Tensor | None:
    if weight.zero_points is None or not bool(weight.zero_points.any()):
        return None
    return _tile_numbers((weight.zero_points.to(torch.int16) + code_bias).to(torch.uint8), fill=code_bias)


def _sum_rows(weight: QuantizedWeight, sums: Sums | None) -> Tensor:
    """What each channel gives for inputs that are all one, as the kernels sum: (tiles * 16,), int32 if aligned."""
    total = _sum_floats(weight) if sums is None else sums.sums
    return F.pad(total, (0, -len(total) % LANES))


def _sum_floats(weight: QuantizedWeight) -> Tensor:
    out_features, num_groups = weight.scales.shape
    codes = weight.codes.view(out_features, num_groups, -1)
    sums = torch.cat([codes[rows].sum(dim=2, dtype=torch.int32) for rows in pieces_of(weight.codes)])
    if weight.zero_points is not None:
        sums = sums - weight.zero_points.to(torch.int32) * weight.group_size
    total = torch.zeros(out_features)
    for group in range(num_groups):
        total = total + weight.scales[:, group].to(torch.float32) * sums[:, group].to(torch.float32)
        if weight.offsets is not None:
            total = total + weight.offsets[:, group].to(torch.float32) * float(weight.group_size)
    return total


def _arrange(codes: Tensor, arrange: Callable[[slice], Tensor], empty: Empty) -> Tensor:
    """What `arrange` makes of the rows of all codes, piece by piece: large tensors on the way would be new memory."""
    pieces = pieces_of(codes)
    first = arrange(pieces[0])
    arranged = empty((-(-len(codes) // LANES), *first.shape[1:]), dtype=first.dtype)
    arranged[: len(first)] = first
    for rows in pieces[1:]:
        tiles = arrange(rows)
        arranged[rows.start // LANES :][: len(tiles)] = tiles
    return arranged


def _split(codes: Tensor, group_size: int, padded_group: int, size: int, *, fill: int = 0) -> Tensor:
    """(out, in) as (tiles, 16, groups, padded_group / size, size), padding filled."""
    out_features = codes.shape[0]
    groups = codes.reshape(out_features, -1, group_size)
    padding = (0, padded_group - group_size, 0, 0, 0, -out_features % LANES)
    padded = F.pad(groups, padding, value=fill) if any(padding) else groups
    return padded.reshape(-1, LANES, groups.shape[1], padded_group // size, size)


def _halve(units: Tensor, *, is_nibble: bool) -> Tensor:
    """(tiles, 16, groups, units, 8) as (tiles, groups, units, 2, 16) of four each; nibbles of both halves in one."""
    fours = units.contiguous().view(torch.int32)  # (tiles, 16, groups, units, 2)
    if is_nibble:  # bits that leave a byte would meet the next one's lowest, but there are none
        return (fours[..., 0] | (fours[..., 1] << 4)).permute(0, 2, 3, 1)
    return fours.permute(0, 2, 3, 4, 1)


def _pair(pairs: Tensor) -> Tensor:
    """(tiles, 16, groups, pairs, 2) as (tiles, groups, pairs, 16), pairs in one; float32: (..., pairs, 2, 16)."""
    if pairs.dtype == torch.float32:
        return pairs.permute(0, 2, 3, 4, 1)
    wide = pairs.contiguous().view({1: torch.int16, 2: torch.int32}[pairs.element_size()]).squeeze(-1)
    return wide.permute(0, 2, 3, 1)


def _tile(numbers: Tensor | None) -> Tensor | None:
    """Scales or offsets, (out, groups), as (tiles, groups, 16)."""
    if numbers is None:
        return None
    # Scales of 8 bits are widened: kernels read them once for each group, and know three types of them.
    wide = numbers.dtype in (torch.bfloat16, torch.float16, torch.float32)
    return _tile_numbers(numbers if wide else numbers.to(torch.float32), fill=0)


def _tile_numbers(numbers: Tensor, *, fill: int) -> Tensor:
    padded = F.pad(numbers, (0, 0, 0, -numbers.shape[0] % LANES), value=fill)
    return padded.view(-1, LANES, numbers.shape[1]).transpose(1, 2).contiguous()


def _bits(values: Tensor) -> Tensor:
    """Float8 as bytes, which torch can pad and permute anywhere."""
    return values.view(torch.uint8) if values.element_size() == 1 else values


def _widen(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.to(torch.float32).contiguous()


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
