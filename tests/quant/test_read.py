"""Every torchao tensor that can be built here is read to exactly what torchao itself dequantizes it to."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torchao.prototype.mx_formats.config import ScaleCalculationMode
from torchao.prototype.mx_formats.mx_tensor import MXTensor, QuantizeTensorToMXKwargs
from torchao.prototype.mx_formats.nvfp4_tensor import (
    NVFP4Tensor,
    QuantizeTensorToNVFP4Kwargs,
    per_tensor_amax_to_scale,
)
from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
from torchao.quantization import (
    Float8Tensor,
    Int8Tensor,
    IntxUnpackedToInt8Tensor,
    MappingType,
    PerGroup,
    PerRow,
    PerTensor,
)
from torchao.quantization.granularity import PerBlock
from torchao.quantization.quantize_.workflows import QuantizeTensorToFloat8Kwargs, QuantizeTensorToInt8Kwargs

from qserve.errors import BrokenCheckpoint, UnsupportedWeight
from qserve.quant.read import attributes_from_json, read_tensor, read_weight
from qserve.quant.weight import ActivationQuantization, QuantizedWeight

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NONE, FLOAT8 = ActivationQuantization.NONE, ActivationQuantization.FLOAT8


def random_weight(dtype: torch.dtype, *, rows: int = 24, columns: int = 128) -> Tensor:
    return (torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.1).to(dtype)


def read_both_ways(tensor: Tensor) -> QuantizedWeight:
    """Through a live tensor and through torchao's flattened form; both must give the same."""
    live = read_tensor("layer.weight", tensor)
    assert isinstance(live, QuantizedWeight)
    flat, metadata = flatten_tensor_state_dict({"layer.weight": tensor})
    class_name, attributes, part_names = attributes_from_json(metadata["layer.weight"])
    parts = {part: flat[f"layer._weight_{part}"] for part in part_names}
    stored = read_weight("layer.weight", class_name, parts, attributes)
    assert torch.equal(live.codes.view(torch.uint8), stored.codes.view(torch.uint8))
    assert torch.equal(live.dequantize(), stored.dequantize())
    assert (live.bits, live.group_size, live.dtype, live.activation) == (
        stored.bits,
        stored.group_size,
        stored.dtype,
        stored.activation,
    )
    return stored


def assert_exact(tensor: Any) -> QuantizedWeight:
    weight = read_both_ways(tensor)
    expected = tensor.dequantize()
    assert weight.dequantize().dtype == expected.dtype
    assert torch.equal(weight.dequantize(), expected)
    return weight


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("mapping", [MappingType.SYMMETRIC, MappingType.ASYMMETRIC])
def test_intx(dtype: torch.dtype, bits: int, mapping: MappingType) -> None:
    tensor = IntxUnpackedToInt8Tensor.from_hp(
        random_weight(dtype), (1, 32), getattr(torch, f"int{bits}"), mapping_type=mapping
    )
    weight = assert_exact(tensor)
    assert (weight.bits, weight.group_size, weight.activation) == (bits, 32, NONE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale_dtype", DTYPES)
def test_intx_with_learned_zero_points_and_other_scale_dtypes(dtype: torch.dtype, scale_dtype: torch.dtype) -> None:
    tensor = IntxUnpackedToInt8Tensor.from_hp(
        random_weight(dtype),
        (1, 64),
        torch.int4,
        activation_quantization="int8_asym_per_token",
        intx_choose_qparams_algorithm=None,
        custom_scale=torch.rand(24, 2).to(scale_dtype) * 0.05 + 0.01,
        custom_zero_point=torch.randn(24, 2).to(dtype),
    )
    weight = assert_exact(tensor)
    assert weight.zero_points is not None
    assert weight.zero_points.is_floating_point()
    assert weight.activation is ActivationQuantization.INT8_ASYMMETRIC


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("granularity", [PerRow(), PerTensor(), PerGroup(32)])
@pytest.mark.parametrize("mapping", [MappingType.SYMMETRIC, MappingType.ASYMMETRIC])
def test_int8(dtype: torch.dtype, granularity: Any, mapping: MappingType) -> None:
    weight = assert_exact(Int8Tensor.from_hp(random_weight(dtype), granularity, mapping_type=mapping))
    assert weight.group_size == (32 if isinstance(granularity, PerGroup) else 128)
    assert weight.zero_points is None or mapping is MappingType.ASYMMETRIC


@pytest.mark.parametrize(
    ("mapping", "activation"),
    [
        (MappingType.SYMMETRIC, ActivationQuantization.INT8_SYMMETRIC),
        (MappingType.ASYMMETRIC, ActivationQuantization.INT8_ASYMMETRIC),
    ],
)
def test_int8_with_dynamic_activations_and_pre_scale(mapping: MappingType, activation: ActivationQuantization) -> None:
    pre_scale = torch.rand(128)
    kwargs = QuantizeTensorToInt8Kwargs(PerRow(), mapping_type=mapping)
    tensor = Int8Tensor.from_hp(
        random_weight(torch.bfloat16), PerRow(), act_quant_kwargs=kwargs, act_pre_scale=pre_scale
    )
    weight = assert_exact(tensor)
    assert weight.activation is activation
    assert weight.pre_scale is not None
    assert torch.equal(weight.pre_scale, pre_scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("float8", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("granularity", [PerRow(), PerTensor(), PerGroup(32), PerBlock((128, 128)), PerBlock((1, 128))])
def test_float8(dtype: torch.dtype, float8: torch.dtype, granularity: Any) -> None:
    tensor = Float8Tensor.from_hp(random_weight(dtype, rows=256, columns=256), float8, granularity)
    weight = assert_exact(tensor)
    assert (weight.bits, weight.activation) == (8, NONE)


@pytest.mark.parametrize(
    ("granularity", "activation"),
    [
        (PerRow(), FLOAT8),
        (PerTensor(), FLOAT8),
        (PerBlock((1, 128)), ActivationQuantization.FLOAT8_GROUPS),
    ],
)
def test_float8_activations(granularity: Any, activation: ActivationQuantization) -> None:
    kwargs = QuantizeTensorToFloat8Kwargs(granularity=granularity)
    tensor = Float8Tensor.from_hp(random_weight(torch.bfloat16), granularity=PerRow(), act_quant_kwargs=kwargs)
    assert assert_exact(tensor).activation is activation


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_swizzled", [False, True])
@pytest.mark.parametrize(
    "element", [torch.float8_e4m3fn, torch.float8_e5m2, "fp6_e2m3", "fp6_e3m2", torch.float4_e2m1fn_x2]
)
def test_mx(dtype: torch.dtype, is_swizzled: bool, element: Any) -> None:
    values = random_weight(dtype, rows=150, columns=192)
    values[3, 32:64] = 0
    values[4, :32] *= 2.0**-120
    weight = assert_exact(MXTensor.to_mx(values, element, 32, is_swizzled_scales=is_swizzled))
    assert weight.is_float4 == (element == torch.float4_e2m1fn_x2)


@pytest.mark.parametrize(
    ("element", "activation"),
    [
        (torch.float8_e4m3fn, ActivationQuantization.MXFP8),
        (torch.float4_e2m1fn_x2, ActivationQuantization.MXFP4),
    ],
)
def test_mx_activations(element: torch.dtype, activation: ActivationQuantization) -> None:
    kwargs = QuantizeTensorToMXKwargs(elem_dtype=element, scaling_mode=ScaleCalculationMode.RCEIL)
    tensor = MXTensor.to_mx(random_weight(torch.bfloat16), element, 32, act_quant_kwargs=kwargs)
    assert assert_exact(tensor).activation is activation


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_swizzled", [False, True])
@pytest.mark.parametrize("has_per_tensor_scale", [False, True])
def test_nvfp4(dtype: torch.dtype, is_swizzled: bool, has_per_tensor_scale: bool) -> None:
    values = random_weight(dtype, rows=150, columns=208)
    per_tensor = per_tensor_amax_to_scale(values.abs().max()) if has_per_tensor_scale else None
    kwargs = QuantizeTensorToNVFP4Kwargs(use_dynamic_per_tensor_scale=True)
    tensor = NVFP4Tensor.to_nvfp4(
        values, per_tensor_scale=per_tensor, is_swizzled_scales=is_swizzled, act_quant_kwargs=kwargs
    )
    weight = assert_exact(tensor)
    assert weight.activation is ActivationQuantization.NVFP4
    assert weight.code_bits == 5


def test_an_ordinary_tensor_is_left_alone() -> None:
    tensor = torch.ones(3)
    assert read_tensor("norm.weight", tensor) is tensor
    assert attributes_from_json('{"_type": "Tensor"}') == ("Tensor", {}, ())


def intx_parts() -> tuple[dict[str, Tensor], dict[str, Any]]:
    parts = {
        "qdata": torch.zeros(4, 64, dtype=torch.int8),
        "scale": torch.ones(4, 2),
        "zero_point": torch.zeros(4, 2, dtype=torch.int8),
    }
    return parts, {"target_dtype": torch.int4, "block_size": [1, 32], "dtype": torch.float32}


def break_part(name: str, part: Tensor) -> tuple[dict[str, Tensor], dict[str, Any]]:
    parts, attributes = intx_parts()
    return {**parts, name: part}, attributes


def test_bytes_and_bits() -> None:
    weight = read_weight("w", "IntxUnpackedToInt8Tensor", *intx_parts())
    assert weight.num_bytes == 4 * 64 + 4 * 2 * 4
    assert weight.bits_per_weight == 4 + 32 / 32


@pytest.mark.parametrize(
    ("parts", "found"),
    [
        (break_part("scale", torch.ones(4, 3)), "12 scales or zero points; expected 4 x 2"),
        (break_part("scale", torch.ones(4, 2, dtype=torch.float64)), "scales of torch.float64"),
        (break_part("qdata", torch.full((4, 64), 9, dtype=torch.int8)), "codes from 9 to 9; 4 bits hold -8 to 7"),
        (break_part("qdata", torch.zeros(4, 65, dtype=torch.int8)), "not a multiple of its blocks"),
        (break_part("zero_point", torch.full((4, 2), 300, dtype=torch.int32)), "zero points from 300 to 300"),
    ],
)
def test_broken_parts_are_named(parts: tuple[dict[str, Tensor], dict[str, Any]], found: str) -> None:
    with pytest.raises(BrokenCheckpoint, match=f"layer.weight \\(IntxUnpackedToInt8Tensor\\): .*{found}"):
        read_weight("layer.weight", "IntxUnpackedToInt8Tensor", *parts)


def test_a_missing_part_and_a_missing_attribute_are_named() -> None:
    parts, attributes = intx_parts()
    with pytest.raises(BrokenCheckpoint, match=r"'scale' is missing; found qdata"):
        read_weight("w", "IntxUnpackedToInt8Tensor", {"qdata": parts["qdata"]}, attributes)
    with pytest.raises(BrokenCheckpoint, match="'block_size' is missing"):
        read_weight("w", "IntxUnpackedToInt8Tensor", parts, {"target_dtype": torch.int4})


@pytest.mark.parametrize(
    ("class_name", "way_out"),
    [
        ("AffineQuantizedTensor", "removed from torchao"),
        ("IntxOpaqueTensor", "plain packing format"),
        ("Int4PreshuffledTensor", "plain packing format"),
        ("NF4Tensor", "readable are IntxUnpackedToInt8Tensor"),
    ],
)
def test_an_unknown_class_names_itself_the_tensor_and_a_way_out(class_name: str, way_out: str) -> None:
    with pytest.raises(
        UnsupportedWeight, match=f"model.q.weight \\({class_name}\\): .*{way_out}.*qserve-train finalize"
    ):
        read_weight("model.q.weight", class_name, {}, {})


def test_fixed_activation_scales_are_refused() -> None:
    kwargs = QuantizeTensorToInt8Kwargs(PerRow())
    tensor = Int8Tensor.from_hp(
        random_weight(torch.bfloat16), PerRow(), act_quant_kwargs=kwargs, act_quant_scale=torch.ones(1, 1)
    )
    with pytest.raises(UnsupportedWeight, match="fixed scale"):
        read_tensor("w", tensor)


@pytest.mark.parametrize("kwargs", [{"hp_value_ub": 12.0}, {"float8_dtype": torch.float8_e5m2}])
def test_activation_settings_that_cannot_be_kept_in_force_are_refused(kwargs: dict[str, Any]) -> None:
    tensor = Float8Tensor.from_hp(
        random_weight(torch.bfloat16), act_quant_kwargs=QuantizeTensorToFloat8Kwargs(**kwargs)
    )
    with pytest.raises(UnsupportedWeight, match=next(iter(kwargs))):
        read_tensor("w", tensor)


def test_metadata_that_is_no_metadata() -> None:
    for entry in ("", "[]", "{}", "not json"):
        with pytest.raises(BrokenCheckpoint, match="metadata of a quantized weight"):
            attributes_from_json(entry)


def test_reading_needs_neither_torchao_nor_transformers() -> None:
    program = (
        "import sys, qserve.quant.read, qserve.quant.weight\n"
        "found = [name for name in sys.modules if name.split('.')[0] in ('torchao', 'transformers')]\n"
        "assert not found, found"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
