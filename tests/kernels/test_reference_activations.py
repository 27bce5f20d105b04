"""The activation quantizers against torchao's own."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torchao.prototype.mx_formats.config import ScaleCalculationMode
from torchao.prototype.mx_formats.mx_tensor import MXTensor
from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale
from torchao.quantization.quant_primitives import (
    MappingType,
    _choose_scale_float8,
    _dequantize_affine_float8,
    _quantize_affine_float8,
    choose_qparams_affine,
    quantize_affine,
)

from qserve.kernels.reference_activations import (
    ROUND_TRIPS,
    quantize_float8,
    quantize_int8_asymmetric,
    quantize_int8_symmetric,
)
from qserve.quant.weight import ActivationQuantization


def _rows() -> Tensor:
    torch.manual_seed(0)
    rows = torch.randn(200, 256) * torch.logspace(-6, 4, 200).unsqueeze(1)
    rows[0] = 0.0
    rows[1] = rows[1].abs()
    rows[2] = -rows[2].abs()
    rows[3, :] = 3.0
    rows[4, 32:64] = 0.0
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


def test_float8_groups_are_torchaos() -> None:
    rows = _rows()[5:]
    scales = _choose_scale_float8(rows, [1, 128])
    expected = _dequantize_affine_float8(_quantize_affine_float8(rows, scales), scales)
    assert torch.equal(ROUND_TRIPS[ActivationQuantization.FLOAT8_GROUPS](rows), expected)


@pytest.mark.parametrize(
    ("activation", "code_dtype"),
    [
        (ActivationQuantization.MXFP8, torch.float8_e4m3fn),
        (ActivationQuantization.MXFP4, torch.float4_e2m1fn_x2),
    ],
)
def test_mx_is_torchaos(activation: ActivationQuantization, code_dtype: torch.dtype) -> None:
    mode = ScaleCalculationMode.RCEIL
    expected = MXTensor.to_mx(_rows(), code_dtype, block_size=32, scaling_mode=mode).dequantize(torch.float32)
    assert torch.equal(ROUND_TRIPS[activation](_rows()), expected)


def test_nvfp4_is_torchaos_for_one_token() -> None:
    for row in _rows()[1:].split(1):
        tensor = NVFP4Tensor.to_nvfp4(row, per_tensor_scale=per_tensor_amax_to_scale(row.abs().max()))
        assert torch.equal(ROUND_TRIPS[ActivationQuantization.NVFP4](row), tensor.dequantize(torch.float32))


@pytest.mark.parametrize("activation", list(ActivationQuantization))
def test_a_row_of_zeros_stays_zero(activation: ActivationQuantization) -> None:
    assert torch.equal(ROUND_TRIPS[activation](torch.zeros(1, 128)), torch.zeros(1, 128))


@pytest.mark.parametrize("activation", list(ActivationQuantization))
def test_a_row_minds_only_itself(activation: ActivationQuantization) -> None:
    rows = _rows()
    assert torch.equal(ROUND_TRIPS[activation](rows)[7:9], ROUND_TRIPS[activation](rows[7:9]))
