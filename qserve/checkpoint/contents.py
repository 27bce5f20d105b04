"""What a checkpoint holds, as its headers and config tell it: the result of `detect`. Reads no file itself."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from qserve.quant.recipe import Recipe

PLAIN = "Tensor"  # torchao's own word, in its safetensors metadata, for a tensor that is not quantized


class Tier(StrEnum):
    """Which evidence says how the tensors are quantized, the strongest first."""

    TENSORS = "tensors"  # the tensor objects of .bin shards
    METADATA = "metadata"  # the `__metadata__` of safetensors shards
    CONFIG = "config"  # quantization_config of config.json
    NONE = "none"  # nothing says that anything is quantized


_BITS = {
    **{f"torch.int{bits}": bits for bits in range(1, 9)},
    "float4": 4,
    "fp6": 6,
    "Int4": 4,
    "NVFP4": 4,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """One array of numbers in one file."""

    file: Path
    key: str  # its name in the file
    dtype: torch.dtype
    shape: tuple[int, ...]
    num_bytes: int
    offset: int = 0  # from the beginning of the file; a .bin file finds its tensors by key alone


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """One named tensor of a model: a single stored tensor, or the parts of a quantized weight."""

    name: str
    class_name: str = PLAIN  # of torchao's tensor
    dtype: torch.dtype  # of the values
    shape: tuple[int, ...]  # of the values
    parts: Mapping[str, StoredTensor]  # by torchao's names: qdata, scale, ...; a plain tensor is one part
    attributes: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def is_quantized(self) -> bool:
        return self.class_name != PLAIN

    @property
    def num_bytes(self) -> int:
        return sum(part.num_bytes for part in self.parts.values())

    @property
    def num_values(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def bits(self) -> int:
        """Of one code as the class stores it."""
        element = str(self.attributes.get("target_dtype") or self.attributes.get("elem_dtype") or self.class_name)
        return next((bits for word, bits in _BITS.items() if word in element), 8)

    @property
    def group_size(self) -> int:
        """Values along the last dimension that share a scale."""
        block = self.attributes.get("block_size")
        if isinstance(block, int):
            return block
        if block:
            return int(block[-1])
        scale = self.parts["scale"].shape
        return self.shape[-1] // scale[-1] if len(scale) == len(self.shape) else self.shape[-1]

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(sorted({part.file for part in self.parts.values()}))


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A directory that can be loaded, and everything that is known of it before its weights are read."""

    path: Path
    home: Path  # where config.json lies, and with it the tokenizer: `path`, or a folder above it
    config: Mapping[str, Any]
    format: str  # "safetensors" or "bin"
    files: tuple[Path, ...]
    tensors: Mapping[str, TensorInfo]
    recipe: Recipe | None
    tier: Tier
    evidence: str  # in words: what was found, and where
    warnings: tuple[str, ...] = ()

    @property
    def is_quantized(self) -> bool:
        return any(info.is_quantized for info in self.tensors.values())

    @property
    def num_bytes(self) -> int:
        return sum(info.num_bytes for info in self.tensors.values())


def plain(stored: StoredTensor, *, name: str) -> TensorInfo:
    return TensorInfo(name=name, dtype=stored.dtype, shape=stored.shape, parts={"data": stored})


def quantized(
    name: str, *, class_name: str, parts: Mapping[str, StoredTensor], attributes: Mapping[str, Any]
) -> TensorInfo:
    return TensorInfo(
        name=name,
        class_name=class_name,
        dtype=_value_dtype(parts, attributes),
        shape=_value_shape(class_name, parts=parts, attributes=attributes),
        parts=parts,
        attributes=attributes,
    )


def _value_dtype(parts: Mapping[str, StoredTensor], attributes: Mapping[str, Any]) -> torch.dtype:
    """Classes that do not write the dtype of their values take it from their scales."""
    written = attributes.get("dtype") or attributes.get("orig_dtype")
    if isinstance(written, torch.dtype):
        return written
    scale = parts.get("scale") or parts.get("scale_and_zero")
    return scale.dtype if scale else torch.bfloat16


def _value_shape(
    class_name: str, *, parts: Mapping[str, StoredTensor], attributes: Mapping[str, Any]
) -> tuple[int, ...]:
    if "shape" in attributes:
        return tuple(attributes["shape"])
    shape = parts["qdata"].shape
    element = attributes.get("elem_dtype")
    if class_name == "NVFP4Tensor" or element == torch.float4_e2m1fn_x2:
        return (*shape[:-1], shape[-1] * 2)  # two values a byte
    return (*shape[:-1], shape[-1] * 4 // 3) if element in ("fp6_e2m3", "fp6_e3m2") else shape
