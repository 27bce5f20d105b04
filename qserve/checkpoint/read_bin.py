"""Reading `.bin` shards, which are pickles: always `weights_only`, always mapped, nothing of them is ever executed.

A pickle names the classes and functions it needs. They are listed before anything is loaded: torchao's tensors and the
settings inside them are allowed by name for the one load, every other name ends in an error that says which it is.
Torchao is imported only for a file that holds its tensors.
"""

import importlib
import pickle
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qserve.checkpoint.contents import PLAIN, StoredTensor, TensorInfo, plain, quantized
from qserve.checkpoint.shards import listing
from qserve.errors import BrokenCheckpoint, UnsafePickle, UnsupportedWeight
from qserve.quant.read import read_tensor, take_apart
from qserve.quant.weight import Weight

_WORKFLOWS = "torchao.quantization.quantize_.workflows"
ALLOWED = frozenset(
    {
        "torchao.quantization.Float8Tensor",
        "torchao.quantization.Int4PlainInt32Tensor",
        "torchao.quantization.Int4Tensor",
        "torchao.quantization.Int4TilePackedTo4dTensor",
        "torchao.quantization.Int8Tensor",
        "torchao.quantization.IntxUnpackedToInt8Tensor",
        "torchao.prototype.mx_formats.mx_tensor.MXTensor",
        "torchao.prototype.mx_formats.nvfp4_tensor.NVFP4Tensor",
        # what these tensors carry as attributes
        "torchao.float8.inference.Float8MMConfig",
        "torchao.prototype.mx_formats.config.ScaleCalculationMode",
        "torchao.prototype.mx_formats.mx_tensor.QuantizeTensorToMXKwargs",
        "torchao.prototype.mx_formats.nvfp4_tensor.QuantizeTensorToNVFP4Kwargs",
        "torchao.quantization.granularity.PerBlock",
        "torchao.quantization.granularity.PerGroup",
        "torchao.quantization.granularity.PerRow",
        "torchao.quantization.granularity.PerTensor",
        "torchao.quantization.quant_primitives.MappingType",
        "torchao.quantization.quantize_.common.kernel_preference.KernelPreference",
        f"{_WORKFLOWS}.float8.float8_tensor.QuantizeTensorToFloat8Kwargs",
        f"{_WORKFLOWS}.int8.int8_tensor.QuantizeTensorToInt8Kwargs",
    }
)
_RETIRED = ("AffineQuantizedTensor", "LinearActivationQuantizedTensor", "TensorCoreTiledLayout", "PlainLayout")
_NAMED_GLOBAL = re.compile(r"GLOBAL (\S+)")


def load_shard(file: Path) -> dict[str, Tensor]:
    """The tensors of one `.bin` file, mapped and not copied."""
    is_zip = zipfile.is_zipfile(file)
    try:
        allowed = _allowed_globals(file) if is_zip else []
        with torch.serialization.safe_globals(allowed):
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        named = _NAMED_GLOBAL.search(str(error))
        if named or is_zip:
            raise _unsafe(file, [named.group(1) if named else "what weights_only=True refuses"]) from error
        raise _broken(file, "no pickle of tensors") from error
    except (RuntimeError, EOFError, ValueError, OSError) as error:
        raise _broken(file, str(error).partition("\n")[0] or type(error).__name__) from error
    return _require_tensors(file, state)


def _broken(file: Path, reason: str) -> BrokenCheckpoint:
    return BrokenCheckpoint(
        f"{file} ({file.stat().st_size} bytes) is cut short or was not written by torch.save ({reason}); "
        f"copy or download it again"
    )


def _allowed_globals(file: Path) -> list[Callable[..., Any] | tuple[Callable[..., Any], str]]:
    names = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(str(file)))
    refused = [name for name in names if name not in ALLOWED]
    if any(name.startswith("torchao.") for name in refused):
        raise _unsupported(file, [name for name in refused if name.startswith("torchao.")])
    if refused:
        raise _unsafe(file, refused)
    return [(_import(name), name) for name in names]


def _import(name: str) -> Any:
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def _unsupported(file: Path, names: list[str]) -> UnsupportedWeight:
    if any(word in name for name in names for word in _RETIRED):
        return UnsupportedWeight(
            f"{file} was saved by an old torchao: it pickles {listing(names)}, which torchao no longer has. "
            f"Make it anew from the float model: qserve-train finalize FLOAT_MODEL --out DIR --quantize RECIPE"
        )
    return UnsupportedWeight(
        f"{file} pickles {listing(names)}, which is not among the torchao tensors that are read here. "
        f"Save the model as safetensors, or quantize the float model anew with qserve-train finalize"
    )


def _unsafe(file: Path, names: list[str]) -> UnsafePickle:
    return UnsafePickle(
        f"{file} is a pickle that asks for {listing(names)} and could run any code; nothing of it was executed. "
        f"Expected tensors only. Get the model as safetensors, or have whom you trust save its state_dict alone"
    )


def _require_tensors(file: Path, state: Any) -> dict[str, Tensor]:
    if not isinstance(state, dict) or not state:
        raise BrokenCheckpoint(f"{file} holds a {type(state).__name__}; expected a state_dict: names with tensors")
    others = [str(name) for name, value in state.items() if not isinstance(value, Tensor)]
    if others:
        raise BrokenCheckpoint(
            f"{file} holds more than tensors ({listing(others)}); expected the state_dict of a model alone"
        )
    return state


def list_tensors(files: Iterable[Path], *, weight_map: Mapping[str, str]) -> dict[str, TensorInfo]:
    """The tensors of all shards together, in the order of their names."""
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        tensors |= {name: _info(file, name, tensor) for name, tensor in load_shard(file).items()}
    missing = [name for name, file in weight_map.items() if name not in tensors or tensors[name].files[0].name != file]
    if missing:
        raise BrokenCheckpoint(
            f"the index promises {len(missing)} tensors that the shards do not hold ({listing(missing)}): index and "
            f"shards are of different models or downloads; fetch them together again"
        )
    return dict(sorted(tensors.items()))


def _info(file: Path, name: str, tensor: Tensor) -> TensorInfo:
    class_name, inner, attributes = take_apart(tensor)
    if class_name == PLAIN:
        return plain(_stored(file, name, tensor), name=name)
    parts = {part: _stored(file, name, value) for part, value in inner.items()}
    return quantized(name, class_name=class_name, parts=parts, attributes=attributes)


def _stored(file: Path, key: str, tensor: Tensor) -> StoredTensor:
    return StoredTensor(
        file=file,
        key=key,
        dtype=tensor.dtype,
        shape=tuple(tensor.shape),
        num_bytes=tensor.numel() * tensor.element_size(),
    )


def reader(infos: Mapping[str, TensorInfo]) -> Callable[[TensorInfo], Weight]:
    """A function that reads one tensor; each shard is mapped once, when its first tensor is asked for."""
    shards: dict[Path, dict[str, Tensor]] = {}

    def read(info: TensorInfo) -> Weight:
        (file,) = info.files
        if file not in shards:
            shards[file] = load_shard(file)
        return read_tensor(info.name, shards[file][info.name].detach())

    return read
