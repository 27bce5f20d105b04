"""A weight that is packed in pieces is packed as its parts are, and where it is told to be."""

from dataclasses import replace

import pytest
import torch

from qserve.kernels.aligned_scales import pieces_of
from qserve.kernels.arena import Arena
from qserve.kernels.packing import LANES, PackedWeight, pack_weight
from qserve.quant.weight import ActivationQuantization, QuantizedWeight, Weight
from tests.kernels.native import make_weight

_PARTS = ("codes", "scales", "units", "zeros", "offsets", "fix")
_ASYMMETRIC = ActivationQuantization.INT8_ASYMMETRIC
_ROWS, _FEATURES = 5 * 400 + 7, 576  # the last tile is not full


def _cut(weight: Weight, rows: slice) -> Weight:
    if isinstance(weight, torch.Tensor):
        return weight[rows]
    parts = {name: getattr(weight, name) for name in ("codes", "scales", "zero_points", "offsets")}
    return replace(weight, **{name: part[rows] for name, part in parts.items() if part is not None})


def _floats(dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(_ROWS, _FEATURES, generator=torch.Generator().manual_seed(0)).to(dtype)


def _float8() -> QuantizedWeight:
    codes = _floats(torch.float8_e4m3fn)
    scales = torch.ones(_ROWS, 1)
    return QuantizedWeight(codes=codes, scales=scales, group_size=_FEATURES, bits=8, dtype=torch.float32)


WEIGHTS: dict[str, Weight] = {
    "int4": make_weight(_ROWS, _FEATURES, 32, activation=_ASYMMETRIC),
    "int4 with constants": make_weight(_ROWS, _FEATURES, 32, has_zeros=True, has_offsets=True),
    "int4 in odd groups": make_weight(_ROWS, _FEATURES, 24),
    "int8": make_weight(_ROWS, _FEATURES, _FEATURES, bits=8, activation=_ASYMMETRIC),
    "bfloat16": _floats(torch.bfloat16),
    "float32": _floats(torch.float32),
    "float8": _float8(),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_pieces_are_packed_as_parts_are(name: str) -> None:
    weight = WEIGHTS[name]
    codes = weight if isinstance(weight, torch.Tensor) else weight.codes
    starts = [rows.start for rows in pieces_of(codes)]
    assert len(starts) > 1
    assert all(start % LANES == 0 for start in starts)
    cut = 3 * LANES
    whole, parts = pack_weight(weight), [pack_weight(_cut(weight, rows)) for rows in (slice(cut), slice(cut, None))]
    for part in _PARTS:
        assert _bytes(whole, part) == b"".join(_bytes(each, part) for each in parts), part


def test_codes_stand_where_there_was_room_for_them() -> None:
    arena = Arena()
    packed = pack_weight(WEIGHTS["int4"], empty=arena.empty)
    placed = packed.placed(arena.place)
    assert placed.codes.data_ptr() == packed.codes.data_ptr()
    assert placed.codes.data_ptr() % 64 == 0
    assert placed.scales is not None
    assert placed.scales.data_ptr() == placed.codes.data_ptr() + placed.codes.nbytes
    for part in _PARTS:
        assert _bytes(placed, part) == _bytes(pack_weight(WEIGHTS["int4"]), part)


def _bytes(weight: PackedWeight, part: str) -> bytes:
    tensor = getattr(weight, part)
    return b"" if tensor is None else tensor.contiguous().view(torch.uint8).numpy().tobytes()
