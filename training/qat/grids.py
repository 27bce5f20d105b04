"""Rounding a weight to the values that its quantized tensor will hold, in few passes over memory.

A grid says, for one torchao config, which values a weight may take. Its rounding repeats the arithmetic of the tensor
that `qserve.quant.tensors.make_tensor` builds, operation by operation, in the dtype of the artifact: codes and scales
are equal to the last bit, which `require_exact` in `fake.py` proves before a run begins. Knows no modules and no
gradients.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from qserve.quant import configs
from qserve.quant.configs import Json
from qserve.quant.tensors import smallest_magnitude

# Rows are rounded in blocks of about this many weights, which stay in a core's cache between the passes.
_BLOCK = 2**18
# Of the usual range: a little wider, where its largest value is not clipped, down to half of it.
_SHARES = tuple(step / 20 for step in range(22, 9, -1))


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounded:
    """Values on the grid, and where the weight lay within its range (for learned ranges)."""

    values: Tensor  # (out_features, in_features)
    inside: Tensor | None = None  # the same shape, bool


@dataclass(frozen=True, slots=True, kw_only=True)
class SymmetricGrid:
    """Integer codes times a scale for each group: IntxUnpackedToInt8Tensor and Int8Tensor."""

    bits: int
    group_size: int | None  # None: a whole row
    keeps_float32_scales: bool = False  # Int8Tensor's are float32 and never smaller than float32's epsilon

    can_learn = True
    has_offsets = False

    @property
    def bounds(self) -> tuple[int, int]:
        return -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1

    def choose(self, groups: Tensor) -> tuple[Tensor, Tensor | None]:
        """(rows, groups, group_size) -> scales (rows, groups) from the largest magnitude, and no offsets."""
        smallest = torch.finfo(torch.float32).eps if self.keeps_float32_scales else torch.finfo(groups.dtype).tiny
        scales = groups.abs().amax(-1).div_((2**self.bits - 1) / 2).clamp_(min=smallest)
        return self.cast(scales, groups.dtype), None

    def cast(self, scales: Tensor, dtype: torch.dtype) -> Tensor:
        return scales.float() if self.keeps_float32_scales else scales.to(dtype)

    def round(
        self, groups: Tensor, scales: Tensor, _: Tensor | None, *, wants_inside: bool, dtype: torch.dtype
    ) -> Rounded:
        codes = groups.mul(scales.reciprocal().unsqueeze(-1)).round_()
        inside = _between(codes, *self.bounds) if wants_inside else None
        codes = codes.clamp_(*self.bounds).to(torch.promote_types(codes.dtype, dtype))
        return Rounded(values=codes.mul_(scales.unsqueeze(-1)), inside=inside)


@dataclass(frozen=True, slots=True, kw_only=True)
class MinimumGrid:
    """Sixteen levels from each group's minimum to its maximum: Int4Tensor."""

    group_size: int

    can_learn = True
    has_offsets = True

    def choose(self, groups: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scales, and offsets: the value of code 0, which lies eight steps above the minimum."""
        low, high = groups.amin(-1).float(), groups.amax(-1).float()
        scales = ((high - low).clamp_(min=1e-6) / 15).to(groups.dtype)
        return scales, (low + 8 * scales.float()).to(groups.dtype)

    def cast(self, scales: Tensor, dtype: torch.dtype) -> Tensor:
        return scales.to(dtype)

    def round(
        self, groups: Tensor, scales: Tensor, offsets: Tensor | None, *, wants_inside: bool, dtype: torch.dtype
    ) -> Rounded:
        assert offsets is not None
        step, center = scales.float().unsqueeze(-1), offsets.float().unsqueeze(-1)
        floor = center - 8 * step
        if groups.dtype == torch.float32 and not wants_inside:
            floor = groups.amin(-1, keepdim=True)  # exact, where the offset keeps it only rounded
        codes = groups.float().sub(floor).div_(step).round_()
        inside = _between(codes, 0, 15) if wants_inside else None
        return Rounded(values=codes.clamp_(0, 15).sub_(8).mul_(step).add_(center), inside=inside)


@dataclass(frozen=True, slots=True, kw_only=True)
class Float8Grid:
    """e4m3 numbers times a scale for each row: Float8Tensor."""

    group_size: None = None

    can_learn = False
    has_offsets = False

    def choose(self, groups: Tensor) -> tuple[Tensor, Tensor | None]:
        largest = groups.abs().amax(-1).clamp_(min=smallest_magnitude(groups.dtype))
        return self.cast(largest / torch.finfo(torch.float8_e4m3fn).max, groups.dtype), None

    def cast(self, scales: Tensor, _: torch.dtype) -> Tensor:
        return scales.float()

    def round(
        self, groups: Tensor, scales: Tensor, _: Tensor | None, *, wants_inside: bool, dtype: torch.dtype
    ) -> Rounded:
        limit = torch.finfo(torch.float8_e4m3fn).max
        codes = groups.float().div(scales.unsqueeze(-1)).clamp_(-limit, limit).to(torch.float8_e4m3fn)
        return Rounded(values=codes.float().mul_(scales.unsqueeze(-1)))


Grid = SymmetricGrid | MinimumGrid | Float8Grid


def grid_of(config: Json) -> Grid | None:
    """The grid of a torchao config; None where training knows none."""
    make = _GRIDS.get(config["_type"])
    return make(config) if make else None


def round_weight(
    weight: Tensor,
    grid: Grid,
    *,
    scales: Tensor | None = None,
    offsets: Tensor | None = None,
    wants_inside: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Rounded:
    """The weight (out_features, in_features) on its grid; scales and offsets (out_features, groups) where given.

    The values are of `dtype`: float32 holds code times scale as it is, a narrower one what is multiplied in it.
    """
    rows, columns = weight.shape
    values = torch.empty_like(weight, dtype=dtype)
    inside = torch.empty_like(weight, dtype=torch.bool) if wants_inside else None
    step = max(1, _BLOCK // columns)
    for begin in range(0, rows, step):
        block = slice(begin, begin + step)
        groups = weight[block].reshape(-1, columns // (grid.group_size or columns), grid.group_size or columns)
        chosen = grid.choose(groups) if scales is None else (scales[block], None if offsets is None else offsets[block])
        rounded = grid.round(groups, *chosen, wants_inside=wants_inside, dtype=dtype)
        values[block] = rounded.values.view(-1, columns)
        if inside is not None and rounded.inside is not None:
            inside[block] = rounded.inside.view(-1, columns)
    return Rounded(values=values, inside=inside)


def choose_ranges(weight: Tensor, grid: Grid) -> tuple[Tensor, Tensor | None]:
    """Where learned ranges begin: of several shrunk ranges, for each group the one with the least squared error.

    Half of the range is the most that is cut: what lies outside is clipped.
    """
    groups = weight.reshape(weight.shape[0], -1, grid.group_size or weight.shape[1])
    widest, offsets = grid.choose(groups)
    best, least = widest.clone(), torch.full_like(widest, torch.inf, dtype=torch.float32)
    for share in torch.arange(1.0, 0.49, -0.05).tolist():
        scales = grid.cast(widest * share, weight.dtype)
        found = grid.round(groups, scales, offsets, wants_inside=True, dtype=torch.float32).values
        error = (found - groups.float()).square().sum(-1)
        is_better = error < least
        best, least = torch.where(is_better, scales, best), torch.where(is_better, error, least)
    return best, offsets


def _between(codes: Tensor, low: int, high: int) -> Tensor:
    return (codes >= low).logical_and_(codes <= high)


def _intx(config: Json) -> Grid:
    bits = configs.bits_of(config)
    assert bits is not None
    return SymmetricGrid(bits=bits, group_size=configs.group_size_of(config))


def _int8(_: Json) -> Grid:
    return SymmetricGrid(bits=8, group_size=None, keeps_float32_scales=True)


def _int4(config: Json) -> Grid:
    group_size = configs.group_size_of(config)
    assert group_size is not None
    return MinimumGrid(group_size=group_size)


def _float8(_: Json) -> Grid:
    return Float8Grid()


_GRIDS: dict[str, Callable[[Json], Grid]] = {
    "Int8DynamicActivationIntxWeightConfig": _intx,
    "IntxWeightOnlyConfig": _intx,
    "Int4WeightOnlyConfig": _int4,
    "Int8WeightOnlyConfig": _int8,
    "Int8DynamicActivationInt8WeightConfig": _int8,
    "Float8DynamicActivationFloat8WeightConfig": _float8,
}
