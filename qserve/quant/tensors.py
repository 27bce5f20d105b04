"""torchao's tensors, built on any machine: a float weight and a config in, the tensor class of that config out.

torchao builds some of them only on a GPU or with mslk. What it builds here anyway is built by its own constructors;
given scales are kept as they are, because choosing them again from values that lie on a grid chooses other ones.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchao.core.config import config_from_dict
from torchao.quantization import Float8Tensor, Int4Tensor, Int8Tensor, IntxUnpackedToInt8Tensor
from torchao.quantization.quantize_.workflows import QuantizeTensorToFloat8Kwargs, QuantizeTensorToInt8Kwargs

from qserve.errors import UsageError
from qserve.quant import configs, layouts
from qserve.quant.configs import Json

Build = Callable[[Tensor, Any, int, Tensor | None, Tensor | None], Tensor]


def make_tensor(weight: Tensor, config: Json, *, scales: Tensor | None = None, offsets: Tensor | None = None) -> Tensor:
    """The weight (out_features, in_features) as the tensor that `config` stands for.

    `scales` and `offsets`, (out_features, groups), are kept as given; offsets are of int4-weight-only alone, where a
    value is code * scale + offset.
    """
    build = _BUILDERS.get(config["_type"])
    if build is None:
        raise UsageError(f"{config['_type']} cannot be made here; known are {', '.join(_BUILDERS)}")
    if offsets is not None and build is not _build_int4:
        raise UsageError(f"{config['_type']} keeps no offsets; give scales alone")
    group_size = configs.group_size_of(config) or weight.shape[1]
    return build(weight.detach().contiguous(), config_from_dict(config), group_size, scales, offsets)


def _build_intx(weight: Tensor, config: Any, group_size: int, scales: Tensor | None, _: Tensor | None) -> Tensor:
    is_dynamic = hasattr(config, "act_mapping_type")
    explicit: dict[str, Any] = {}
    if scales is not None:
        zero_point = torch.zeros_like(scales, dtype=torch.int8)
        explicit = {
            "intx_choose_qparams_algorithm": None,
            "custom_scale": scales,
            "custom_zero_point": zero_point,
        }
    tensor: Tensor = IntxUnpackedToInt8Tensor.from_hp(
        weight,
        (1, group_size),
        config.weight_dtype,
        mapping_type=config.weight_mapping_type if is_dynamic else config.mapping_type,
        activation_quantization="int8_asym_per_token" if is_dynamic else None,
        **explicit,
    )
    return tensor


def _build_int8(weight: Tensor, config: Any, _: int, scales: Tensor | None, __: Tensor | None) -> Tensor:
    activation, granularity = None, config.granularity
    if hasattr(config, "act_mapping_type"):
        act_granularity, granularity = Int8Tensor._normalize_granularity(config.granularity)
        activation = QuantizeTensorToInt8Kwargs(act_granularity, config.act_mapping_type, config.reduce_range)
    tensor: Tensor = Int8Tensor.from_hp(weight, granularity, scale=scales, act_quant_kwargs=activation)
    return tensor


def _build_float8(weight: Tensor, config: Any, _: int, scales: Tensor | None, __: Tensor | None) -> Tensor:
    if scales is not None:
        raise UsageError("float8 weights take no given scales: a scale by row is no choice that matters")
    act_granularity, granularity = config.granularity
    activation = QuantizeTensorToFloat8Kwargs(
        config.activation_dtype,
        act_granularity,
        hp_value_lb=config.activation_value_lb,
        hp_value_ub=config.activation_value_ub,
        kernel_preference=config.kernel_preference,
    )
    tensor: Tensor = Float8Tensor.from_hp(
        weight,
        config.weight_dtype,
        granularity,
        hp_value_lb=smallest_magnitude(weight.dtype),
        mm_config=config.mm_config,
        kernel_preference=config.kernel_preference,
        act_quant_kwargs=activation,
    )
    return tensor


def smallest_magnitude(dtype: torch.dtype) -> float:
    """What a row of float8 weights counts at least: torchao would divide a row of zeros by zero."""
    return 2**-14 if dtype == torch.float16 else 1e-12


def _build_int4(weight: Tensor, _: Any, group_size: int, scales: Tensor | None, offsets: Tensor | None) -> Tensor:
    """Nibbles of -8 to 7 with value = code * scale + offset, from each group's minimum and maximum."""
    groups = _groups(weight, group_size)
    if scales is not None:
        offsets = torch.zeros_like(scales) if offsets is None else offsets
        return _pack_int4(groups, scales, offsets, activation_dtype=torch.bfloat16)
    low, high = groups.amin(-1), groups.amax(-1)
    # The bound is torchao's: a constant group still has a scale to divide by.
    scales = ((high - low).clamp(min=1e-6) / 15).to(weight.dtype)
    offsets = (low + 8 * scales.float()).to(weight.dtype)
    # In float32 the codes count from the minimum itself, as the fake quantizer does; else from what is kept of it.
    floor = low if weight.dtype == torch.float32 else None
    return _pack_int4(groups, scales, offsets, activation_dtype=torch.bfloat16, floor=floor)


def _build_symmetric_int4(weight: Tensor, _: Any, group_size: int, scales: Tensor | None, __: Tensor | None) -> Tensor:
    """The same tensor without offsets, as float8 activations want it: scale = max |w| / 8, torchao's choice."""
    groups = _groups(weight, group_size)
    if scales is None:
        scales = (groups.abs().amax(-1).clamp(min=1e-6) / 8).to(weight.dtype)
    return _pack_int4(groups, scales, torch.zeros_like(scales), activation_dtype=torch.float8_e4m3fn)


def _groups(weight: Tensor, group_size: int) -> Tensor:
    return weight.float().view(weight.shape[0], -1, group_size)  # (out_features, groups, group_size)


def _pack_int4(
    groups: Tensor, scales: Tensor, offsets: Tensor, *, activation_dtype: torch.dtype, floor: Tensor | None = None
) -> Tensor:
    """`floor` is the value of code -8, where it is known better than from scales and offsets."""
    if floor is None:
        floor = offsets.float() - 8 * scales.float()
    codes = ((groups - floor.unsqueeze(-1)) / scales.float().unsqueeze(-1)).round_().clamp_(0, 15) - 8
    rows, columns = groups.shape[0], groups.shape[1] * groups.shape[2]
    tensor: Tensor = Int4Tensor(
        layouts.pack_nibbles(codes.to(torch.int8).view(rows, columns)),
        scales.t().contiguous(),
        offsets.t().contiguous(),
        [1, groups.shape[2]],
        torch.Size((rows, columns)),
        activation_dtype=activation_dtype,
    )
    return tensor


_BUILDERS: dict[str, Build] = {
    "Int8DynamicActivationIntxWeightConfig": _build_intx,
    "IntxWeightOnlyConfig": _build_intx,
    "Int4WeightOnlyConfig": _build_int4,
    "Float8DynamicActivationInt4WeightConfig": _build_symmetric_int4,
    "Float8DynamicActivationFloat8WeightConfig": _build_float8,
    "Int8WeightOnlyConfig": _build_int8,
    "Int8DynamicActivationInt8WeightConfig": _build_int8,
}
