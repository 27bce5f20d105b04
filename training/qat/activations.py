"""Rounding activations as a quantized linear does, one set of scales for each token, with the gradient passed through.

Knows no weights and no recipes. Training puts it before a linear; `training.artifact` does the same to evaluate.
"""

import weakref
from collections.abc import Callable

import torch
from torch import Tensor, nn

from qserve.errors import UsageError
from qserve.quant.weight import ActivationQuantization
from training.qat.switch import Switch


class ActivationRounder(nn.Module):
    """Rounds an input once, however many linears take it: the projections of one block share a rounder.

    The last input and its result are remembered only as long as somebody else holds them.
    """

    def __init__(self, kind: ActivationQuantization, switch: Switch) -> None:
        super().__init__()
        self.kind = kind
        self.switch = switch
        self.num_calls = 0
        self._last: tuple[weakref.ref[Tensor], weakref.ref[Tensor], tuple[int, bool]] | None = None

    def forward(self, inputs: Tensor) -> Tensor:
        if not self.switch.is_on:
            return inputs
        self.num_calls += 1
        state = (inputs._version, torch.is_grad_enabled())
        if self._last is not None and self._last[0]() is inputs and self._last[2] == state:
            known = self._last[1]()
            if known is not None:
                return known
        rounded = _pass_through(inputs, self.kind)
        self._last = (weakref.ref(inputs), weakref.ref(rounded), state)
        return rounded


def round_activations(inputs: Tensor, kind: ActivationQuantization) -> Tensor:
    """(..., features) -> the same, on the grid that each token's own range gives. Computes in float32."""
    if kind not in _ROUNDINGS:
        raise UsageError(
            f"activations quantized as {kind} cannot be computed here; known are {', '.join(_ROUNDINGS)}. "
            "Evaluate this model with --through qserve"
        )
    return _ROUNDINGS[kind](inputs.float()).to(inputs.dtype)


class _PassThrough(torch.autograd.Function):
    """Rounded going forward; going backward as if nothing had happened."""

    @staticmethod
    def forward(_: object, inputs: Tensor, kind: ActivationQuantization) -> Tensor:
        return round_activations(inputs, kind)

    @staticmethod
    def backward(_: object, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


_pass_through: Callable[..., Tensor] = _PassThrough.apply


def _int8_asymmetric(inputs: Tensor) -> Tensor:
    low = inputs.amin(-1, keepdim=True).clamp_(max=0)
    high = inputs.amax(-1, keepdim=True).clamp_(min=0)
    scales = (high - low).div_(255).clamp_(min=torch.finfo(torch.float32).tiny)
    zero = (-128 - (low / scales).round_()).clamp_(-128, 127)
    # Clamping code + zero to int8 and taking zero off again is clamping the code to bounds that zero has moved.
    return inputs.mul(scales.reciprocal()).round_().clamp_(-128 - zero, 127 - zero).mul_(scales)


def _int8_symmetric(inputs: Tensor) -> Tensor:
    scales = inputs.abs().amax(-1, keepdim=True).div_(127.5).clamp_(min=torch.finfo(torch.float32).eps)
    return inputs.mul(scales.reciprocal()).round_().clamp_(-128, 127).mul_(scales)


def _float8(inputs: Tensor) -> Tensor:
    limit = torch.finfo(torch.float8_e4m3fn).max
    scales = inputs.abs().amax(-1, keepdim=True).div_(limit)
    # A token of zeros has the scale 0: torchao divides by it and would make NaN of every zero.
    codes = inputs.div(scales.clamp(min=torch.finfo(torch.float32).tiny)).clamp_(-limit, limit)
    return codes.to(torch.float8_e4m3fn).float().mul_(scales)


_ROUNDINGS: dict[ActivationQuantization, Callable[[Tensor], Tensor]] = {
    ActivationQuantization.INT8_ASYMMETRIC: _int8_asymmetric,
    ActivationQuantization.INT8_SYMMETRIC: _int8_symmetric,
    ActivationQuantization.FLOAT8: _float8,
}
