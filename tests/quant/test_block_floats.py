"""Activations in blocks come back as torchao's own tensors give them back, to the bit."""

import pytest
import torch
from torch import Tensor
from torchao.prototype.mx_formats.config import ScaleCalculationMode
from torchao.prototype.mx_formats.mx_tensor import MXTensor
from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale
from torchao.quantization import Float8Tensor
from torchao.quantization.granularity import PerBlock

from qserve.quant import block_floats


@pytest.fixture
def x() -> Tensor:
    values = torch.randn(5, 256, generator=torch.Generator().manual_seed(0))
    values[1] *= 1e-3
    values[2] *= torch.logspace(-6, 6, 256)
    values[3, 64:192] = 0.0
    return values


def test_float8_groups(x: Tensor) -> None:
    x[3, 64:192] = 1e-20  # torchao divides zero by zero here
    expected = Float8Tensor.from_hp(x, granularity=PerBlock((1, 128))).dequantize()
    assert torch.equal(block_floats.round_trip_float8_groups(x), expected)


@pytest.mark.parametrize(
    ("element", "round_trip"),
    [
        (torch.float8_e4m3fn, block_floats.round_trip_mxfp8),
        (torch.float4_e2m1fn_x2, block_floats.round_trip_mxfp4),
    ],
)
def test_mx(x: Tensor, element: torch.dtype, round_trip: object) -> None:
    assert callable(round_trip)
    expected = MXTensor.to_mx(x, element, 32, ScaleCalculationMode.RCEIL).dequantize()
    assert torch.equal(round_trip(x), expected)


def test_nvfp4_scales_each_token_by_itself(x: Tensor) -> None:
    rows = [
        NVFP4Tensor.to_nvfp4(row, per_tensor_scale=per_tensor_amax_to_scale(row.abs().max())).dequantize()
        for row in x.split(1)
    ]
    assert torch.equal(block_floats.round_trip_nvfp4(x), torch.cat(rows))


def test_float4_ties_go_to_the_even_code() -> None:
    found = block_floats.round_float4(torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 9.0, -0.75, -2.5]))
    assert found.tolist() == [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0, -1.0, -2.0]


@pytest.mark.parametrize(
    "round_trip", [block_floats.round_trip_float8_groups, block_floats.round_trip_mxfp8, block_floats.round_trip_nvfp4]
)
def test_zeros_stay_zeros(round_trip: object) -> None:
    assert callable(round_trip)
    assert not round_trip(torch.zeros(2, 128)).any()
