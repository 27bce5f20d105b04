"""The activation quantizers against torchao's own, and the integer formula against plain loops."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torchao.quantization.quant_primitives import (
    MappingType,
    _choose_scale_float8,
    _quantize_affine_float8,
    choose_qparams_affine,
    quantize_affine,
)

from qserve.kernels.reference_integer import (
    ROUND_TRIPS,
    integer_linear,
    quantize_float8,
    quantize_int8_asymmetric,
    quantize_int8_symmetric,
)
from qserve.quant.weight import ActivationQuantization, QuantizedWeight


def _rows() -> Tensor:
    torch.manual_seed(0)
    rows = torch.randn(200, 96) * torch.logspace(-6, 4, 200).unsqueeze(1)
    rows[0] = 0.0
    rows[1] = rows[1].abs()
    rows[2] = -rows[2].abs()
    rows[3, :] = 3.0
    return rows


def _torchao(rows: Tensor, mapping: MappingType, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    block_size = (1, rows.shape[1])
    bounds = {"quant_min": -128, "quant_max": 127}
    scales, zero_points = choose_qparams_affine(
        rows, mapping, block_size, torch.int8, zero_point_dtype=torch.int8, keepdim=True, **bounds, **options
    )
    return quantize_affine(rows, block_size, scales, zero_points, torch.int8, **bounds), scales, zero_points


def test_asymmetric_int8_is_torchaos() -> None:
    codes, scales, zero_points = quantize_int8_asymmetric(_rows())
    expected = _torchao(_rows(), MappingType.ASYMMETRIC)
    assert torch.equal(codes.to(torch.int8), expected[0])
    assert torch.equal(scales, expected[1])
    assert torch.equal(zero_points.to(torch.int8), expected[2])


def test_symmetric_int8_is_torchaos() -> None:
    codes, scales = quantize_int8_symmetric(_rows())
    expected = _torchao(_rows(), MappingType.SYMMETRIC, eps=torch.finfo(torch.float32).eps)
    assert torch.equal(codes.to(torch.int8), expected[0])
    assert torch.equal(scales, expected[1])


def test_float8_is_torchaos() -> None:
    rows = _rows()[1:]  # torchao divides a row of zeros by zero
    codes, scales = quantize_float8(rows)
    expected = _choose_scale_float8(rows, [1, rows.shape[1]])
    assert torch.equal(scales, expected)
    assert torch.equal(codes, _quantize_affine_float8(rows, expected).to(torch.float32))


@pytest.mark.parametrize("activation", list(ActivationQuantization))
def test_a_row_of_zeros_stays_zero(activation: ActivationQuantization) -> None:
    assert torch.equal(ROUND_TRIPS[activation](torch.zeros(1, 8)), torch.zeros(1, 8))


def _weight(activation: ActivationQuantization, *, has_zero_points: bool, group_size: int = 16) -> QuantizedWeight:
    torch.manual_seed(1)
    groups = (24, 96 // group_size)
    return QuantizedWeight(
        codes=torch.randint(-8, 8, (24, 96), dtype=torch.int8),
        scales=(torch.rand(groups) * 0.1).to(torch.bfloat16),
        zero_points=torch.randint(-3, 4, groups, dtype=torch.int8) if has_zero_points else None,
        group_size=group_size,
        bits=4,
        dtype=torch.float32,
        activation=activation,
    )


def _plain(x: Tensor, weight: QuantizedWeight) -> Tensor:
    """The formula in loops over tokens and groups, integers in Python's own."""
    is_symmetric = weight.activation is ActivationQuantization.INT8_SYMMETRIC
    quantized = (*quantize_int8_symmetric(x), torch.zeros(len(x), 1)) if is_symmetric else quantize_int8_asymmetric(x)
    codes, scales, zeros = quantized
    shifted = weight.codes.to(torch.int64).view(24, -1, weight.group_size)
    if weight.zero_points is not None:
        shifted = shifted - weight.zero_points.to(torch.int64).unsqueeze(-1)
    y = torch.empty(len(x), 24)
    for token in range(len(x)):
        grouped = codes[token].to(torch.int64).view(-1, weight.group_size)
        total, fix = torch.zeros(24), torch.zeros(24)
        for group in range(weight.num_groups):
            scale = weight.scales[:, group].to(torch.float32)
            total = total + scale * (shifted[:, group] * grouped[group]).sum(-1).to(torch.float32)
            fix = fix + scale * shifted[:, group].sum(-1).to(torch.float32)
        y[token] = scales[token] * (total - zeros[token] * fix)
    return y


@pytest.mark.parametrize("has_zero_points", [False, True])
@pytest.mark.parametrize("activation", [ActivationQuantization.INT8_ASYMMETRIC, ActivationQuantization.INT8_SYMMETRIC])
def test_the_integer_formula(activation: ActivationQuantization, has_zero_points: bool) -> None:
    weight = _weight(activation, has_zero_points=has_zero_points)
    x = torch.randn(5, 96)
    y = integer_linear(x, weight)
    assert torch.equal(y, _plain(x, weight))
    assert torch.equal(y[2:3], integer_linear(x[2:3], weight))
    torch.testing.assert_close(y, ROUND_TRIPS[activation](x) @ weight.dequantize().T, atol=1e-4, rtol=1e-4)
