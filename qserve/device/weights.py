"""A checkpoint's tensors as a decoder asks for them: checked against the shapes that config.json implies.

Knows names and shapes, and nothing of what the tensors mean or where they lie.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from qserve.errors import BrokenCheckpoint
from qserve.quant.weight import Weight

_PREFIXES = ("model.", "model.language_model.", "language_model.model.", "")
_HEADS = ("lm_head.weight", "language_model.lm_head.weight", "model.lm_head.weight")


class NamedWeights:
    """Gives out each tensor once it has the shape that was expected, and remembers which were asked for."""

    def __init__(self, weights: Mapping[str, Weight]) -> None:
        self._weights = weights
        self._asked: set[str] = set()
        self.prefix = next((prefix for prefix in _PREFIXES if f"{prefix}norm.weight" in weights), _PREFIXES[0])

    @property
    def head_name(self) -> str | None:
        return next((name for name in _HEADS if name in self._weights), None)

    @property
    def embedding_name(self) -> str | None:
        name = f"{self.prefix}embed_tokens.weight"
        return name if name in self._weights else None

    def weight(self, name: str, shape: tuple[int, ...]) -> Weight:
        if name not in self._weights:
            raise BrokenCheckpoint(
                f"{name} is missing; config.json expects it with shape {shape}. Download the checkpoint again, whole."
            )
        self._asked.add(name)
        weight = self._weights[name]
        if tuple(weight.shape) != shape:
            raise BrokenCheckpoint(
                f"{name} has shape {tuple(weight.shape)}, but config.json implies {shape}."
                " The two are not of one model: take both from the same source."
            )
        return weight

    def vector(self, name: str, size: int, *, device: torch.device) -> Tensor:
        """A norm's weight or a bias, in float32."""
        weight = self.weight(name, (size,))
        assert isinstance(weight, Tensor), f"{name} is quantized"
        return weight.to(device, torch.float32)

    def check_layers(self) -> None:
        """A layer's tensor that nobody asked for would silently change what the model says."""
        start = f"{self.prefix}layers."
        unread = [
            name
            for name in self._weights
            if name.startswith(start) and name not in self._asked and not name.endswith("rotary_emb.inv_freq")
        ]
        if unread:
            raise BrokenCheckpoint(
                f"{len(unread)} tensors of the layers have no place in the model that config.json describes, the first"
                f" is {sorted(unread)[0]}. The two are not of one model: take both from the same source."
            )
