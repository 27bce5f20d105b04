"""The integer formula against plain loops."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from qserve.kernels.aligned_scales import align_scales, whole_weights
from qserve.kernels.reference_activations import ROUND_TRIPS, quantize_int8_asymmetric, quantize_int8_symmetric
from qserve.kernels.reference_integer import exact_linear, integer_linear
from qserve.quant.weight import ActivationQuantization, QuantizedWeight


def _weight(
    activation: ActivationQuantization, *, has_zero_points: bool, group_size: int = 16, bits: int = 4
) -> QuantizedWeight:
    torch.manual_seed(1)
    groups = (24, 128 // group_size)
    return QuantizedWeight(
        codes=torch.randint(-8, 8, (24, 128), dtype=torch.int8),
        scales=(torch.rand(groups) * 0.1).to(torch.bfloat16),
        zero_points=torch.randint(-3, 4, groups, dtype=torch.int8) if has_zero_points else None,
        group_size=group_size,
        bits=bits,
        dtype=torch.float32,
        activation=activation,
    )


def _plain(x: Tensor, weight: QuantizedWeight) -> Tensor:
    """The formula in loops over tokens and groups, integers as integers."""
    is_symmetric = weight.activation is ActivationQuantization.INT8_SYMMETRIC
    quantized = (*quantize_int8_symmetric(x), torch.zeros(len(x), 1)) if is_symmetric else quantize_int8_asymmetric(x)
    codes, scales, zeros = quantized
    shifted = weight.codes.to(torch.int64).view(24, -1, weight.group_size)
    if weight.zero_points is not None:
        shifted = shifted - weight.zero_points.to(torch.int64).unsqueeze(-1)
    aligned = align_scales(weight)
    y = torch.empty(len(x), 24)
    if aligned is not None:
        shifted = shifted * aligned.multiples.to(torch.int64).unsqueeze(-1)
        for token in range(len(x)):
            grouped = codes[token].to(torch.int64).view(-1, weight.group_size)
            total = (shifted * (grouped - int(zeros[token]))).sum((1, 2))
            y[token] = scales[token] * (aligned.units * total.to(torch.float32))
        return y
    for token in range(len(x)):
        grouped = codes[token].to(torch.int64).view(-1, weight.group_size)
        total, fix = torch.zeros(24), torch.zeros(24)
        for group in range(weight.num_groups):
            scale = weight.scales[:, group].to(torch.float32)
            total = total + scale * (shifted[:, group] * grouped[group]).sum(-1).to(torch.float32)
            fix = fix + scale * shifted[:, group].sum(-1).to(torch.float32)
        y[token] = scales[token] * (total - zeros[token] * fix)
    return y


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("has_zero_points", [False, True])
@pytest.mark.parametrize("activation", [ActivationQuantization.INT8_ASYMMETRIC, ActivationQuantization.INT8_SYMMETRIC])
def test_the_integer_formula(activation: ActivationQuantization, has_zero_points: bool, bits: int) -> None:
    weight = _weight(activation, has_zero_points=has_zero_points, bits=bits)
    assert (align_scales(weight) is None) == (bits == 8)
    x = torch.randn(5, 128)
    y = integer_linear(x, weight)
    assert torch.equal(y, _plain(x, weight))
    assert torch.equal(y[2:3], integer_linear(x[2:3], weight))
    aligned = align_scales(weight)
    if aligned is not None:
        weight = replace(weight, scales=aligned.values)
    torch.testing.assert_close(y, ROUND_TRIPS[activation](x) @ weight.dequantize().T, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("has_offsets", [False, True])
@pytest.mark.parametrize("has_zero_points", [False, True])
def test_exact_inputs(has_zero_points: bool, has_offsets: bool) -> None:
    weight = _weight(ActivationQuantization.NONE, has_zero_points=has_zero_points)
    if has_offsets:
        weight = replace(weight, offsets=(torch.randn(weight.scales.shape) * 0.1).to(torch.bfloat16))
    aligned = align_scales(weight)
    assert aligned is not None
    x = torch.randn(5, 128) * torch.tensor([[1.0], [1e-30], [0.0], [1e20], [3.0]])
    y = exact_linear(x, weight)
    numbers = whole_weights(weight, aligned).flatten(1)
    for token in (0, 3, 4):
        largest = x[token].abs().max()
        inputs = torch.round(x[token] * (torch.tensor(127.0 * 256) / largest)).to(torch.int64)
        total = (inputs * numbers).sum(1).to(torch.float32)
        assert torch.equal(y[token], largest / (127.0 * 256) * (aligned.units * total))
    assert not y[1:3].any()
    torch.testing.assert_close(y[4], weight.dequantize() @ x[4], atol=1e-3, rtol=1e-3)
