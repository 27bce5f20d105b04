"""A checkpoint as a transformers model that computes what the server computes, to measure with.

Quantized weights are dequantized into float32, and each of their linears rounds its input as its weight says. Slow and
plain; knows no files beyond what `qserve.checkpoint` reads.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from qserve.checkpoint.contents import Checkpoint
from qserve.checkpoint.load import load_model, open_weights
from qserve.quant.weight import ActivationQuantization, QuantizedWeight
from training.qat.activations import round_activations


def load_for_measuring(checkpoint: Checkpoint) -> nn.Module:
    """The model in float32 and in evaluation mode, float or quantized."""
    model = load_model(checkpoint, dtype=torch.float32)
    round_inputs(model, activations_of(checkpoint))
    return model


def activations_of(checkpoint: Checkpoint) -> dict[str, ActivationQuantization]:
    """How each quantized weight wants its input."""
    weights = open_weights(checkpoint)
    read = ((name, weights[name]) for name, info in checkpoint.tensors.items() if info.is_quantized)
    return {name: weight.activation for name, weight in read if isinstance(weight, QuantizedWeight)}


def round_inputs(model: nn.Module, kinds: Mapping[str, ActivationQuantization]) -> None:
    """Let the linears of these weights round what they are given."""
    for name, kind in kinds.items():
        if kind is not ActivationQuantization.NONE:
            module = model.get_submodule(name.removesuffix(".weight"))
            module.register_forward_pre_hook(_Rounding(kind))


class _Rounding:
    def __init__(self, kind: ActivationQuantization) -> None:
        self.kind = kind

    def __call__(self, _: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (round_activations(inputs[0], self.kind), *inputs[1:])
