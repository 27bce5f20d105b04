"""The one canonical form of a quantized weight, which every torchao tensor is read into.

Knows no files and no kernels: `checkpoint` finds the parts of a weight, `kernels` lays the result out for a machine.
"""

from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor


class ActivationQuantization(StrEnum):
    """How a linear quantizes its input before it multiplies, one set of scales per token."""

    NONE = "none"
    INT8_ASYMMETRIC = "int8-asymmetric"
    INT8_SYMMETRIC = "int8-symmetric"
    FLOAT8 = "float8"


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedWeight:
    """A weight of shape (out_features, in_features) as codes and the numbers that turn codes into values.

    Along in_features the weight is cut into groups of `group_size`; a whole row is one group of in_features.

        value[n, k] = (codes[n, k] - zero_points[n, g]) * scales[n, g] + offsets[n, g]      with g = k // group_size

    evaluated in float32 and rounded once to `dtype`.
    """

    codes: Tensor  # (out_features, in_features), int8, float8_e4m3fn or float8_e5m2
    scales: Tensor  # (out_features, groups), bfloat16, float16 or float32
    zero_points: Tensor | None = None  # (out_features, groups), int8; None means zero
    offsets: Tensor | None = None  # (out_features, groups), a float dtype; None means zero
    pre_scale: Tensor | None = None  # (in_features,), multiplies the input first; None means one
    group_size: int
    bits: int  # of a code as its format defines it: 1 to 8
    dtype: torch.dtype  # of the values
    activation: ActivationQuantization = ActivationQuantization.NONE

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    @property
    def num_groups(self) -> int:
        return self.scales.shape[1]

    def dequantize(self) -> Tensor:
        """The weight's values, (out_features, in_features), of `dtype`."""
        out_features, in_features = self.codes.shape
        values = self.codes.to(torch.float32).view(out_features, self.num_groups, self.group_size)
        if self.zero_points is not None:
            values = values - self.zero_points.to(torch.float32).unsqueeze(-1)
        values = values * self.scales.to(torch.float32).unsqueeze(-1)
        if self.offsets is not None:
            values = values + self.offsets.to(torch.float32).unsqueeze(-1)
        return values.view(out_features, in_features).to(self.dtype)


Weight = Tensor | QuantizedWeight
