"""One reader for each of torchao's weight tensor classes, and the table of them.

What the class keeps and under which name is torchao's own; what is read is checked against the shapes that the
attributes promise. Knows neither files nor the tensor's name: `read.py` calls it and adds the name to an error.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qserve.errors import BrokenCheckpoint, UnsupportedWeight
from qserve.quant import activations, layouts
from qserve.quant.weight import ActivationQuantization, QuantizedWeight

Parts = Mapping[str, Tensor]
Attributes = Mapping[str, Any]
Reader = Callable[[Parts, Attributes], QuantizedWeight]

MAKE_AGAIN = (
    "make the artifact again from the float model with `qserve-train finalize BASE --quantize RECIPE --out DIR`"
)


def _read_intx(parts: Parts, attributes: Attributes) -> QuantizedWeight:
    codes = _part(parts, "qdata")
    rows, groups, group_size = _blocks(codes.shape, _attribute(attributes, "block_size"))
    quantization = attributes.get("activation_quantization")
    if quantization is not None and str(quantization).lower() != "int8_asym_per_token":
        raise UnsupportedWeight(f"it quantizes activations as {quantization!r}; known is int8_asym_per_token")
    return QuantizedWeight(
        codes=codes,
        scales=_expand(_part(parts, "scale"), codes.shape, rows, groups),
        zero_points=_zero_points(parts.get("zero_point"), codes.shape, rows, groups),
        group_size=group_size,
        bits=_integer_bits(_attribute(attributes, "target_dtype")),
        dtype=_attribute(attributes, "dtype"),
        activation=ActivationQuantization.INT8_ASYMMETRIC if quantization else ActivationQuantization.NONE,
    )


def _read_int8(parts: Parts, attributes: Attributes) -> QuantizedWeight:
    codes = _part(parts, "qdata")
    rows, groups, group_size = _blocks(codes.shape, _attribute(attributes, "block_size"))
    _refuse_static(parts, "act_quant_scale", "Int8StaticActivationInt8WeightConfig")
    return QuantizedWeight(
        codes=codes,
        scales=_expand(_part(parts, "scale"), codes.shape, rows, groups),
        zero_points=_zero_points(parts.get("zero_point"), codes.shape, rows, groups),
        pre_scale=_pre_scale(parts, codes.shape[1]),
        group_size=group_size,
        bits=8,
        dtype=_attribute(attributes, "dtype"),
        activation=activations.read_int8(attributes.get("act_quant_kwargs")),
    )


def _read_int4(parts: Parts, attributes: Attributes) -> QuantizedWeight:
    packed = _part(parts, "qdata")
    shape = _shape_of(attributes)
    _expect_shape("qdata", packed, [shape[0], shape[1] // 2])
    codes = layouts.unpack_signed_nibbles(packed)
    _, groups, group_size = _blocks(shape, _attribute(attributes, "block_size"))
    scale, zero_point = _part(parts, "scale"), _part(parts, "zero_point")
    _expect_shape("scale", scale, [groups, shape[0]])
    _expect_shape("zero_point", zero_point, [groups, shape[0]])
    return QuantizedWeight(
        codes=codes,
        scales=scale.t().contiguous(),
        offsets=_unless_zero(zero_point.t().contiguous()),
        pre_scale=_pre_scale(parts, shape[1]),
        group_size=group_size,
        bits=4,
        dtype=scale.dtype,
        activation=activations.read_int4(attributes.get("activation_dtype")),
    )


def _read_int4_tiles(parts: Parts, attributes: Attributes) -> QuantizedWeight:
    packed, scale_and_zero = _part(parts, "qdata"), _part(parts, "scale_and_zero")
    rows, columns = _shape_of(attributes)
    _, groups, group_size = _blocks((rows, columns), _attribute(attributes, "block_size"))
    if packed.ndim != 4 or packed.dtype != torch.int32 or packed.shape[2] != 32:
        raise BrokenCheckpoint(
            f"found qdata of {packed.dtype} and shape {list(packed.shape)}; "
            "expected int32 and [rows / 8, columns / 128, 32, 4]"
        )
    nibbles = layouts.unpack_tiles(packed)
    padded_rows, padded_columns = nibbles.shape
    if padded_rows < rows or padded_columns < columns:
        raise BrokenCheckpoint(f"found {padded_rows} x {padded_columns} codes; expected at least {rows} x {columns}")
    _expect_shape("scale_and_zero", scale_and_zero, [padded_columns // group_size, padded_rows, 2])
    scales, zeros = scale_and_zero[:groups, :rows].permute(2, 1, 0)  # (2, rows, groups)
    return QuantizedWeight(
        codes=(nibbles[:rows, :columns].to(torch.int8) - 8).contiguous(),
        scales=scales.contiguous(),
        offsets=_unless_zero(zeros.contiguous()),
        pre_scale=_pre_scale(parts, columns),
        group_size=group_size,
        bits=4,
        dtype=torch.bfloat16,
    )


def _read_int4_int32(parts: Parts, attributes: Attributes) -> QuantizedWeight:
    """Eight nibbles an int32, lowest first: 0 to 15 with int8 zero points on XPU, -8 to 7 with float ones on NPU."""
    packed, scale, zero_point = (_part(parts, name) for name in ("qdata", "scale", "zero_point"))
    rows, columns = _shape_of(attributes)
    _, groups, group_size = _blocks((rows, columns), _attribute(attributes, "block_size"))
    _expect_shape("qdata", packed, [rows, columns // 8])
    _expect_shape("scale", scale, [groups, rows])
    _expect_shape("zero_point", zero_point, [groups, rows])
    is_signed = zero_point.is_floating_point()
    codes = layouts.unpack_signed_nibbles(packed) if is_signed else layouts.unpack_nibbles(packed).to(torch.int8) - 8
    zero_points = zero_point if is_signed else zero_point - 8
    return QuantizedWeight(
        codes=codes,
        scales=scale.t().contiguous(),
        zero_points=_zero_points(zero_points.t(), (rows, columns), rows, groups),
        pre_scale=_pre_scale(parts, columns),
        group_size=group_size,
        bits=4,
        dtype=scale.dtype,
    )


def _read_float8(parts: Parts, attributes: Attributes) -> QuantizedWeight:
    codes, scale = _part(parts, "qdata"), _part(parts, "scale")
    if codes.dtype not in (torch.float8_e4m3fn, torch.float8_e5m2):
        raise UnsupportedWeight(f"it holds {codes.dtype}; readable are float8_e4m3fn and float8_e5m2; {MAKE_AGAIN}")
    block_size = attributes.get("block_size") or _block_from_scale(codes.shape, scale)
    rows, groups, group_size = _blocks(codes.shape, block_size)
    return QuantizedWeight(
        codes=codes,
        scales=_expand(scale, codes.shape, rows, groups),
        group_size=group_size,
        bits=8,
        dtype=attributes.get("dtype") or torch.float32,
        activation=activations.read_float8(attributes.get("act_quant_kwargs")),
    )


def _read_mx(parts: Parts, attributes: Attributes) -> QuantizedWeight:
    packed, scale = _part(parts, "qdata"), _part(parts, "scale")
    element, group_size = _attribute(attributes, "elem_dtype"), _attribute(attributes, "block_size")
    if packed.ndim != 2:
        raise UnsupportedWeight(f"qdata has {packed.ndim} dimensions; only the two of a linear weight can be read")
    is_float4 = element == torch.float4_e2m1fn_x2
    codes, bits = _mx_codes(packed, element)
    scales = _power_of_two(_block_scales(scale, codes.shape, group_size, attributes.get("is_swizzled_scales")))
    return QuantizedWeight(
        codes=codes,
        scales=scales / 2 if is_float4 else scales,
        group_size=group_size,
        bits=bits,
        is_float4=is_float4,
        dtype=_attribute(attributes, "orig_dtype"),
        activation=activations.read_mx(attributes.get("act_quant_kwargs")),
    )


def _read_nvfp4(parts: Parts, attributes: Attributes) -> QuantizedWeight:
    packed = _part(parts, "qdata")
    if packed.ndim != 2:
        raise UnsupportedWeight(f"qdata has {packed.ndim} dimensions; only the two of a linear weight can be read")
    _refuse_static(parts, "act_per_tensor_scale", "NVFP4DynamicActivationNVFP4WeightConfig(step='convert')")
    codes, group_size = layouts.float4_codes(packed), _attribute(attributes, "block_size")
    scales = _block_scales(_part(parts, "scale"), codes.shape, group_size, attributes.get("is_swizzled_scales"))
    scales = scales.to(torch.float32)
    per_tensor = parts.get("per_tensor_scale")
    return QuantizedWeight(
        codes=codes,
        scales=(scales if per_tensor is None else per_tensor.to(torch.float32) * scales) / 2,
        group_size=group_size,
        bits=4,
        is_float4=True,
        dtype=_attribute(attributes, "orig_dtype"),
        activation=activations.read_nvfp4(attributes.get("act_quant_kwargs")),
    )


READERS: dict[str, Reader] = {
    "IntxUnpackedToInt8Tensor": _read_intx,
    "Int8Tensor": _read_int8,
    "Int4Tensor": _read_int4,
    "Int4TilePackedTo4dTensor": _read_int4_tiles,
    "Int4PlainInt32Tensor": _read_int4_int32,
    "Float8Tensor": _read_float8,
    "MXTensor": _read_mx,
    "NVFP4Tensor": _read_nvfp4,
}


def _part(parts: Parts, name: str) -> Tensor:
    if name not in parts:
        raise BrokenCheckpoint(f"its part {name!r} is missing; found {', '.join(sorted(parts)) or 'none'}")
    return parts[name]


def _attribute(attributes: Attributes, name: str) -> Any:
    if attributes.get(name) is None:
        raise BrokenCheckpoint(f"its attribute {name!r} is missing; found {', '.join(sorted(attributes)) or 'none'}")
    return attributes[name]


def _shape_of(attributes: Attributes) -> tuple[int, int]:
    shape = _attribute(attributes, "shape")
    if len(shape) != 2:
        raise UnsupportedWeight(f"its shape is {list(shape)}; only the two dimensions of a linear weight can be read")
    return int(shape[0]), int(shape[1])


def _expect_shape(what: str, part: Tensor, shape: Sequence[int]) -> None:
    if list(part.shape) != list(shape):
        raise BrokenCheckpoint(f"found {what} of shape {list(part.shape)}; expected {list(shape)}")


def _blocks(shape: Sequence[int], block_size: Sequence[int]) -> tuple[int, int, int]:
    """(blocks along the rows, groups along the columns, group size) of a weight cut into `block_size`."""
    if len(shape) != 2 or len(block_size) != 2:
        raise UnsupportedWeight(
            f"shape {list(shape)} in blocks of {list(block_size)}; "
            "only the two dimensions of a linear weight can be read"
        )
    if any(block < 1 or size % block for size, block in zip(shape, block_size, strict=True)):
        raise BrokenCheckpoint(f"its shape {list(shape)} is not a multiple of its blocks {list(block_size)}")
    return shape[0] // block_size[0], shape[1] // block_size[1], int(block_size[1])


def _block_from_scale(shape: Sequence[int], scale: Tensor) -> Sequence[int]:
    """Float8Tensor may leave its blocks unsaid: one scale is per tensor, else the shapes' quotient says it."""
    if scale.numel() == 1:
        return shape
    if scale.ndim != len(shape):
        raise BrokenCheckpoint(f"found scale of shape {list(scale.shape)} for a weight of shape {list(shape)}")
    return [size // blocks for size, blocks in zip(shape, scale.shape, strict=True)]


def _expand(part: Tensor, shape: Sequence[int], rows: int, groups: int) -> Tensor:
    """Numbers of (rows, groups) blocks -> (out_features, groups)."""
    if part.numel() != rows * groups:
        raise BrokenCheckpoint(f"found {part.numel()} scales or zero points; expected {rows} x {groups}")
    return part.reshape(rows, groups).repeat_interleave(shape[0] // rows, dim=0)


def _zero_points(part: Tensor | None, shape: Sequence[int], rows: int, groups: int) -> Tensor | None:
    """As int8 wherever that is exact; None where all are zero."""
    if part is None or not part.numel() or not part.any():
        return None
    whole = part.round().clamp(-128, 127).to(torch.int8)
    if not torch.equal(whole.to(part.dtype), part):
        if not part.is_floating_point():
            raise BrokenCheckpoint(f"found zero points from {int(part.min())} to {int(part.max())}; int8 is expected")
        whole = part
    return _expand(whole, shape, rows, groups)


def _unless_zero(part: Tensor) -> Tensor | None:
    return part if part.any() else None


def _pre_scale(parts: Parts, in_features: int) -> Tensor | None:
    part = parts.get("act_pre_scale")
    if part is None:
        return None
    if part.numel() not in (1, in_features):
        raise BrokenCheckpoint(f"found {part.numel()} act_pre_scale numbers; expected {in_features}")
    return part.reshape(-1).expand(in_features).contiguous()


def _integer_bits(dtype: torch.dtype) -> int:
    name = str(dtype).removeprefix("torch.int")
    if not name.isdigit() or not 1 <= int(name) <= 8:
        raise UnsupportedWeight(f"its codes are {dtype}; readable are int1 to int8")
    return int(name)


def _mx_codes(packed: Tensor, element: Any) -> tuple[Tensor, int]:
    """(codes, bits) of MX elements, which torchao names by a dtype or, for six bits, by a word."""
    if element in (torch.float8_e4m3fn, torch.float8_e5m2):
        return packed, 8
    if element == torch.float4_e2m1fn_x2:
        return layouts.float4_codes(packed), 4
    if element in ("fp6_e2m3", "fp6_e3m2"):
        return layouts.float6_codes(packed, exponent_bits=int(element[5]), mantissa_bits=int(element[7])), 6
    raise UnsupportedWeight(f"its elements are {element}; readable are float8, fp6_e2m3, fp6_e3m2 and float4")


def _block_scales(scale: Tensor, shape: Sequence[int], group_size: int, is_swizzled: bool | None) -> Tensor:
    rows, groups, _ = _blocks(shape, (1, group_size))
    expected = -(-rows // 128) * 128 * -(-groups // 4) * 4 if is_swizzled else rows * groups
    if scale.numel() != expected:
        raise BrokenCheckpoint(f"found {scale.numel()} block scales; expected {expected}")
    if is_swizzled:
        return layouts.unswizzle_scales(scale, rows=rows, columns=groups)
    return scale.reshape(rows, groups)


def _power_of_two(scale: Tensor) -> Tensor:
    """e8m0 as bfloat16, whose exponent range it is: 2 ** (code - 127), and NaN for 255."""
    exponents = scale.view(torch.uint8).to(torch.float32)
    return torch.where(exponents == 255, torch.nan, torch.exp2(exponents - 127)).to(torch.bfloat16)


def _refuse_static(parts: Parts, part: str, config: str) -> None:
    if parts.get(part) is not None:
        raise UnsupportedWeight(
            f"it quantizes activations with a fixed scale ({part}, from {config}); served are scales made anew for "
            "each token: quantize the float model with int8-dynamic-act-int8-weight or int8-weight-only"
        )
