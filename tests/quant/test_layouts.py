"""Layouts that torchao can only make on other machines, built here index by index from their definitions."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torchao.quantization import Int4PlainInt32Tensor, Int4Tensor, Int4TilePackedTo4dTensor

from qserve.errors import BrokenCheckpoint
from qserve.quant import layouts
from qserve.quant.read import read_tensor
from qserve.quant.weight import ActivationQuantization, QuantizedWeight

ROWS, COLUMNS, GROUP = 12, 96, 32


def random_codes(low: int, high: int, rows: int = ROWS, columns: int = COLUMNS) -> Tensor:
    return torch.randint(low, high, (rows, columns), generator=torch.Generator().manual_seed(1), dtype=torch.int32)


def random_groups(dtype: torch.dtype, rows: int = ROWS, columns: int = COLUMNS) -> Tensor:
    return torch.rand(columns // GROUP, rows, generator=torch.Generator().manual_seed(2)).to(dtype)  # (groups, rows)


def read(tensor: Any) -> QuantizedWeight:
    weight = read_tensor("w", tensor)
    assert isinstance(weight, QuantizedWeight)
    return weight


def spread(groups: Tensor) -> Tensor:
    """(groups, rows) -> (rows, columns), in float32."""
    return groups.t().float().repeat_interleave(GROUP, dim=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_int4_is_nibbles_with_the_even_column_low(dtype: torch.dtype) -> None:
    codes, scale, zero = random_codes(-8, 8), random_groups(dtype), random_groups(dtype) - 0.5
    packed = torch.zeros(ROWS, COLUMNS // 2, dtype=torch.int32)
    for column in range(COLUMNS):
        packed[:, column // 2] |= (codes[:, column] & 0xF) << (4 * (column % 2))
    tensor = Int4Tensor(packed.to(torch.uint8).view(torch.int8), scale, zero, [1, GROUP], torch.Size((ROWS, COLUMNS)))
    weight = read(tensor)
    expected = codes.float() * spread(scale) + spread(zero)
    assert torch.equal(weight.dequantize(), expected.to(dtype))
    assert torch.equal(layouts.pack_nibbles(weight.codes), tensor.qdata)
    assert weight.activation is ActivationQuantization.NONE


def test_int4_with_float8_activations() -> None:
    qdata = torch.zeros(ROWS, COLUMNS // 2, dtype=torch.int8)
    scale = random_groups(torch.bfloat16)
    tensor = Int4Tensor(
        qdata,
        scale,
        torch.zeros_like(scale),
        [1, GROUP],
        torch.Size((ROWS, COLUMNS)),
        activation_dtype=torch.float8_e4m3fn,
    )
    weight = read(tensor)
    assert weight.activation is ActivationQuantization.FLOAT8
    assert weight.offsets is None


def pack_tiles(codes: Tensor) -> Tensor:
    """The tensor core order by its definition: each lane of a warp packs eight codes of its row into an int32."""
    rows, columns = codes.shape
    packed = torch.zeros(rows // 8, columns // 128, 32, 4, dtype=torch.int64)
    for lane in range(32):
        for pair in range(4):
            for position, offset in enumerate((0, 8, 16, 24, 1, 9, 17, 25)):
                column = 32 * pair + 2 * (lane % 4) + offset
                code = codes[lane // 4 :: 8, column::128].long()  # (row tiles, column tiles)
                packed[:, :, lane, pair] |= code << (4 * position)
    return packed.to(torch.int32)


def test_tiles_are_unpacked_and_their_padding_cut_off() -> None:
    padded_rows, padded_columns = 16, 1024
    codes = random_codes(0, 16, padded_rows, padded_columns)
    scale = random_groups(torch.bfloat16, padded_rows, padded_columns)
    zero = scale.flip(0) - 0.5
    packed = pack_tiles(codes)
    assert torch.equal(layouts.unpack_tiles(packed).int(), codes)
    tensor = Int4TilePackedTo4dTensor(
        packed, torch.stack((scale, zero), dim=-1), [1, GROUP], torch.Size((ROWS, COLUMNS))
    )
    weight = read(tensor)
    expected = (codes.float() - 8) * spread(scale) + spread(zero)
    assert torch.equal(weight.dequantize(), expected[:ROWS, :COLUMNS].bfloat16())
    assert weight.scales.is_contiguous()


def pack_int32(codes: Tensor) -> Tensor:
    packed = torch.zeros(ROWS, COLUMNS // 8, dtype=torch.int64)
    for column in range(COLUMNS):
        packed[:, column // 8] |= (codes[:, column].long() & 0xF) << (4 * (column % 8))
    return packed.to(torch.int32)


@pytest.mark.parametrize(("low", "zero_dtype"), [(0, torch.int8), (-8, torch.bfloat16)])
def test_int32_words_of_eight(low: int, zero_dtype: torch.dtype) -> None:
    codes, zero_point = random_codes(low, low + 16), random_codes(low, low + 16, COLUMNS // GROUP, ROWS)
    scale = random_groups(torch.bfloat16)
    tensor = Int4PlainInt32Tensor(
        pack_int32(codes), scale, zero_point.to(zero_dtype), [1, GROUP], torch.Size((ROWS, COLUMNS))
    )
    weight = read(tensor)
    expected = (codes.float() - spread(zero_point)) * spread(scale)
    assert torch.equal(weight.dequantize(), expected.bfloat16())
    assert weight.zero_points is not None
    assert weight.zero_points.dtype == torch.int8


def test_tiles_of_another_size_are_named() -> None:
    scale = torch.ones(2, 16, 2, dtype=torch.bfloat16)
    tensor = Int4TilePackedTo4dTensor(
        torch.zeros(2, 1, 32, 4, dtype=torch.int32), scale, [1, GROUP], torch.Size((ROWS, COLUMNS))
    )
    with pytest.raises(BrokenCheckpoint, match=r"scale_and_zero of shape \[2, 16, 2\]; expected \[4, 16, 2\]"):
        read(tensor)
