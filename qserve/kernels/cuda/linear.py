"""Linears on a GPU whose weights stay as small as they are stored: Triton kernels widen them where they multiply.

For one row the products are float32. For more they are made on tensor cores, of factors in tf32, which has 11
significant bits and takes the first ones: an input or a weight is off by a 1024th of itself at most. Sums are float32.
"""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from qserve.kernels.cuda.rows import quantize_int8
from qserve.kernels.reference_activations import ROUND_TRIPS, quantize_float8
from qserve.quant.weight import ActivationQuantization, Weight


@dataclass(frozen=True, slots=True)
class _Tiling:
    """What one program computes, and how many features of it at once."""

    rows: int
    columns: int
    features: int


# Rows up to which, and outputs from which on, each is the best of five or more on an H100.
_TILINGS = (
    (1, 0, _Tiling(1, 4, 512)),
    (64, 8192, _Tiling(32, 32, 128)),
    (64, 0, _Tiling(32, 16, 128)),
    (sys.maxsize, 0, _Tiling(64, 64, 32)),
)


def _choose_tiling(num_rows: int, out_features: int) -> _Tiling:
    return next(tiling for most, least, tiling in _TILINGS if num_rows <= most and out_features >= least)


# Inputs as numbers that fit into tf32, and what each row of them is to be multiplied with.
_QUANTIZERS: Mapping[ActivationQuantization, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    ActivationQuantization.INT8_ASYMMETRIC: partial(quantize_int8, is_symmetric=False),
    ActivationQuantization.INT8_SYMMETRIC: partial(quantize_int8, is_symmetric=True),
    ActivationQuantization.FLOAT8: quantize_float8,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class CudaPart:
    """One weight on the GPU. Called with (tokens, in_features) float32, gives (tokens, out_features)."""

    shape: tuple[int, int]
    codes: Tensor  # (out, in); where two stand in a byte, the first of them low, (out, in / 2) uint8
    scales: Tensor | None = None  # (out, groups), float32
    zero_points: Tensor | None = None  # the same
    offsets: Tensor | None = None  # the same
    pre_scale: Tensor | None = None  # (in,), float32
    activation: ActivationQuantization = ActivationQuantization.NONE
    group_size: int

    @property
    def kernel(self) -> str:
        return f"triton-{'int4' if self._is_packed else str(self.codes.dtype).removeprefix('torch.')}"

    @property
    def nbytes(self) -> int:
        parts = (self.codes, self.scales, self.zero_points, self.offsets, self.pre_scale)
        return sum(part.nbytes for part in parts if part is not None)

    @property
    def _is_packed(self) -> bool:
        return self.codes.dtype is torch.uint8

    def __call__(self, x: Tensor) -> Tensor:
        if self.pre_scale is not None:
            x = x * self.pre_scale
        quantize = _QUANTIZERS.get(self.activation)
        x, row_scales = (ROUND_TRIPS[self.activation](x), None) if quantize is None else quantize(x)
        return self._multiply(x.contiguous(), row_scales)

    def _multiply(self, x: Tensor, row_scales: Tensor | None) -> Tensor:
        num_rows, (out_features, in_features) = len(x), self.shape
        y = x.new_empty(num_rows, out_features)
        tiling = _choose_tiling(num_rows, out_features)
        run = min(self.group_size & -self.group_size, tiling.features)
        columns = triton.cdiv(out_features, tiling.columns)
        kernel, grid = (
            (_multiply_row, (columns,)) if num_rows == 1 else (_multiply, (columns, triton.cdiv(num_rows, tiling.rows)))
        )
        kernel[grid](
            *(x, self.codes, self.scales, self.zero_points, self.offsets, row_scales, y),
            *(num_rows, out_features, in_features, in_features // self.group_size, self.group_size),
            is_packed=self._is_packed,
            row_tile=tiling.rows,
            column_tile=tiling.columns,
            num_runs=tiling.features // run,
            run=run,
            num_warps=4,
        )
        return y


def pack_part(weight: Weight, *, device: torch.device) -> CudaPart | None:
    """The weight as the kernels read it; None for one that they, or this GPU, cannot read."""
    shape = (weight.shape[0], weight.shape[1])
    if not _can_read(weight, device):
        return None
    if isinstance(weight, Tensor):
        return CudaPart(shape=shape, codes=weight.to(device).contiguous(), group_size=shape[1])
    codes = weight.codes.to(device).contiguous()
    return CudaPart(
        shape=shape,
        codes=_pack_nibbles(codes) if weight.code_bits <= 4 and shape[1] % 2 == 0 else codes,
        scales=_to_float(weight.scales, device),
        zero_points=_to_float(weight.zero_points, device),
        offsets=_to_float(weight.offsets, device),
        pre_scale=_to_float(weight.pre_scale, device),
        activation=weight.activation,
        group_size=weight.group_size,
    )


def _can_read(weight: Weight, device: torch.device) -> bool:
    """float32 has too many bits for tf32; zero points that were learned round in between; e4m3 is newer than tf32."""
    if isinstance(weight, Tensor):
        return weight.dtype in (torch.bfloat16, torch.float16)
    if weight.zero_points is not None and weight.zero_points.is_floating_point():
        return False
    is_new = device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9)
    return is_new or weight.codes.dtype is not torch.float8_e4m3fn


def _to_float(part: Tensor | None, device: torch.device) -> Tensor | None:
    return None if part is None else part.to(device, torch.float32).contiguous()


def _pack_nibbles(codes: Tensor) -> Tensor:
    """Codes of -8 to 7, each plus 8."""
    shifted = (codes + 8).to(torch.uint8)
    return shifted[:, ::2] | shifted[:, 1::2] << 4


@triton.jit(do_not_specialize=["num_rows"])
def _multiply_row(
    x_at,
    codes_at,
    scales_at,
    zero_points_at,
    offsets_at,
    row_scales_at,
    y_at,
    num_rows,
    out_features,
    in_features,
    num_groups,
    group_size,
    is_packed: tl.constexpr,
    row_tile: tl.constexpr,
    column_tile: tl.constexpr,
    num_runs: tl.constexpr,
    run: tl.constexpr,
):
    """y = x @ weight.T for one row and column_tile outputs. A run is of one group, whose numbers come in at its end."""
    columns = tl.program_id(0) * column_tile + tl.arange(0, column_tile)
    is_column = columns < out_features
    sums = tl.zeros((column_tile, num_runs), dtype=tl.float32)
    for start in range(0, in_features, num_runs * run):
        features = start + tl.arange(0, num_runs * run)
        x = tl.load(x_at + features, mask=features < in_features, other=0.0)
        codes = _load_codes(codes_at, columns, is_column, start, in_features, is_packed, num_runs * run)
        products = tl.sum(tl.reshape(codes * x[None, :], (column_tile, num_runs, run)), axis=2)
        groups = (start + tl.arange(0, num_runs) * run) // group_size
        is_inside = is_column[:, None] & (groups < num_groups)[None, :]
        at = columns[:, None] * num_groups + groups[None, :]
        if zero_points_at is not None or offsets_at is not None:
            total = tl.sum(tl.reshape(x, (num_runs, run)), axis=1)[None, :]
        if zero_points_at is not None:
            products -= tl.load(zero_points_at + at, mask=is_inside, other=0.0) * total
        if scales_at is not None:
            products *= tl.load(scales_at + at, mask=is_inside, other=0.0)
        if offsets_at is not None:
            products += tl.load(offsets_at + at, mask=is_inside, other=0.0) * total
        sums += products
    y = tl.sum(sums, axis=1)
    if row_scales_at is not None:
        y *= tl.load(row_scales_at)
    tl.store(y_at + columns, y, mask=is_column)


@triton.jit(do_not_specialize=["num_rows"])
def _multiply(
    x_at,
    codes_at,
    scales_at,
    zero_points_at,
    offsets_at,
    row_scales_at,
    y_at,
    num_rows,
    out_features,
    in_features,
    num_groups,
    group_size,
    is_packed: tl.constexpr,
    row_tile: tl.constexpr,
    column_tile: tl.constexpr,
    num_runs: tl.constexpr,
    run: tl.constexpr,
):
    """y = x @ weight.T for row_tile rows and column_tile outputs."""
    tile: tl.constexpr = num_runs * run
    columns = tl.program_id(0) * column_tile + tl.arange(0, column_tile)
    rows = tl.program_id(1) * row_tile + tl.arange(0, row_tile)
    is_column, is_row = columns < out_features, rows < num_rows
    x_at += rows.to(tl.int64)[:, None] * in_features
    sums = tl.zeros((row_tile, column_tile), dtype=tl.float32)
    for start in range(0, in_features, tile):
        features = start + tl.arange(0, tile)
        x = tl.load(x_at + features[None, :], mask=is_row[:, None] & (features < in_features)[None, :], other=0.0)
        values = _load_codes(codes_at, columns, is_column, start, in_features, is_packed, tile)
        if scales_at is not None:
            values = tl.reshape(values, (column_tile, num_runs, run))
            groups = (start + tl.arange(0, num_runs) * run) // group_size
            is_inside = is_column[:, None] & (groups < num_groups)[None, :]
            at = columns[:, None] * num_groups + groups[None, :]
            if zero_points_at is not None:
                values -= tl.load(zero_points_at + at, mask=is_inside, other=0.0)[:, :, None]
            values *= tl.load(scales_at + at, mask=is_inside, other=0.0)[:, :, None]
            if offsets_at is not None:
                values += tl.load(offsets_at + at, mask=is_inside, other=0.0)[:, :, None]
            values = tl.reshape(values, (column_tile, tile))
        sums += tl.dot(x, tl.trans(values), input_precision="tf32")
    if row_scales_at is not None:
        sums *= tl.load(row_scales_at + rows, mask=is_row, other=0.0)[:, None]
    y_at += rows.to(tl.int64)[:, None] * out_features + columns[None, :]
    tl.store(y_at, sums, mask=is_row[:, None] & is_column[None, :])


@triton.jit
def _load_codes(codes_at, columns, is_column, start, in_features, is_packed: tl.constexpr, tile: tl.constexpr):
    """The codes of these outputs and of `tile` features from `start` on, as float32: (outputs, tile)."""
    halves: tl.constexpr = 2 if is_packed else 1
    places = start // halves + tl.arange(0, tile // halves)
    stride = in_features // halves
    at = columns.to(tl.int64)[:, None] * stride + places[None, :]
    codes = tl.load(codes_at + at, mask=is_column[:, None] & (places < stride)[None, :], other=0.0)
    if is_packed:
        codes = tl.interleave((codes & 15).to(tl.int8), (codes >> 4).to(tl.int8)) - 8
    return codes.to(tl.float32)
