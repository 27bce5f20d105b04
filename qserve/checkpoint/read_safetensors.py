"""Reading safetensors: headers first, then single tensors straight out of the mapped file.

The file is parsed here, so that a truncated one is found from its size and no byte is copied. Torchao's flattened form
(`X.weight` as `X._weight_qdata`, `X._weight_scale`, ... with class and attributes in the file's metadata) is put
together again over all shards, without torchao.
"""

import json
import mmap
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qserve.checkpoint.contents import PLAIN, StoredTensor, TensorInfo, plain, quantized
from qserve.checkpoint.shards import listing
from qserve.errors import BrokenCheckpoint, UnsupportedWeight
from qserve.quant.read import attributes_from_json, read_weight
from qserve.quant.weight import Weight

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F4": torch.float4_e2m1fn_x2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_PART = re.compile(r"\._\w+_(qdata|scale|zero_point|scale_and_zero|per_tensor_scale|act_pre_scale)$")


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What the beginning of one safetensors file says."""

    tensors: Mapping[str, StoredTensor]
    metadata: Mapping[str, str]


def read_header(file: Path) -> Header:
    """The header of `file`; raises BrokenCheckpoint where the file is cut short or is no safetensors file."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
            raise BrokenCheckpoint(f"{file} ({size} bytes) is cut short within its header; copy or download it again")
        raw = stream.read(length)
    try:
        entries = json.loads(raw)
        metadata = entries.pop("__metadata__", {})
        tensors = {key: _stored(file, key, entry, base=8 + length) for key, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BrokenCheckpoint(f"{file} is no safetensors file ({error!r}); copy or download it again") from error
    _require_size(file, size, expected=max((t.offset + t.num_bytes for t in tensors.values()), default=8 + length))
    return Header(tensors=tensors, metadata=metadata)


def _stored(file: Path, key: str, entry: Mapping[str, Any], *, base: int) -> StoredTensor:
    if entry["dtype"] not in DTYPES:
        raise UnsupportedWeight(f"{file}: {key} has dtype {entry['dtype']}; expected one of {', '.join(DTYPES)}")
    begin, end = entry["data_offsets"]
    shape = tuple(entry["shape"])
    if entry["dtype"] == "F4":  # the file counts values, torch pairs of them
        shape = (*shape[:-1], shape[-1] // 2)
    dtype = DTYPES[entry["dtype"]]
    if end - begin != torch.Size(shape).numel() * dtype.itemsize:
        raise BrokenCheckpoint(f"{file}: {key} of shape {shape} does not fill its {end - begin} bytes")
    return StoredTensor(file=file, key=key, dtype=dtype, shape=shape, num_bytes=end - begin, offset=base + begin)


def _require_size(file: Path, size: int, *, expected: int) -> None:
    if size == expected:
        return
    state = "is cut short" if size < expected else "has bytes that nothing accounts for"
    raise BrokenCheckpoint(f"{file} {state}: {size} bytes, its header promises {expected}; copy or download it again")


def list_tensors(files: Iterable[Path], *, weight_map: Mapping[str, str]) -> dict[str, TensorInfo]:
    """The tensors of all shards together, in the order of their names."""
    stored: dict[str, StoredTensor] = {}
    metadata: dict[str, str] = {}
    for file in files:
        header = read_header(file)
        metadata |= header.metadata
        stored |= header.tensors
    _require_indexed(stored, weight_map)
    tensors = dict(_flattened(metadata, stored))
    used = {part.key for info in tensors.values() for part in info.parts.values()}
    rest = {key: plain(part, name=key) for key, part in stored.items() if key not in used}
    _refuse_leftovers(rest)
    return dict(sorted((tensors | rest).items()))


def _require_indexed(stored: Mapping[str, StoredTensor], weight_map: Mapping[str, str]) -> None:
    missing = [key for key, name in weight_map.items() if key not in stored or stored[key].file.name != name]
    if missing:
        raise BrokenCheckpoint(
            f"the index promises {len(missing)} tensors that the shards do not hold ({listing(missing)}): index and "
            f"shards are of different models or downloads; fetch them together again"
        )


def _flattened(metadata: Mapping[str, str], stored: Mapping[str, StoredTensor]) -> Iterable[tuple[str, TensorInfo]]:
    """The quantized weights that the metadata names, each with its parts, whichever shards they lie in."""
    for name in _flattened_names(metadata):
        class_name, attributes, part_names = attributes_from_json(metadata[name])
        if class_name == PLAIN:
            continue
        module, _, parameter = name.rpartition(".")
        keys = {part: f"{module}._{parameter}_{part}" for part in part_names}
        missing = [key for key in keys.values() if key not in stored]
        if missing:
            raise BrokenCheckpoint(
                f"{name} ({class_name}) lacks {len(missing)} of its {len(keys)} parts: {listing(missing)}. "
                f"A shard is missing or was replaced; fetch all of them again"
            )
        parts = {part: stored[key] for part, key in keys.items()}
        yield name, quantized(name, class_name=class_name, parts=parts, attributes=attributes)


def _flattened_names(metadata: Mapping[str, str]) -> list[str]:
    """Shards may each name all of the model's tensors or only their own, so the entries themselves are asked."""
    return sorted(name for name, value in metadata.items() if value.startswith("{") and '"_type"' in value)


def _refuse_leftovers(rest: Mapping[str, TensorInfo]) -> None:
    leftovers = [key for key in rest if _PART.search(key)]
    if leftovers:
        raise BrokenCheckpoint(
            f"{len(leftovers)} tensors are parts of quantized weights that no shard's metadata describes "
            f"({listing(leftovers)}). The metadata was lost when the files were rewritten, or a shard is missing; "
            f"take the original files"
        )


def reader(infos: Mapping[str, TensorInfo]) -> Callable[[TensorInfo], Weight]:
    """A function that reads one tensor; each file is mapped once, and a plain tensor is a view of the mapping."""
    files = {part.file for info in infos.values() for part in info.parts.values()}
    mappings = {file: _map(file) for file in files}

    def read(info: TensorInfo) -> Weight:
        parts = {part: _view(mappings[stored.file], stored) for part, stored in info.parts.items()}
        if info.is_quantized:
            return read_weight(info.name, info.class_name, parts, info.attributes)
        return parts["data"]

    return read


def _map(file: Path) -> mmap.mmap:
    """Private pages: torch wants writable memory, and what anyone writes there never reaches the file."""
    with file.open("rb") as stream:
        return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)


def _view(mapping: mmap.mmap, stored: StoredTensor) -> Tensor:
    if stored.num_bytes == 0:
        return torch.empty(stored.shape, dtype=stored.dtype)
    if stored.offset % stored.dtype.itemsize:  # a header of odd length: only a copy is aligned
        raw = bytearray(mapping[stored.offset : stored.offset + stored.num_bytes])
        return torch.frombuffer(raw, dtype=stored.dtype).view(stored.shape)
    count = stored.num_bytes // stored.dtype.itemsize
    return torch.frombuffer(mapping, dtype=stored.dtype, count=count, offset=stored.offset).view(stored.shape)
