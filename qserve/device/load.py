"""From a config.json and its tensors to a model that runs: the decoder where the family is known, else the fallback.

Knows no files: `weights` gives each tensor when it is asked for.
"""

from collections.abc import Mapping
from typing import Any

import torch

from qserve.device.architectures import read_spec
from qserve.device.decoder import load_decoder
from qserve.device.fallback import load_fallback
from qserve.device.runner import Model
from qserve.kernels.ops import Ops
from qserve.quant.weight import Weight

_LIMITS = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx")


def model_limit(config: Mapping[str, Any]) -> int | None:
    """The longest context that config.json allows, by whatever name; None where it does not say."""
    spec = read_spec(config)
    if spec is not None:
        return spec.max_position_embeddings
    text = config.get("text_config", config)
    return next((text[key] for key in _LIMITS if isinstance(text.get(key), int)), None)


def load_model(
    config: Mapping[str, Any],
    weights: Mapping[str, Weight],
    *,
    ops: Ops,
    device: torch.device,
    max_positions: int,
) -> Model:
    """Pack the weights of the model that config.json describes, for contexts of up to `max_positions`."""
    spec = read_spec(config)
    if spec is None:
        return load_fallback(config, weights, ops=ops, device=device, max_positions=max_positions)
    return load_decoder(spec, weights, ops=ops, device=device, max_positions=max_positions)
