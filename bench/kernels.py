"""Every kernel against plain torch, torch's own packed ops, torchao eager and a bf16 linear.

    python -m bench.kernels [--rows 1,4,16,64,256] [--shapes 1536x576,2048x2048] [--recipes ...]

One linear is timed at a time, all ways of computing it in turn, round after round; the best round counts, so that a
busy neighbour does not. Microseconds a call. `memory` is the time over what reading the packed weight alone would take
at the bandwidth measured for that size; only few rows can come near 1.
"""

import argparse
import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench.bandwidth import read_bandwidth
from qserve.bench.machine import describe_circumstances
from qserve.kernels.arena import keep_free_memory
from qserve.kernels.native import NativeOps, open_native
from qserve.kernels.reference import ReferenceOps
from qserve.quant.weight import ActivationQuantization, QuantizedWeight, Weight

# A SmolLM2 layer's linears and head, a 1B-shaped model's.
SHAPES = "960x576,576x576,3072x576,576x1536,49152x576,2048x2048,16384x2048,2048x8192"
ROWS = "1,4,16,64,256"
ROUNDS = 15
SECONDS_A_CASE = 2.0
PAUSE = 0.02  # seconds, after which another library's threads have stopped to wait for work
TURN = 0.01  # seconds of calls: after a pause it can take 3 ms until a thread runs again

Call = Callable[[], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A recipe of one linear: bits 16 is an unquantized bf16 weight."""

    bits: int
    group_size: int | None = None
    activation: ActivationQuantization = ActivationQuantization.NONE
    has_offsets: bool = False


KINDS: Mapping[str, Kind] = {
    "bf16": Kind(bits=16),
    "int4-weight-only": Kind(bits=4, group_size=32, has_offsets=True),
    "int8-dynamic-act-int4-weight": Kind(bits=4, group_size=32, activation=ActivationQuantization.INT8_ASYMMETRIC),
    "int8-weight-only": Kind(bits=8),
    "int8-dynamic-act-int8-weight": Kind(bits=8, activation=ActivationQuantization.INT8_SYMMETRIC),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One linear at one number of rows, and the best microseconds of each way to compute it."""

    recipe: str
    out_features: int
    in_features: int
    rows: int
    num_bytes: int
    memory_us: float
    best_us: Mapping[str, float]

    def to_json(self) -> dict[str, Any]:
        names = ("recipe", "out_features", "in_features", "rows", "num_bytes", "memory_us", "best_us")
        return {name: getattr(self, name) for name in names}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=SHAPES, help="OUTxIN, with commas between")
    parser.add_argument("--rows", default=ROWS, help="numbers of rows, with commas between")
    parser.add_argument("--recipes", default=",".join(KINDS), help="with commas between")
    parser.add_argument("--threads", type=int, default=0, help="0 takes every core this process may use")
    options = parser.parse_args()
    shapes = [(int(out), int(width)) for out, _, width in (each.partition("x") for each in options.shapes.split(","))]
    rows = [int(number) for number in options.rows.split(",")]
    keep_free_memory()  # as a server does: results of many rows would else be new memory, page by page, in every call
    ops = open_native(num_threads=options.threads)
    torch.set_num_threads(ops.num_threads)
    circumstances = describe_circumstances()
    with torch.inference_mode():
        cases = [case for recipe in options.recipes.split(",") for case in measure(recipe, shapes, rows, ops=ops)]
    print_table(cases)
    print(
        json.dumps(
            {"bench": "kernels", **circumstances, "kernels": ops.variant, "cases": [case.to_json() for case in cases]}
        )
    )
    return 0


def measure(recipe: str, shapes: Sequence[tuple[int, int]], rows: Sequence[int], *, ops: NativeOps) -> Iterator[Case]:
    kind = KINDS[recipe]
    for out_features, in_features in shapes:
        weight = make_weight(kind, out_features, in_features)
        linear = ops.pack([weight], biases=[None])
        ways = make_ways(kind, weight, out_features, in_features, ops=ops)
        memory_us = linear.num_bytes / read_bandwidth(max(linear.num_bytes, 1 << 20)) * 1e6
        for number in rows:
            x = torch.randn(number, in_features)
            calls = {name: way(x) for name, way in ways.items()}
            yield Case(
                recipe=recipe,
                out_features=out_features,
                in_features=in_features,
                rows=number,
                num_bytes=linear.num_bytes,
                memory_us=memory_us,
                best_us=time_calls({name: call for name, call in calls.items() if call is not None}),
            )


def make_weight(kind: Kind, out_features: int, in_features: int) -> Weight:
    if kind.bits == 16:
        values: Tensor = torch.randn(out_features, in_features) * in_features**-0.5
        return values.to(torch.bfloat16)
    group_size, limit = kind.group_size or in_features, 1 << (kind.bits - 1)
    groups = in_features // group_size
    scales = torch.rand(out_features, groups) * in_features**-0.5 / limit
    return QuantizedWeight(
        codes=torch.randint(-limit, limit, (out_features, in_features)).to(torch.int8),
        scales=scales.to(torch.bfloat16),
        offsets=torch.zeros(out_features, groups, dtype=torch.bfloat16) if kind.has_offsets else None,
        group_size=group_size,
        bits=kind.bits,
        dtype=torch.bfloat16,
        activation=kind.activation,
    )


def make_ways(
    kind: Kind, weight: Weight, out_features: int, in_features: int, *, ops: NativeOps
) -> dict[str, Callable[[Tensor], Call | None]]:
    """Name -> input -> the call to time; a way that cannot take this weight here is left out."""
    linear = ops.pack([weight], biases=[None])
    reference = ReferenceOps(device=torch.device("cpu"))
    plain = reference.pack([weight], biases=[None])
    values = weight if isinstance(weight, Tensor) else weight.dequantize()
    ways: dict[str, Callable[[Tensor], Call | None]] = {
        "qserve": lambda x: lambda: ops.norm_linear(x, None, linear),
        "torch twin": lambda x: lambda: reference.norm_linear(x, None, plain),
        "bf16 linear": lambda x: _bind(torch.nn.functional.linear, x.to(torch.bfloat16), values),
    }
    if isinstance(weight, QuantizedWeight):
        ways["aten packed"] = _aten_way(kind, weight)
        ways["torchao eager"] = _torchao_way(kind, values, out_features, in_features)
    return ways


def _bind(function: Callable[..., object], *arguments: object) -> Call:
    return lambda: function(*arguments)


def _aten_way(kind: Kind, weight: QuantizedWeight) -> Callable[[Tensor], Call | None]:
    """torch's own op for a weight of as many bits, with the same codes and scales where it has them."""
    if kind.bits == 8:
        scales = weight.scales.flatten()
        return lambda x: _bind(torch._weight_int8pack_mm, x.to(torch.bfloat16), weight.codes, scales)
    unsigned = (weight.codes + 8).to(torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(unsigned, 1)
    scales_and_zeros = torch.stack([weight.scales.T, torch.zeros_like(weight.scales.T)], dim=-1).contiguous()
    group_size = weight.group_size
    return lambda x: _bind(
        torch.ops.aten._weight_int4pack_mm_for_cpu, x.to(torch.bfloat16), packed, group_size, scales_and_zeros
    )


def _torchao_way(kind: Kind, values: Tensor, out_features: int, in_features: int) -> Callable[[Tensor], Call | None]:
    from torchao.quantization import (  # seconds to import
        Int8DynamicActivationInt8WeightConfig,
        Int8DynamicActivationIntxWeightConfig,
        Int8WeightOnlyConfig,
        IntxWeightOnlyConfig,
        PerGroup,
        quantize_,
    )

    is_dynamic = kind.activation is not ActivationQuantization.NONE
    group = PerGroup(kind.group_size or in_features)
    config: Any
    if kind.bits == 8:
        config = Int8DynamicActivationInt8WeightConfig() if is_dynamic else Int8WeightOnlyConfig()
    elif is_dynamic:
        config = Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4, weight_granularity=group)  # type: ignore[attr-defined]
    else:
        config = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=group)  # type: ignore[attr-defined]
    module = torch.nn.Sequential(torch.nn.Linear(in_features, out_features, bias=False, dtype=torch.bfloat16))
    module[0].weight = torch.nn.Parameter(values.to(torch.bfloat16), requires_grad=False)
    quantize_(module, config)
    return lambda x: _bind(module, x.to(torch.bfloat16))


def time_calls(calls: Mapping[str, Call]) -> dict[str, float]:
    """The best of many rounds, all ways in turn; the slow ones are called less often.

    A way's turn is some calls one after the other, after a pause: threads of another library, which spin for a while
    after their last call, would else hold the cores that this one's need.
    """
    best: dict[str, float] = {}
    end = time.perf_counter() + SECONDS_A_CASE
    for number in range(ROUNDS * 40):
        if number >= 3 and time.perf_counter() > end:
            break
        for name, call in calls.items():
            if number >= 3 and best[name] > 20 * best["qserve"] and number % 10:
                continue
            time.sleep(PAUSE)
            best[name] = min(best.get(name, math.inf), *_take_turn(call))
    return best


def _take_turn(call: Call) -> Iterator[float]:
    """Microseconds of each call."""
    end = time.perf_counter() + TURN
    yield _time_us(call)
    while time.perf_counter() < end:
        yield _time_us(call)


def _time_us(call: Call) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e6


def print_table(cases: Sequence[Case]) -> None:
    ways = list(dict.fromkeys(way for case in cases for way in case.best_us))
    table = Table("recipe", "shape", "rows", *ways, "memory", "to best other", box=box.SIMPLE_HEAD)
    for column in table.columns[2:]:
        column.justify = "right"
    for case in cases:
        ours = case.best_us["qserve"]
        others = [us for way, us in case.best_us.items() if way not in ("qserve", "torch twin")]
        table.add_row(
            case.recipe,
            f"{case.out_features} x {case.in_features}",
            str(case.rows),
            *(f"{case.best_us[way]:.0f}" if way in case.best_us else "-" for way in ways),
            f"{ours / case.memory_us:.2f}",
            f"{min(others) / ours:.1f} x",
        )
    Console(width=160).print(table)


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        raise SystemExit(main())
