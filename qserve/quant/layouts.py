"""How torchao's packed tensors lay out their codes: pure bit shuffling, each way back to (out_features, in_features).

Knows no scales and no names. `read.py` calls it; `apply.py` packs nibbles with it.
"""

import torch
from torch import Tensor

# The sixteen e2m1 numbers by their code, each doubled so that it is an integer.
FLOAT4_TWICE = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """(rows, columns / 2) bytes -> (rows, columns) uint8 of 0 to 15; the low nibble is the even column."""
    packed = packed.contiguous().view(torch.uint8)
    return torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2)


def pack_nibbles(codes: Tensor) -> Tensor:
    """(rows, columns) int8 of -8 to 7 -> (rows, columns / 2) int8; the way back is `unpack_signed_nibbles`."""
    nibbles = codes.view(torch.uint8) & 0xF
    return (nibbles[..., ::2] | (nibbles[..., 1::2] << 4)).contiguous().view(torch.int8)


def unpack_signed_nibbles(packed: Tensor) -> Tensor:
    """The same nibbles as two's complement: (rows, columns) int8 of -8 to 7. Shifts to the right keep the sign."""
    packed = packed.contiguous().view(torch.int8)
    return torch.stack(((packed << 4) >> 4, packed >> 4), dim=-1).flatten(-2)


def unpack_tiles(packed: Tensor) -> Tensor:
    """tinygemm's tensor core layout on CUDA, int32 -> (rows, columns) uint8 of 0 to 15, padding included.

    packed[row tile][column tile][lane][pair], of 8 rows and 16 columns a tile; a pair is two column tiles, 32 columns:

        lane   = 4 * row + q                        row 0..7, q 0..3
        nibble = 4 * parity + i                     counted from the lowest bits; i 0..3, parity 0..1
        column = 32 * pair + 8 * i + 2 * q + parity

    ROCm keeps another order in tensors of the same shape: such files cannot be told apart and are read wrong.
    """
    row_tiles, column_tiles, _, pairs = packed.shape
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=packed.device)
    nibbles = ((packed.unsqueeze(-1) >> shifts) & 0xF).to(torch.uint8)
    nibbles = nibbles.view(row_tiles, column_tiles, 8, 4, pairs, 2, 4)  # row tile, column tile, row, q, pair, parity, i
    nibbles = nibbles.permute(0, 2, 1, 4, 6, 3, 5)  # row tile, row, column tile, pair, i, q, parity
    return nibbles.reshape(row_tiles * 8, column_tiles * pairs * 32)


def unswizzle_scales(swizzled: Tensor, *, rows: int, columns: int) -> Tensor:
    """Block scales in the order that tensor cores read them -> (rows, columns).

    Scales are padded to blocks of 128 rows and 4 columns; a block's 512 bytes run over row % 32, then row // 32 of the
    block, then column.
    """
    row_blocks, column_blocks = -(-rows // 128), -(-columns // 4)
    blocks = swizzled.contiguous().view(torch.uint8).view(row_blocks, column_blocks, 32, 4, 4)
    padded = blocks.permute(0, 3, 2, 1, 4).reshape(row_blocks * 128, column_blocks * 4)
    return padded[:rows, :columns].contiguous().view(swizzled.dtype)


def float4_codes(packed: Tensor) -> Tensor:
    """(rows, columns / 2) bytes of e2m1 pairs -> (rows, columns) int8 of twice their values."""
    table = torch.tensor(FLOAT4_TWICE, dtype=torch.int8, device=packed.device)
    return table[unpack_nibbles(packed).to(torch.int64)]


def float6_codes(codes: Tensor, *, exponent_bits: int, mantissa_bits: int) -> Tensor:
    """One 6-bit float a byte, right-aligned -> float8_e4m3fn, which holds every e2m3 and e3m2 number exactly."""
    table = torch.tensor(_small_floats(exponent_bits, mantissa_bits), device=codes.device)
    return table.to(torch.float8_e4m3fn).view(torch.uint8)[codes.to(torch.int64)].view(torch.float8_e4m3fn)


def _small_floats(exponent_bits: int, mantissa_bits: int) -> list[float]:
    """The value of every code of a float that has no infinities and no NaN, positive half first."""
    bias = 2 ** (exponent_bits - 1) - 1
    positive = []
    for code in range(2 ** (exponent_bits + mantissa_bits)):
        exponent, mantissa = code >> mantissa_bits, (code & (2**mantissa_bits - 1)) / 2**mantissa_bits
        positive.append(2.0 ** (exponent - bias) * (1 + mantissa) if exponent else 2.0 ** (1 - bias) * mantissa)
    return positive + [-value for value in positive]
