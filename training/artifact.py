"""A checkpoint as a transformers model that computes what the server computes, to measure with.

Quantized weights become the values that their codes stand for, in float32, and each of their linears rounds its input
as its weight says. Slow and plain; knows no files beyond what `qserve.checkpoint` reads.

A code stands for code * scale + offset, which kernels multiply with as it is. torchao's own linears first round it to
the dtype of the artifact: of a model in bfloat16 that moves the loss in its fourth digit.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from qserve.checkpoint.contents import Checkpoint
from qserve.checkpoint.load import load_model, open_weights
from qserve.quant.read import read_tensor
from qserve.quant.weight import ActivationQuantization, QuantizedWeight
from training.qat.activations import round_activations


def load_for_measuring(checkpoint: Checkpoint) -> nn.Module:
    """The model in float32 and in evaluation mode, float or quantized."""
    model = load_model(checkpoint, dtype=torch.float32)
    weights = open_weights(checkpoint)
    for name, info in checkpoint.tensors.items():
        if info.is_quantized:
            weight = weights[name]
            assert isinstance(weight, QuantizedWeight)
            _stand_for(model.get_submodule(name.removesuffix(".weight")), weight)
    return model


def make_measurable(model: nn.Module) -> None:
    """A model of torchao's tensors becomes, in place, one that can be measured as `load_for_measuring` gives it."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            weight = read_tensor(name, module.weight.detach())
            if isinstance(weight, QuantizedWeight):
                _stand_for(module, weight)
    cast(model, torch.float32)


def cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Parameters alone: buffers such as the rotary frequencies stay as exact as they are."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def values_of(weight: QuantizedWeight) -> Tensor:
    """What the codes stand for, in float32."""
    return replace(weight, dtype=torch.float32).dequantize()


def _stand_for(module: nn.Module, weight: QuantizedWeight) -> None:
    module.weight = nn.Parameter(values_of(weight), requires_grad=False)
    if weight.activation is not ActivationQuantization.NONE:
        module.register_forward_pre_hook(_Rounding(weight.activation))


class _Rounding:
    def __init__(self, kind: ActivationQuantization) -> None:
        self.kind = kind

    def __call__(self, _: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (round_activations(inputs[0], self.kind), *inputs[1:])
