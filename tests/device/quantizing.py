"""Plain quantizers, enough to make quantized models of every kind from random ones."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qserve.kernels.reference_activations import ROUND_TRIPS
from qserve.quant.weight import ActivationQuantization, QuantizedWeight, Weight

NONE = ActivationQuantization.NONE


def quantize_int4(
    values: Tensor, *, group_size: int = 32, activation: ActivationQuantization = NONE, has_offsets: bool = False
) -> QuantizedWeight:
    """Groups along the input, either symmetric or with a float minimum."""
    groups = values.unflatten(1, (-1, group_size))
    low = groups.amin(-1) if has_offsets else -groups.abs().amax(-1)
    scales = ((groups.amax(-1) - low) if has_offsets else -2 * low) / 15
    shift = low + 8 * scales if has_offsets else torch.zeros_like(low)
    codes = ((groups - shift.unsqueeze(-1)) / scales.unsqueeze(-1)).round().clamp(-8, 7)
    return QuantizedWeight(
        codes=codes.flatten(1).to(torch.int8),
        scales=scales,
        offsets=shift if has_offsets else None,
        group_size=group_size,
        bits=4,
        dtype=torch.float32,
        activation=activation,
    )


def quantize_int8(values: Tensor, *, activation: ActivationQuantization = NONE) -> QuantizedWeight:
    """A scale for each output."""
    scales = values.abs().amax(1, keepdim=True) / 127
    return QuantizedWeight(
        codes=(values / scales).round().to(torch.int8),
        scales=scales,
        group_size=values.shape[1],
        bits=8,
        dtype=torch.float32,
        activation=activation,
    )


def quantize_float8(values: Tensor, *, activation: ActivationQuantization = NONE) -> QuantizedWeight:
    """A scale for each output, float8_e4m3fn codes."""
    scales = values.abs().amax(1, keepdim=True) / 448
    codes = (values / scales).to(torch.float8_e4m3fn)
    return replace(quantize_int8(values, activation=activation), codes=codes, scales=scales)


WEIGHT_ONLY: dict[str, Callable[..., QuantizedWeight]] = {
    "int4": quantize_int4,
    "int4-offsets": partial(quantize_int4, has_offsets=True),
    "int8": quantize_int8,
    "float8": quantize_float8,
}
DYNAMIC: dict[str, Callable[..., QuantizedWeight]] = {
    "int4-asymmetric": partial(quantize_int4, activation=ActivationQuantization.INT8_ASYMMETRIC),
    "int8-asymmetric": partial(quantize_int8, activation=ActivationQuantization.INT8_ASYMMETRIC),
    "int8-symmetric": partial(quantize_int8, activation=ActivationQuantization.INT8_SYMMETRIC),
    "float8": partial(quantize_float8, activation=ActivationQuantization.FLOAT8),
}


def quantize_linears(weights: dict[str, Weight], quantize: Any) -> dict[str, Weight]:
    """Every linear of the layers, and the head where it is there."""
    return {
        name: quantize(weight) if name.endswith("_proj.weight") or name == "lm_head.weight" else weight
        for name, weight in weights.items()
    }


def imitate(theirs: nn.Module, weights: dict[str, Weight]) -> None:
    """Give transformers' model the dequantized weights, and round each linear's input as the weight says."""
    for name, module in theirs.named_modules():
        weight = weights.get(f"{name}.weight")
        if not isinstance(weight, QuantizedWeight):
            continue
        module.weight = nn.Parameter(weight.dequantize(), requires_grad=False)
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(_prepare(weight))


def _prepare(weight: QuantizedWeight) -> Any:
    def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> Tensor:
        x = arguments[0] if weight.pre_scale is None else arguments[0] * weight.pre_scale
        return ROUND_TRIPS[weight.activation](x)

    return hook
