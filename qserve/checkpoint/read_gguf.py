"""Reading GGUF: named float tensors in transformers' naming, the config, and the file's metadata.

A GGUF is not served as it is: `qserve-train import` makes a checkpoint of it. Knows no tokenizers; the metadata that
describes one is handed on.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader, ReaderTensor
from gguf.quants import dequantize
from torch import Tensor

from qserve.checkpoint.gguf_families import Facts, Family, family_of, make_config
from qserve.checkpoint.shards import listing
from qserve.errors import BrokenCheckpoint, UnsupportedWeight

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_ROPE_FACTORS = ("rope_freqs", "rope_factors_long", "rope_factors_short")


class GGUFTensors(Mapping[str, Tensor]):
    """The float32 values of each tensor by transformers' name, dequantized when asked for; nothing is kept."""

    def __init__(self, stored: Mapping[str, ReaderTensor], *, family: Family, config: Mapping[str, Any]) -> None:
        self._stored = stored
        self._family = family
        self._config = config

    def __getitem__(self, name: str) -> Tensor:
        values = _values(self._stored[name])
        if self._family.norm_offset and name.endswith("norm.weight"):
            return values - self._family.norm_offset
        heads = self._interleaved_heads(name)
        return _halves(values, heads=heads) if heads else values

    def __contains__(self, name: object) -> bool:
        return name in self._stored

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)

    def _interleaved_heads(self, name: str) -> int:
        """The number of heads whose rows of this tensor must be put in another order; 0 for none."""
        if not self._family.interleaves_rotary:
            return 0
        for projection, key in ((".q_proj.", "num_attention_heads"), (".k_proj.", "num_key_value_heads")):
            if projection in name:
                return int(self._config[key])
        return 0


@dataclass(frozen=True, slots=True, kw_only=True)
class GGUFModel:
    """One GGUF file."""

    config: Mapping[str, Any]  # what config.json says of this model
    tensors: Mapping[str, Tensor]  # by transformers' names
    metadata: Mapping[str, Any]  # all keys of the file as plain values, the tokenizer's among them
    type_counts: Mapping[str, int]  # how many tensors the file stores in each of GGUF's types


def read_gguf(file: Path) -> GGUFModel:
    """Maps the file and reads its metadata; tensors are dequantized later, one by one."""
    reader = _open(file)
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    family = family_of(metadata)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    if "token_embd.weight" not in tensors:
        raise BrokenCheckpoint(f"{file} has no token_embd.weight; expected all tensors of a model in one file")
    facts = Facts(
        vocab_size=int(tensors["token_embd.weight"].shape[1]),
        is_tied="output.weight" not in tensors,
        has_query_bias="blk.0.attn_q.bias" in tensors,
        rope_factors={
            name: _values(tensors[f"{name}.weight"]).tolist() for name in _ROPE_FACTORS if f"{name}.weight" in tensors
        },
    )
    config = make_config(metadata, family=family, facts=facts)
    named = _named(tensors, family=family, file=file)
    return GGUFModel(
        config=config,
        tensors=GGUFTensors(named, family=family, config=config),
        metadata=metadata,
        type_counts=Counter(tensor.tensor_type.name for tensor in reader.tensors),
    )


def _open(file: Path) -> GGUFReader:
    try:
        return GGUFReader(file)
    except (ValueError, IndexError, KeyError, OSError) as error:
        size = f" ({file.stat().st_size} bytes)" if file.is_file() else ""
        raise BrokenCheckpoint(f"{file}{size} is no whole GGUF file ({error}); copy or download it again") from error


def _named(tensors: Mapping[str, ReaderTensor], *, family: Family, file: Path) -> dict[str, ReaderTensor]:
    named = {name: _transformers_name(name, family) for name in tensors}
    unknown = [name for name, ours in named.items() if ours is None and name.split(".")[0] not in _ROPE_FACTORS]
    if unknown:
        raise UnsupportedWeight(
            f"{file} holds tensors that a {family.model_type} model has no place for: {listing(unknown)}. "
            f"Start from the model's own checkpoint instead"
        )
    return {ours: tensors[name] for name, ours in named.items() if ours is not None}


def _transformers_name(name: str, family: Family) -> str | None:
    """blk.3.attn_q.weight -> model.layers.3.self_attn.q_proj.weight"""
    stem, _, kind = name.rpartition(".")
    if stem in _TOP:
        return f"{_TOP[stem]}.{kind}"
    if not stem.startswith("blk."):
        return None
    _, layer, inner = stem.split(".", 2)
    ours = family.layer_name(inner)
    return f"model.layers.{layer}.{ours}.{kind}" if ours else None


def _values(tensor: ReaderTensor) -> Tensor:
    """Float32, in memory of its own: what the reader gives is a view of the mapped file."""
    try:
        return torch.tensor(dequantize(tensor.data, tensor.tensor_type))
    except NotImplementedError as error:
        raise UnsupportedWeight(
            f"{tensor.name} is stored as {tensor.tensor_type.name}, which the gguf library cannot dequantize; "
            f"take a file in another quantization"
        ) from error


def _halves(values: Tensor, *, heads: int) -> Tensor:
    """Within each head: rows (0, 1), (2, 3), ... that rotate together -> (0, n/2), (1, n/2 + 1), ..."""
    pairs = values.view(heads, -1, 2, *values.shape[1:])  # (heads, head_dim / 2, 2, ...)
    return pairs.transpose(1, 2).reshape(values.shape)
