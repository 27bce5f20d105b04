"""Loading: the named weights of a checkpoint, read when they are asked for, and whole models of transformers."""

import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qserve.checkpoint import read_bin, read_safetensors
from qserve.checkpoint.contents import Checkpoint
from qserve.checkpoint.shards import listing
from qserve.errors import BrokenCheckpoint, UnsupportedArchitecture
from qserve.quant.weight import QuantizedWeight, Weight

log = logging.getLogger(__name__)

READERS = {"safetensors": read_safetensors.reader, "bin": read_bin.reader}


class Weights(Mapping[str, Weight]):
    """The weights of a checkpoint by name. Asking reads: what is asked for twice is read twice, nothing is kept.

    A plain tensor is a view of the mapped file, so its bytes are read when they are used; a quantized weight is read
    into its canonical form. No tensor is invented: a tied head is absent where the files do not hold it.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._read = READERS[checkpoint.format](checkpoint.tensors)

    def __getitem__(self, name: str) -> Weight:
        return self._read(self._checkpoint.tensors[name])  # KeyError where there is none

    def __contains__(self, name: object) -> bool:
        return name in self._checkpoint.tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._checkpoint.tensors)

    def __len__(self) -> int:
        return len(self._checkpoint.tensors)


def open_weights(checkpoint: Checkpoint) -> Weights:
    return Weights(checkpoint)


def load_model(checkpoint: Checkpoint, *, dtype: torch.dtype | None = None) -> nn.Module:
    """A causal LM of transformers' own class, in evaluation mode, with every parameter and buffer in place.

    Quantized weights are dequantized. `dtype` is of the float tensors; by default as they are stored. Plain tensors of
    that dtype stay views of the mapped files: writing to them is safe and reaches no file.
    """
    model_class, config = _model_class(checkpoint)
    model, loading = model_class.from_pretrained(
        None,
        config=config,
        state_dict={name: _float(weight, dtype) for name, weight in open_weights(checkpoint).items()},
        dtype=dtype or "auto",
        ignore_mismatched_sizes=True,  # they are told below, with our words
        output_loading_info=True,
    )
    _require_complete(checkpoint, loading)
    _require_nothing_on_meta(model)
    return model.eval()  # type: ignore[no-any-return]


def _model_class(checkpoint: Checkpoint) -> tuple[Any, Any]:
    """Transformers' class for this model, and its config."""
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING  # takes seconds

    model_type = checkpoint.config["model_type"]
    if model_type not in CONFIG_MAPPING:
        raise UnsupportedArchitecture(f"{checkpoint.path}: transformers knows no model of type {model_type!r}")
    # Without the quantization, or transformers would read the files its own way.
    told = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    config = CONFIG_MAPPING[model_type].from_dict(told)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UnsupportedArchitecture(f"{checkpoint.path}: {model_type!r} is no causal language model in transformers")
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    return model_class, config


def _float(weight: Weight, dtype: torch.dtype | None) -> Tensor:
    values = weight.dequantize() if isinstance(weight, QuantizedWeight) else weight
    return values.to(dtype) if dtype and values.is_floating_point() else values


def _require_complete(checkpoint: Checkpoint, loading: Mapping[str, Any]) -> None:
    if loading["missing_keys"]:
        raise BrokenCheckpoint(
            f"{checkpoint.path} lacks tensors that its architecture needs: {listing(sorted(loading['missing_keys']))}. "
            f"Copy or download it again"
        )
    if loading["mismatched_keys"]:
        found = [f"{name} is {list(ours)}, not {list(theirs)}" for name, ours, theirs in loading["mismatched_keys"]]
        raise BrokenCheckpoint(
            f"{checkpoint.path}: shapes are not those of its config.json: {listing(sorted(found))}. "
            f"Take config and weights from one place"
        )
    if loading["unexpected_keys"]:
        log.warning("%s: not used by the model: %s", checkpoint.path, listing(sorted(loading["unexpected_keys"])))


def _require_nothing_on_meta(model: nn.Module) -> None:
    tensors = (*model.named_parameters(), *model.named_buffers())
    left = [name for name, tensor in tensors if tensor.is_meta]
    assert not left, f"never filled: {listing(left)}"
