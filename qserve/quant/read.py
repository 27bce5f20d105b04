"""torchao's weight tensors, read into `QuantizedWeight`, without torchao.

A reader gets the inner tensors by torchao's own names and the attributes as plain values: decoded from the JSON that a
safetensors file keeps beside them (`attributes_from_json`), or taken off a live tensor that a pickle gave back
(`read_tensor`). Knows no files: `checkpoint` finds the parts. What each class keeps is in `readers.py`.
"""

import dataclasses
import enum
import json
from typing import Any

import torch
from torch import Tensor

from qserve.errors import ArtifactError, BrokenCheckpoint, UnsupportedWeight
from qserve.quant.readers import MAKE_AGAIN, READERS, Attributes, Parts
from qserve.quant.weight import QuantizedWeight

PLAIN_CLASSES = ("Tensor", "Parameter")


def read_weight(name: str, class_name: str, parts: Parts, attributes: Attributes) -> QuantizedWeight:
    """The weight `name`, kept by torchao as a `class_name` of these inner tensors and attributes."""
    try:
        reader = READERS.get(class_name)
        if reader is None:
            raise UnsupportedWeight(_unreadable(class_name))
        weight = reader(parts, attributes)
        weight.check()
    except ArtifactError as error:
        raise type(error)(f"{name} ({class_name}): {error}") from None
    return weight


def read_tensor(name: str, tensor: Tensor) -> Tensor | QuantizedWeight:
    """A tensor as a pickle gave it back: an ordinary one as it is, one of torchao's through its reader."""
    class_name, parts, attributes = take_apart(tensor)
    return read_weight(name, class_name, parts, attributes) if class_name not in PLAIN_CLASSES else tensor


def take_apart(tensor: Tensor) -> tuple[str, dict[str, Tensor], dict[str, Any]]:
    """Class name, inner tensors and attributes of one of torchao's; an ordinary tensor gives ("Tensor", {}, {})."""
    class_name = type(tensor).__name__
    if class_name in PLAIN_CLASSES and not hasattr(tensor, "tensor_data_names"):
        return PLAIN_CLASSES[0], {}, {}
    part_names = _names(tensor, "tensor_data_names")
    parts = {part: getattr(tensor, part) for part in part_names if getattr(tensor, part, None) is not None}
    attributes = {key: _plain(getattr(tensor, key)) for key in _names(tensor, "tensor_attribute_names")}
    return class_name, parts, attributes


def attributes_from_json(entry: str) -> tuple[str, dict[str, Any], tuple[str, ...]]:
    """Class name, attributes and part names from one entry of a safetensors file's `__metadata__`.

    An ordinary tensor's entry gives ("Tensor", {}, ()).
    """
    try:
        decoded = json.loads(entry)
        class_name = decoded["_type"]
        attributes = {key: _decode(value) for key, value in decoded.get("_data", {}).items()}
        return class_name, attributes, tuple(decoded.get("_tensor_data_names", ()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BrokenCheckpoint(
            f"the metadata of a quantized weight cannot be read ({error}); expected torchao's JSON with _type, _data "
            f"and _tensor_data_names, found {entry[:200]!r}"
        ) from error


def _names(tensor: Tensor, kind: str) -> list[str]:
    return [*getattr(tensor, kind, ()), *getattr(tensor, f"optional_{kind}", ())]


def _decode(value: Any) -> Any:
    if isinstance(value, list):
        return [_decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    if "_type" not in value:
        return {key: _decode(item) for key, item in value.items()}
    if value["_type"] == "torch.dtype":
        return getattr(torch, value["_data"])
    if isinstance(value["_data"], dict):
        return {"_type": value["_type"], **{key: _decode(item) for key, item in value["_data"].items()}}
    return value["_data"]


def _plain(value: Any) -> Any:
    """What `_decode` gives for the same value after its way through JSON."""
    if isinstance(value, enum.Enum):
        return value.name
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {"_type": type(value).__name__, **fields}
    if hasattr(value, "_asdict"):
        return {"_type": type(value).__name__, **{key: _plain(item) for key, item in value._asdict().items()}}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value


def _unreadable(class_name: str) -> str:
    if class_name == "AffineQuantizedTensor" or class_name.startswith("LinearActivation"):
        return f"this class was removed from torchao and its layouts with it; {MAKE_AGAIN}"
    if "Opaque" in class_name or "Preshuffled" in class_name:
        return (
            "its bytes are arranged for one machine's kernel and the arrangement is not documented; save the model "
            f"from torchao in a plain packing format (packing_format='plain' or 'unpacked_to_int8'), or {MAKE_AGAIN}"
        )
    return f"no reader for this class; readable are {', '.join(READERS)}; {MAKE_AGAIN}"
