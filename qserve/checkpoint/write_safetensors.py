"""Writing one safetensors file: always the same bytes for the same tensors, and no second copy of them in memory.

The format's own library writes its metadata in a random order. Knows nothing of what the tensors mean.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qserve.checkpoint.read_safetensors import DTYPES

_WORDS = {dtype: word for word, dtype in DTYPES.items()}
_ALIGNMENT = 8


def write_safetensors(file: Path, tensors: Mapping[str, Tensor], *, metadata: Mapping[str, str]) -> None:
    """Tensors may be views of each other and of any strides; each is written whole."""
    # Wide numbers first, so that every tensor is aligned to its own numbers.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name in names:
        begin, end = end, end + tensors[name].nbytes
        entries[name] = {
            "dtype": _WORDS[tensors[name].dtype],
            "shape": _shape(tensors[name]),
            "data_offsets": [begin, end],
        }
    header = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    header += b" " * (-len(header) % _ALIGNMENT)
    with file.open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little"))
        stream.write(header)
        for name in names:
            stream.write(_bytes(tensors[name]))


def _shape(tensor: Tensor) -> list[int]:
    shape = list(tensor.shape)
    if tensor.dtype == torch.float4_e2m1fn_x2:  # the file counts values, torch pairs of them
        shape[-1] *= 2
    return shape


def _bytes(tensor: Tensor) -> memoryview:
    raw: Any = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return memoryview(raw)
