"""The account of a quantization: what became of every matrix of a model, and what it weighs before and after.

Works on a plan, before anything is done as well as after. Knows no files and no command line.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from rich import box
from rich.table import Table
from torch import nn

from qserve.quant.apply import Plan, num_bytes
from qserve.quant.configs import Json
from qserve.quant.recipe import describe
from qserve.quant.tensors import make_tensor
from training.destination import mebibytes

_SAMPLE_ROWS = 16  # enough for every format: float8 wants a multiple of 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """What a plan does to a model, one line for all layers that differ in their number alone."""

    lines: tuple["Line", ...]
    bytes_before: int
    bytes_after: int
    num_weights: int  # stored afterwards: a head that was tied counts apart from the embedding
    quantized_bytes: int
    quantized_weights: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    name: str
    count: int
    outcome: str
    is_quantized: bool


def draw_up(model: nn.Module, plan: Plan) -> Account:
    """The account of `plan` for `model`, which has not been quantized yet; the model stays as it is."""
    kept = {
        id(parameter): parameter
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if name.removesuffix(".weight") not in plan.chosen
    }
    shapes = {name: model.get_submodule(name).get_parameter("weight").shape for name in plan.chosen}
    quantized_bytes = _quantized_bytes(model, plan)
    quantized_weights = sum(shape.numel() for shape in shapes.values())
    return Account(
        lines=tuple(_lines(model, plan)),
        bytes_before=num_bytes(model),
        bytes_after=sum(parameter.nbytes for parameter in kept.values()) + quantized_bytes,
        num_weights=sum(parameter.numel() for parameter in kept.values()) + quantized_weights,
        quantized_bytes=quantized_bytes,
        quantized_weights=quantized_weights,
    )


def table(account: Account) -> Table:
    """The account as people read it."""
    drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    drawn.add_column("layers")
    drawn.add_column("number", justify="right")
    drawn.add_column("becomes", overflow="fold")
    for line in account.lines:
        drawn.add_row(line.name, str(line.count), line.outcome, style=None if line.is_quantized else "yellow")
    return drawn


def summary(account: Account) -> str:
    """Size and bits per weight, in two sentences."""
    share = account.bytes_before / account.bytes_after
    bits = 8 * account.bytes_after / account.num_weights
    quantized = 8 * account.quantized_bytes / account.quantized_weights
    return (
        f"{mebibytes(account.bytes_before)} -> {mebibytes(account.bytes_after)} ({share:.2f} times smaller). "
        f"{bits:.2f} bits per weight of the whole model, {quantized:.2f} in the quantized layers."
    )


def _lines(model: nn.Module, plan: Plan) -> Iterator[Line]:
    outcomes = [(name, outcome, True) for name, outcome in _quantized(plan)]
    outcomes += [(name, outcome, False) for name, outcome in _left(model, plan)]
    counts: dict[tuple[str, str, bool], int] = {}
    for name, outcome, is_quantized in outcomes:
        key = (_family(name), outcome, is_quantized)
        counts[key] = counts.get(key, 0) + 1
    for (name, outcome, is_quantized), count in counts.items():
        yield Line(name=name, count=count, outcome=outcome, is_quantized=is_quantized)


def _quantized(plan: Plan) -> Iterator[tuple[str, str]]:
    for name, config in plan.chosen.items():
        note = plan.notes.get(name)
        yield name, describe(config).replace("Config", "") + (f" ({note})" if note else "")


def _left(model: nn.Module, plan: Plan) -> Iterator[tuple[str, str]]:
    """What stays float: matrices with the plan's reason, embeddings, and vectors."""
    for name, reason in plan.reasons.items():
        yield name, f"stays float: {reason}"
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            yield name, f"stays {_dtype(module.weight)}: it is a look-up"
    for parameter in model.parameters():
        if parameter.ndim < 2:
            yield "norms and biases", f"stay {_dtype(parameter)}: they are vectors"


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _family(name: str) -> str:
    return re.sub(r"\.\d+\.", ".*.", name)


def _quantized_bytes(model: nn.Module, plan: Plan) -> int:
    """Measured on a few rows of each shape: every format stores its rows alike."""
    measured: dict[tuple[int, torch.dtype, str], int] = {}
    total = 0
    for name, config in plan.chosen.items():
        weight = model.get_submodule(name).get_parameter("weight")
        rows, columns = weight.shape
        key = (columns, weight.dtype, repr(config))
        if key not in measured:
            measured[key] = _sample_bytes(columns, weight.dtype, config)
        total += measured[key] * rows // _SAMPLE_ROWS
    return total


def _sample_bytes(columns: int, dtype: torch.dtype, config: Json) -> int:
    linear = nn.Linear(columns, _SAMPLE_ROWS, bias=False, device="meta")
    sample = make_tensor(torch.ones(_SAMPLE_ROWS, columns, dtype=dtype), config)
    linear.weight = nn.Parameter(sample, requires_grad=False)
    return num_bytes(linear)
