"""Aligned scales: exact where they can be, near where they cannot."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from qserve.kernels.aligned_scales import AlignedScales, align_scales, pieces_of, sum_weights, whole_weights
from qserve.quant.weight import ActivationQuantization, QuantizedWeight


def _weight(scales: Tensor, **changes: Any) -> QuantizedWeight:
    fields: dict[str, Any] = {
        "codes": torch.zeros(scales.shape[0], scales.shape[1] * changes.get("group_size", 32), dtype=torch.int8),
        "scales": scales,
        "group_size": 32,
        "bits": 4,
        "dtype": torch.float32,
        "activation": ActivationQuantization.INT8_ASYMMETRIC,
    }
    return QuantizedWeight(**{**fields, **changes})


def test_bfloat16_scales_within_four_powers_of_two_are_exact() -> None:
    torch.manual_seed(0)
    scales = (torch.rand(64, 18) * 7 + 1).mul(1e-3).to(torch.bfloat16)
    aligned = align_scales(_weight(scales))
    assert aligned is not None
    assert torch.equal(aligned.values, scales.to(torch.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_other_scales_move_by_little_of_their_channels_largest(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    scales = torch.exp2(torch.rand(64, 18) * 12 - 14).to(dtype)
    aligned = align_scales(_weight(scales))
    assert aligned is not None
    moved = (aligned.values - scales.to(torch.float32)).abs()
    assert bool((moved <= scales.to(torch.float32).amax(dim=1, keepdim=True) * 2**-11).all())
    assert int(aligned.multiples.max()) <= 4079


def test_channels_of_zeros_and_negative_scales() -> None:
    scales = torch.tensor([[0.0, 0.0], [-1.0, 0.5], [3e38, 1e-38]])
    aligned = align_scales(_weight(scales))
    assert aligned is not None
    assert bool(aligned.units.isfinite().all())
    assert aligned.multiples[0].tolist() == [0, 0]
    assert aligned.multiples[1, 0] == -2 * aligned.multiples[1, 1]


@pytest.mark.parametrize(
    "changes",
    [
        {"bits": 8},
        {"offsets": torch.ones(4, 6)},
        {"offsets": torch.full((4, 6), 300.0), "activation": ActivationQuantization.NONE},
        {"zero_points": torch.full((4, 6), 9, dtype=torch.int8)},
        {"zero_points": torch.ones(4, 6)},
        {"group_size": 1024},
        {"group_size": 512, "activation": ActivationQuantization.NONE, "offsets": torch.zeros(4, 6)},
        {"group_size": 48},
    ],
    ids=["int8", "offsets", "far-offsets", "far-zeros", "float-zeros", "long-groups", "long-moved", "half-steps"],
)
def test_weights_that_keep_their_scales(changes: dict[str, Any]) -> None:
    assert align_scales(_weight(torch.ones(4, 6), **changes)) is None


def test_one_group_keeps_its_scale() -> None:
    assert align_scales(_weight(torch.ones(4, 1))) is None


@pytest.mark.parametrize("sign", [1, -1])
def test_narrow_weights_keep_the_worst_sum_within_32_bits(sign: int) -> None:
    multiples = torch.full((2, 4), sign * 2000, dtype=torch.int16)
    aligned = AlignedScales(multiples=multiples, units=torch.ones(2))
    group_size = 2**31 // (2000 * 8 * 256) // 4  # one more leaves 32 bits
    for count, expected in ((group_size, True), (group_size + 1, False)):
        codes = torch.full((2, 4 * count), -8, dtype=torch.int8)
        assert sum_weights(_weight(torch.ones(2, 4), codes=codes, group_size=count), aligned).is_narrow is expected
        codes[:, ::2] *= -1  # channels whose codes make up for each other have only half as far to go
        assert sum_weights(_weight(torch.ones(2, 4), codes=codes, group_size=count), aligned).is_narrow


def _random_weight(*, has_zeros: bool, has_offsets: bool, dtype: torch.dtype = torch.bfloat16) -> QuantizedWeight:
    torch.manual_seed(0)
    return _weight(
        (torch.rand(64, 6) * 0.02 + 0.001).to(dtype),
        codes=torch.randint(-8, 8, (64, 192), dtype=torch.int8),
        zero_points=torch.randint(-8, 8, (64, 6), dtype=torch.int8) if has_zeros else None,
        offsets=(torch.randn(64, 6) * 0.05).to(dtype) if has_offsets else None,
        dtype=torch.float32,
        activation=ActivationQuantization.NONE,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("has_offsets", [False, True])
@pytest.mark.parametrize("has_zeros", [False, True])
def test_whole_weights_are_the_weights_and_fit_16_bits(has_zeros: bool, has_offsets: bool, dtype: torch.dtype) -> None:
    weight = _random_weight(has_zeros=has_zeros, has_offsets=has_offsets, dtype=dtype)
    aligned = align_scales(weight)
    assert aligned is not None
    numbers = whole_weights(weight, aligned)
    assert int(numbers.abs().max()) <= 8 * 4079  # each code, not only those that are there, has room
    moved = (numbers * aligned.units.view(-1, 1, 1).double()).flatten(1) - weight.dequantize().double()
    assert bool((moved.abs() <= weight.dequantize().abs().amax(dim=1, keepdim=True) * 2**-11).all())


def test_the_furthest_codes_of_a_channel_with_an_offset_fit_16_bits() -> None:
    codes = torch.tensor([-8, 7], dtype=torch.int8).repeat(4, 96)
    for offset in (-4.0, 0.3, 4.0):
        weight = _weight(torch.rand(4, 6) + 0.5, codes=codes, offsets=torch.full((4, 6), offset))
        aligned = align_scales(replace(weight, activation=ActivationQuantization.NONE))
        assert aligned is not None
        assert 8 * 2000 < int(whole_weights(weight, aligned).abs().max()) <= 8 * 4079


def test_a_channel_of_zeros_beside_offsets() -> None:
    weight = _weight(torch.zeros(2, 6), offsets=torch.tensor([[0.0], [0.5]]).expand(2, 6))
    aligned = align_scales(replace(weight, activation=ActivationQuantization.NONE))
    assert aligned is not None
    assert (whole_weights(weight, aligned)[:, 0, 0] * aligned.units).tolist() == [0.0, 0.5]


@pytest.mark.parametrize("has_offsets", [False, True])
@pytest.mark.parametrize("has_zeros", [False, True])
def test_sums_of_many_rows_are_those_of_whole_weights(has_zeros: bool, has_offsets: bool) -> None:
    small = _random_weight(has_zeros=has_zeros, has_offsets=has_offsets)
    parts = {name: getattr(small, name) for name in ("codes", "scales", "zero_points", "offsets")}
    weight = replace(small, **{name: part.repeat(96, 1) for name, part in parts.items() if part is not None})
    aligned = align_scales(weight)
    assert aligned is not None
    assert len(pieces_of(weight.codes)) > 1
    found, numbers = sum_weights(weight, aligned), whole_weights(weight, aligned).to(torch.int64)
    assert found.sums.tolist() == numbers.sum(dim=(1, 2)).tolist()
    assert found.magnitudes.tolist() == numbers.abs().sum(dim=(1, 2)).tolist()
