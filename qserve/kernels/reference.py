"""Every stage in plain torch: the oracle of the compiled kernels, and what runs where they cannot be built.

Runs on any device that torch knows. Weights are dequantized once, when they are packed, so a quantized model computes
here as a float one: right, and no faster. `reference_integer.py` has the exact formula that integer kernels must meet
bit for bit, `reference_attention.py` the paged attention.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from qserve.kernels.linear import Linear, join_biases, join_weights, look_up, moved
from qserve.kernels.ops import Activation, AttentionSpec, Batch, CacheLayer, Norm, NormKind, Rotary
from qserve.kernels.reference_activations import ROUND_TRIPS
from qserve.kernels.reference_attention import attend_paged, rotate, split_heads, store
from qserve.kernels.reference_sampling import sample
from qserve.quant.weight import ActivationQuantization, Weight

ACTIVATIONS: Mapping[Activation, Callable[[Tensor], Tensor]] = {
    Activation.SILU: F.silu,
    Activation.GELU: F.gelu,
    Activation.GELU_TANH: lambda x: F.gelu(x, approximate="tanh"),
    Activation.RELU: F.relu,
}


def normalize(x: Tensor, norm: Norm | None) -> Tensor:
    """The norm of each row, in float32; x itself where there is no norm."""
    if norm is None:
        return x
    if norm.kind is NormKind.LAYER:
        return F.layer_norm(x, norm.weight.shape, norm.weight, norm.bias, norm.eps)
    y = x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + norm.eps) * norm.weight
    return y if norm.bias is None else y + norm.bias


class Part(Protocol):
    """Weights that prepare their input in the same way: (tokens, in_features) -> (tokens, out_features), float32."""

    @property
    def shape(self) -> tuple[int, int]: ...  # (out_features, in_features)
    @property
    def nbytes(self) -> int: ...
    @property
    def kernel(self) -> str: ...
    def __call__(self, x: Tensor) -> Tensor: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class _Dequantized:
    values: Tensor  # (out_features, in_features)
    pre_scale: Tensor | None
    activation: ActivationQuantization
    kernel: str = "torch"

    @property
    def shape(self) -> tuple[int, int]:
        out_features, in_features = self.values.shape
        return out_features, in_features

    @property
    def nbytes(self) -> int:
        return self.values.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        if self.pre_scale is not None:
            x = x * self.pre_scale
        return F.linear(ROUND_TRIPS[self.activation](x), self.values.to(torch.float32))


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceLinear:
    """Weights side by side, one part for each way of preparing the input."""

    parts: tuple[Part, ...]
    bias: Tensor | None

    @property
    def kernel(self) -> str:
        return "+".join(dict.fromkeys(part.kernel for part in self.parts))

    @property
    def in_features(self) -> int:
        return self.parts[0].shape[1]

    @property
    def out_features(self) -> int:
        return sum(part.shape[0] for part in self.parts)

    @property
    def num_bytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    def __call__(self, x: Tensor) -> Tensor:
        outputs = [part(x) for part in self.parts]
        y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
        return y if self.bias is None else y + self.bias


class ReferenceOps:
    """The stages of `ops.Ops` in plain torch."""

    def __init__(self, *, device: torch.device, is_compact: bool = False) -> None:
        self._device = device
        self._is_compact = is_compact  # keep weights in their own dtype and widen them at every call: slower, smaller

    def pack(
        self, weights: Sequence[Weight], *, biases: Sequence[Tensor | None], is_gated: bool = False
    ) -> ReferenceLinear:
        bias = join_biases(weights, biases)
        return ReferenceLinear(
            parts=tuple(self._pack_part(weight) for weight in join_weights(weights)),
            bias=None if bias is None else bias.to(self._device),
        )

    def keep(self, table: Weight) -> Weight:
        return moved(table, lambda part: part.to(self._device))

    def run_step(self, forward: Callable[[], Tensor], batch: Batch, cache: object) -> Tensor:
        return forward()

    def embed(self, token_ids: Tensor, table: Weight, *, scale: float) -> Tensor:
        rows = look_up(table, token_ids)
        rows = rows.to(torch.float32)
        return rows if scale == 1.0 else rows * scale

    def norm_linear(self, x: Tensor, norm: Norm | None, linear: Linear) -> Tensor:
        return _apply(linear, self._normalize(x, norm))

    def gated_linear(self, x: Tensor, norm: Norm | None, linear: Linear, *, activation: Activation) -> Tensor:
        gate, up = self.norm_linear(x, norm, linear).chunk(2, dim=-1)
        return ACTIVATIONS[activation](gate) * up

    def rotate_and_store(
        self, qkv: Tensor, attention: AttentionSpec, rotary: Rotary | None, batch: Batch, cache: CacheLayer
    ) -> None:
        queries, keys, values = split_heads(qkv, attention)
        queries.copy_(normalize_heads(queries, attention.query_norm))
        keys.copy_(normalize_heads(keys, attention.key_norm))
        if rotary is not None:
            cos, sin = rotary.cos[batch.positions], rotary.sin[batch.positions]  # (tokens, half)
            rotate(queries, cos, sin)
            rotate(keys, cos, sin)
        store(keys, values, batch.slots, cache)

    def attend(self, qkv: Tensor, attention: AttentionSpec, batch: Batch, cache: CacheLayer) -> Tensor:
        queries, _, _ = split_heads(qkv, attention)
        return attend_paged(queries, attention, batch, cache)

    def linear_add(
        self, x: Tensor, linear: Linear, residual: Tensor, *, post_norm: Norm | None = None, multiplier: float = 1.0
    ) -> Tensor:
        y = self._normalize(_apply(linear, x), post_norm)
        return residual + (y if multiplier == 1.0 else y * multiplier)

    def head(
        self, x: Tensor, norm: Norm | None, linear: Linear, *, scale: float = 1.0, soft_cap: float | None = None
    ) -> Tensor:
        logits = _apply(linear, self._normalize(x, norm))
        logits = logits if scale == 1.0 else logits * scale
        return logits if soft_cap is None else torch.tanh(logits / soft_cap) * soft_cap

    def sample(self, logits: Tensor, draws: Tensor, allowed: Sequence[bytes | None] | None = None) -> Tensor:
        return sample(logits, draws, allowed)

    def _normalize(self, x: Tensor, norm: Norm | None) -> Tensor:
        return normalize(x, norm)

    def _pack_part(self, weight: Weight) -> Part:
        pre_scale = None if isinstance(weight, Tensor) else weight.pre_scale
        return _Dequantized(
            values=(_values(weight) if self._is_compact else _values(weight).to(torch.float32)).to(self._device),
            pre_scale=None if pre_scale is None else pre_scale.to(self._device, torch.float32),
            activation=ActivationQuantization.NONE if isinstance(weight, Tensor) else weight.activation,
        )


def _apply(linear: Linear, x: Tensor) -> Tensor:
    assert isinstance(linear, ReferenceLinear), type(linear)
    return linear(x)


def _values(weight: Weight) -> Tensor:
    """Code times scale as it is, in float32: compiled kernels never round it to the weight's own dtype."""
    if isinstance(weight, Tensor):
        return weight
    return replace(weight, dtype=torch.float32).dequantize()


def normalize_heads(heads: Tensor, norm: Norm | None) -> Tensor:
    """Over each head, or over all of them where the norm is as wide: (tokens, heads, head_dim)."""
    if norm is None or norm.weight.numel() == heads.shape[-1]:
        return normalize(heads, norm)
    return normalize(heads.flatten(1), norm).view(heads.shape)
