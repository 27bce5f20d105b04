"""How a weight says that its linear quantizes activations, read from the settings that torchao keeps in the tensor.

What cannot be kept in force raises UnsupportedWeight. Knows no tensors.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from qserve.errors import UnsupportedWeight
from qserve.quant.weight import ActivationQuantization

Settings = Mapping[str, Any]


def read_int8(settings: Settings | None) -> ActivationQuantization:
    if settings is None:
        return ActivationQuantization.NONE
    _expect_setting(settings, "_type", ("QuantizeTensorToInt8Kwargs",))
    _expect_setting(settings, "reduce_range", (False, None))
    _expect_granularity(settings, ("PerRow", "PerTensor"))
    mapping = settings.get("mapping_type", "SYMMETRIC")
    _expect_setting(settings, "mapping_type", ("SYMMETRIC", "ASYMMETRIC", None))
    if mapping == "ASYMMETRIC":
        return ActivationQuantization.INT8_ASYMMETRIC
    return ActivationQuantization.INT8_SYMMETRIC


def read_int4(dtype: Any) -> ActivationQuantization:
    if dtype in (None, torch.bfloat16, torch.float16, torch.float32):
        return ActivationQuantization.NONE
    if dtype == torch.float8_e4m3fn:
        return ActivationQuantization.FLOAT8
    raise UnsupportedWeight(f"it quantizes activations to {dtype}; known are bfloat16 (not at all) and float8_e4m3fn")


def read_float8(settings: Settings | None) -> ActivationQuantization:
    if settings is None:
        return ActivationQuantization.NONE
    _expect_setting(settings, "_type", ("QuantizeTensorToFloat8Kwargs",))
    _expect_setting(settings, "float8_dtype", (torch.float8_e4m3fn, None))
    _expect_setting(settings, "hp_value_lb", (None,))
    _expect_setting(settings, "hp_value_ub", (None,))
    granularity = _expect_granularity(settings, ("PerRow", "PerTensor", "PerBlock"))
    if granularity.get("_type") != "PerBlock":
        return ActivationQuantization.FLOAT8
    if list(granularity.get("block_size", ())) != [1, 128]:
        raise UnsupportedWeight(
            f"it quantizes activations in blocks of {granularity.get('block_size')}; known is 1 x 128"
        )
    return ActivationQuantization.FLOAT8_GROUPS


def read_mx(settings: Settings | None) -> ActivationQuantization:
    if settings is None:
        return ActivationQuantization.NONE
    _expect_setting(settings, "block_size", (32,))
    _expect_setting(settings, "scaling_mode", ("RCEIL",))
    _expect_setting(settings, "elem_dtype", (torch.float8_e4m3fn, torch.float4_e2m1fn_x2))
    is_float8 = settings["elem_dtype"] == torch.float8_e4m3fn
    return ActivationQuantization.MXFP8 if is_float8 else ActivationQuantization.MXFP4


def read_nvfp4(settings: Settings | None) -> ActivationQuantization:
    if settings is None:
        return ActivationQuantization.NONE
    _expect_setting(settings, "block_size", (16,))
    _expect_setting(settings, "use_dynamic_per_tensor_scale", (True,))
    return ActivationQuantization.NVFP4


def _expect_granularity(settings: Settings, kinds: Sequence[str]) -> Mapping[str, Any]:
    granularity = settings.get("granularity") or {"_type": "PerRow"}
    if granularity.get("_type") not in kinds or granularity.get("dim", -1) not in (-1, 1):
        raise UnsupportedWeight(f"it quantizes activations by {dict(granularity)}; known are {', '.join(kinds)}")
    return granularity


def _expect_setting(settings: Settings, name: str, known: Sequence[Any]) -> None:
    if settings.get(name) not in known:
        raise UnsupportedWeight(
            f"it quantizes activations with {name}={settings.get(name)}; known is {' or '.join(map(str, known))}; "
            "quantize the float model again with that"
        )
