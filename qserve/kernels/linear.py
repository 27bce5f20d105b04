"""Weights that share one input, joined into as few as possible before a kernel lays them out.

Knows no layout: each set of kernels has its own, and shows of it only what `Linear` says.
"""

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from qserve.quant.weight import QuantizedWeight, Weight

_JOINED = frozenset({"codes", "scales", "zero_points", "offsets"})  # these have a row for each output


class Linear(Protocol):
    """Packed weights: opaque but for what can be reported about them."""

    @property
    def in_features(self) -> int: ...
    @property
    def out_features(self) -> int: ...
    @property
    def num_bytes(self) -> int: ...
    @property
    def kernel(self) -> str: ...  # its name, for people


def join_weights(weights: Sequence[Weight]) -> list[Weight]:
    """Neighbours that differ in nothing but their rows become one weight; order is kept."""
    assert weights, "nothing to pack"
    assert len({weight.shape[1] for weight in weights}) == 1, [tuple(weight.shape) for weight in weights]
    starts = [0, *(i + 1 for i, (a, b) in enumerate(pairwise(weights)) if not _can_join(a, b)), len(weights)]
    return [_join(weights[start:end]) for start, end in pairwise(starts)]


def join_biases(weights: Sequence[Weight], biases: Sequence[Tensor | None]) -> Tensor | None:
    """The biases side by side in float32, zeros for a missing one: (out_features,); None where all are missing."""
    assert len(weights) == len(biases), (len(weights), len(biases))
    if all(bias is None for bias in biases):
        return None
    device = next(bias.device for bias in biases if bias is not None)
    return torch.cat(
        [
            torch.zeros(weight.shape[0], device=device) if bias is None else bias.to(torch.float32)
            for weight, bias in zip(weights, biases, strict=True)
        ]
    )


def select_rows(weight: Weight, rows: Tensor) -> Weight:
    """The weight of these outputs alone, in this order."""
    if isinstance(weight, Tensor):
        return _take(weight, rows)
    return replace(
        weight,
        codes=_take(weight.codes, rows),
        scales=_take(weight.scales, rows),
        zero_points=None if weight.zero_points is None else _take(weight.zero_points, rows),
        offsets=None if weight.offsets is None else _take(weight.offsets, rows),
    )


def moved(weight: Weight, move: Callable[[Tensor], Tensor]) -> Weight:
    """With every tensor where `move` puts it."""
    if isinstance(weight, Tensor):
        return move(weight)
    return replace(
        weight,
        codes=move(weight.codes),
        scales=move(weight.scales),
        zero_points=None if weight.zero_points is None else move(weight.zero_points),
        offsets=None if weight.offsets is None else move(weight.offsets),
    )


def look_up(table: Weight, rows: Tensor) -> Tensor:
    """Rows of a table as plain numbers: (rows, features)."""
    chosen = select_rows(table, rows)
    return chosen if isinstance(chosen, Tensor) else chosen.dequantize()


def _take(tensor: Tensor, rows: Tensor) -> Tensor:
    """tensor[rows]; torch picks no rows of float8 numbers, but of their bytes."""
    return tensor.view(torch.uint8)[rows].view(tensor.dtype) if tensor.element_size() == 1 else tensor[rows]


def _can_join(a: Weight, b: Weight) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return False
    return all(_is_same(field.name, getattr(a, field.name), getattr(b, field.name)) for field in fields(a))


def _is_same(name: str, a: object, b: object) -> bool:
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return a is None and b is None if isinstance(a, Tensor) or isinstance(b, Tensor) else a == b
    if name in _JOINED:
        return a.dtype == b.dtype and a.shape[1:] == b.shape[1:]
    return torch.equal(a, b)


def _join(weights: Sequence[Weight]) -> Weight:
    first = weights[0]
    if len(weights) == 1:
        return first
    if isinstance(first, Tensor):
        return torch.cat([weight for weight in weights if isinstance(weight, Tensor)])
    quantized = [weight for weight in weights if isinstance(weight, QuantizedWeight)]
    return replace(
        first,
        codes=torch.cat([weight.codes for weight in quantized]),
        scales=torch.cat([weight.scales for weight in quantized]),
        zero_points=_join_optional([weight.zero_points for weight in quantized]),
        offsets=_join_optional([weight.offsets for weight in quantized]),
    )


def _join_optional(parts: Sequence[Tensor | None]) -> Tensor | None:
    present = [part for part in parts if part is not None]
    return torch.cat(present) if present else None
