"""The one canonical form of a quantized weight, which every torchao tensor is read into.

Knows no files and no kernels: `checkpoint` finds the parts of a weight, `read.py` turns them into this form, `kernels`
lays the result out for a machine.
"""

from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from qserve.errors import BrokenCheckpoint

CODE_DTYPES = (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)
FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class ActivationQuantization(StrEnum):
    """How a linear quantizes its input before it multiplies: every set of scales is made from one token alone.

    Where torchao takes one scale over all tokens of a call, a token's result would depend on its neighbours; here
    such a weight gets the per-token kind, which is the same for a call of one token.
    """

    NONE = "none"
    INT8_ASYMMETRIC = "int8-asymmetric"
    INT8_SYMMETRIC = "int8-symmetric"
    FLOAT8 = "float8"  # e4m3, one scale per token
    FLOAT8_GROUPS = "float8-groups"  # e4m3, one float scale per 128 features
    MXFP8 = "mxfp8"  # e4m3, one power of two per 32 features, rounded up
    MXFP4 = "mxfp4"  # e2m1, one power of two per 32 features, rounded up
    NVFP4 = "nvfp4"  # e2m1, one e4m3 scale per 16 features and one float32 scale per token


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedWeight:
    """A weight of shape (out_features, in_features) as codes and the numbers that turn codes into values.

    Along in_features the weight is cut into groups of `group_size`; a whole row is one group of in_features.

        value[n, k] = (codes[n, k] - zero_points[n, g]) * scales[n, g] + offsets[n, g]      with g = k // group_size

    evaluated in float32 and rounded once to `dtype`. Only learned zero points are floats: then the difference is
    rounded to `dtype` before it is multiplied, as torchao does.
    """

    codes: Tensor  # (out_features, in_features), int8, float8_e4m3fn or float8_e5m2
    scales: Tensor  # (out_features, groups), bfloat16, float16 or float32
    zero_points: Tensor | None = (
        None  # (out_features, groups), int8, or floats where they were learned; None means zero
    )
    offsets: Tensor | None = None  # (out_features, groups), a float dtype; None means zero
    pre_scale: Tensor | None = None  # (in_features,), multiplies the input first; None means one
    group_size: int
    bits: int  # of a code as its format stores it: 1 to 8
    is_float4: bool = False  # codes are twice the value of an e2m1 number: -12 to 12, which four bits cannot hold
    dtype: torch.dtype  # of the values
    activation: ActivationQuantization = ActivationQuantization.NONE

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    @property
    def num_groups(self) -> int:
        return self.scales.shape[1]

    @property
    def code_bits(self) -> int:
        """Bits of a two's complement integer that holds every code; 8 for float codes."""
        return 5 if self.is_float4 else 8 if self.codes.is_floating_point() else self.bits

    @property
    def num_bytes(self) -> int:
        """What the tensors of this form take in memory."""
        return sum(part.nbytes for part in (self.codes, *self._parameters))

    @property
    def bits_per_weight(self) -> float:
        """What the format stores for one weight, scales and zero points included."""
        return self.bits + 8 * sum(part.nbytes for part in self._parameters) / self.codes.numel()

    @property
    def _parameters(self) -> tuple[Tensor, ...]:
        parts = (self.scales, self.zero_points, self.offsets, self.pre_scale)
        return tuple(part for part in parts if part is not None)

    def dequantize(self) -> Tensor:
        """The weight's values, (out_features, in_features), of `dtype`."""
        out_features, in_features = self.codes.shape
        values = self.codes.to(torch.float32).view(out_features, self.num_groups, self.group_size)
        if self.zero_points is not None:
            values = values - self.zero_points.to(self.dtype).to(torch.float32).unsqueeze(-1)
            if self.zero_points.is_floating_point():
                values = values.to(self.dtype).to(torch.float32)
        values = values * self.scales.to(torch.float32).unsqueeze(-1)
        if self.offsets is not None:
            values = values + self.offsets.to(torch.float32).unsqueeze(-1)
        return values.view(out_features, in_features).to(self.dtype)

    def check(self) -> None:
        """Raises BrokenCheckpoint where the parts do not fit each other."""
        if self.codes.ndim != 2 or self.codes.dtype not in CODE_DTYPES:
            raise BrokenCheckpoint(
                f"found codes of {self.codes.dtype} and shape {list(self.codes.shape)}; "
                "expected two dimensions of int8 or float8"
            )
        out_features, in_features = self.codes.shape
        if self.group_size < 1 or in_features % self.group_size:
            raise BrokenCheckpoint(f"in_features {in_features} is not a multiple of the group size {self.group_size}")
        groups = (out_features, in_features // self.group_size)
        _check_part("scales", self.scales, shape=groups, dtypes=FLOAT_DTYPES)
        _check_part("zero points", self.zero_points, shape=groups, dtypes=(torch.int8, *FLOAT_DTYPES))
        _check_part("offsets", self.offsets, shape=groups, dtypes=FLOAT_DTYPES)
        _check_part("activation pre-scale", self.pre_scale, shape=(in_features,), dtypes=FLOAT_DTYPES)
        if self.dtype not in FLOAT_DTYPES:
            raise BrokenCheckpoint(f"found values of {self.dtype}; expected one of {_names(FLOAT_DTYPES)}")
        self._check_range()

    def _check_range(self) -> None:
        if self.codes.is_floating_point() or self.code_bits == 8 or not self.codes.numel():
            return
        low, high = (int(bound) for bound in torch.aminmax(self.codes))
        limit = 2 ** (self.code_bits - 1)
        if low < -limit or high >= limit:
            raise BrokenCheckpoint(f"found codes from {low} to {high}; {self.bits} bits hold {-limit} to {limit - 1}")


def _check_part(what: str, part: Tensor | None, *, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> None:
    if part is None:
        return
    if tuple(part.shape) != shape:
        raise BrokenCheckpoint(f"found {what} of shape {list(part.shape)}; expected {list(shape)}")
    if part.dtype not in dtypes:
        raise BrokenCheckpoint(f"found {what} of {part.dtype}; expected one of {_names(dtypes)}")


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


Weight = Tensor | QuantizedWeight
