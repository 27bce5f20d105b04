"""Rotary embeddings: from the configuration's parameters to a table of cosines and sines by position.

Frequencies are fixed when the model is loaded, for the longest context it will be served with, because cached keys are
shared between requests and cannot turn once they are stored. Two scalings of transformers look at the length of the
text instead, and meet ours there: `longrope` (its long factors serve when the context may exceed the original one) and
`dynamic` (its base is stretched for the longest context, as transformers stretches it for a text that long).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qserve.errors import BrokenCheckpoint, UnsupportedArchitecture
from qserve.kernels.ops import Rotary


@dataclass(frozen=True, slots=True, kw_only=True)
class RotarySpec:
    """One set of frequencies: `parameters` holds what its type needs beside, checked to be there."""

    kind: str
    theta: float
    dim: int  # how many columns of a head turn
    max_position_embeddings: int
    parameters: Mapping[str, Any]

    def get(self, name: str, default: Any = None) -> Any:
        value = self.parameters.get(name)
        return default if value is None else value


def parse_rotary(
    parameters: Mapping[str, Any], *, theta: float, head_dim: int, partial: float, max_position_embeddings: int
) -> RotarySpec:
    """From `rope_parameters` of transformers 5 or the older `rope_scaling`; what it leaves out is given beside."""
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if parameters.get("short_factor"):  # Phi-3 has called it su and yarn before
        kind = "longrope"
    if kind not in _FREQUENCIES:
        known = ", ".join(sorted(_FREQUENCIES))
        raise UnsupportedArchitecture(
            f"rotary scaling {kind!r} is not known; expected one of {known}. Serve a model with one of these."
        )
    missing = [name for name in _REQUIRED.get(kind, ()) if parameters.get(name) is None]
    if missing:
        raise BrokenCheckpoint(
            f"config.json: rotary scaling {kind!r} lacks {', '.join(missing)}. Restore it from the model's source."
        )
    return RotarySpec(
        kind=kind,
        theta=float(parameters.get("rope_theta") or theta),
        dim=int(head_dim * (parameters.get("partial_rotary_factor") or partial)),
        max_position_embeddings=max_position_embeddings,
        parameters={"original_max_position_embeddings": max_position_embeddings, **parameters},
    )


def make_rotary(spec: RotarySpec, *, max_positions: int, device: torch.device) -> Rotary:
    """The table for positions below `max_positions`."""
    frequencies, attention_factor = _FREQUENCIES[spec.kind](spec, max_positions)
    angles = torch.arange(max_positions, dtype=torch.float32).unsqueeze(1) * frequencies  # (positions, half)
    return Rotary(
        cos=(angles.cos() * attention_factor).to(device),
        sin=(angles.sin() * attention_factor).to(device),
    )


def _inverse(theta: float, dim: int) -> Tensor:
    return 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))


def _default(spec: RotarySpec, max_positions: int) -> tuple[Tensor, float]:
    return _inverse(spec.theta, spec.dim), 1.0


def _linear(spec: RotarySpec, max_positions: int) -> tuple[Tensor, float]:
    return _inverse(spec.theta, spec.dim) / spec.parameters["factor"], 1.0


def _dynamic(spec: RotarySpec, max_positions: int) -> tuple[Tensor, float]:
    """NTK-aware: the base grows with the context, so that the slowest frequency still spans it."""
    factor = spec.parameters["factor"]
    ratio = max(max_positions, spec.max_position_embeddings) / spec.max_position_embeddings
    theta = spec.theta * (factor * ratio - (factor - 1)) ** (spec.dim / (spec.dim - 2))
    return _inverse(theta, spec.dim), 1.0


def _yarn(spec: RotarySpec, max_positions: int) -> tuple[Tensor, float]:
    """YaRN (arXiv 2309.00071, section 3.2): fast frequencies stay, slow ones are interpolated, a ramp between."""
    original = spec.parameters["original_max_position_embeddings"]
    factor = spec.get("factor", spec.max_position_embeddings / original)

    def dimension(rotations: float) -> float:
        return spec.dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(spec.theta))

    low, high = dimension(spec.get("beta_fast", 32)), dimension(spec.get("beta_slow", 1))
    if spec.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, spec.dim - 1)
    width = high - low or 0.001
    ramp = ((torch.arange(spec.dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    powers = spec.theta ** (torch.arange(0, spec.dim, 2, dtype=torch.float32) / spec.dim)
    frequencies = ramp / (factor * powers) + (1 - ramp) / powers
    return frequencies, _yarn_attention_factor(spec, factor)


def _yarn_attention_factor(spec: RotarySpec, factor: float) -> float:
    def mscale(weight: float = 1.0) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    given = spec.get("attention_factor")
    if given is not None:
        return float(given)
    if spec.get("mscale") and spec.get("mscale_all_dim"):
        return mscale(spec.parameters["mscale"]) / mscale(spec.parameters["mscale_all_dim"])
    return mscale()


def _longrope(spec: RotarySpec, max_positions: int) -> tuple[Tensor, float]:
    """LongRoPE (arXiv 2402.13753): each frequency has its own factor, one set for long contexts and one for short."""
    original = spec.parameters["original_max_position_embeddings"]
    factor = spec.get("factor", spec.max_position_embeddings / original)
    attention_factor = spec.get("attention_factor")
    if attention_factor is None:
        attention_factor = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    factors = spec.parameters["long_factor" if max_positions > original else "short_factor"]
    if len(factors) != (spec.dim + 1) // 2:
        raise BrokenCheckpoint(
            f"config.json: longrope has {len(factors)} factors, expected {(spec.dim + 1) // 2}, one for each pair of"
            " columns that turn. Restore config.json from the model's source."
        )
    powers = spec.theta ** (torch.arange(0, spec.dim, 2, dtype=torch.float32) / spec.dim)
    return 1.0 / (torch.tensor(factors, dtype=torch.float32) * powers), float(attention_factor)


def _llama3(spec: RotarySpec, max_positions: int) -> tuple[Tensor, float]:
    """Llama 3.1: wavelengths longer than the original context are stretched, shorter ones stay, a ramp between."""
    factor = spec.parameters["factor"]
    low, high = spec.parameters["low_freq_factor"], spec.parameters["high_freq_factor"]
    original = spec.parameters["original_max_position_embeddings"]
    frequencies = _inverse(spec.theta, spec.dim)
    wavelengths = 2 * math.pi / frequencies
    smooth = (original / wavelengths - low) / (high - low)
    ramped = (1 - smooth) * frequencies / factor + smooth * frequencies
    is_long, is_short = wavelengths > original / low, wavelengths < original / high
    return torch.where(is_long, frequencies / factor, torch.where(is_short, frequencies, ramped)), 1.0


_FREQUENCIES: Mapping[str, Callable[[RotarySpec, int], tuple[Tensor, float]]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "longrope": _longrope,
    "llama3": _llama3,
}

_REQUIRED: Mapping[str, tuple[str, ...]] = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "longrope": ("short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
