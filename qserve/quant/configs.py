"""torchao's quantization configs as the JSON that config.json keeps of them, written and read without torchao.

The field names and defaults are torchao 0.18's; knows nothing of models and recipes.
"""

from collections.abc import Mapping
from typing import Any

Json = dict[str, Any]

# Configs whose version 1 kept weights in a tensor class that torchao has removed.
CURRENT_VERSIONS = {
    "Int8DynamicActivationIntxWeightConfig": 2,
    "IntxWeightOnlyConfig": 2,
    "Int4WeightOnlyConfig": 2,
    "Int8WeightOnlyConfig": 2,
    "Int8DynamicActivationInt8WeightConfig": 2,
    "Float8WeightOnlyConfig": 2,
    "Float8DynamicActivationFloat8WeightConfig": 2,
}
NAMED_CONFIG_TYPES = ("FqnToConfig", "ModuleFqnToConfig")


def config(config_type: str, **data: Any) -> Json:
    return {"_type": config_type, "_version": CURRENT_VERSIONS.get(config_type, 1), "_data": data}


def named(entries: Mapping[str, Json | None]) -> Json:
    """Each module by its name or by a pattern `re:...`; under both of the names that readers look for."""
    return config("FqnToConfig", fqn_to_config=dict(entries), module_fqn_to_config=dict(entries))


def int8_dynamic_activation_intx_weight(*, bits: int, group_size: int) -> Json:
    return config(
        "Int8DynamicActivationIntxWeightConfig",
        weight_dtype=_dtype(f"int{bits}"),
        weight_granularity=_per_group(group_size),
        weight_mapping_type=_enum("MappingType", "SYMMETRIC"),
        weight_scale_dtype=None,
        act_mapping_type=_enum("MappingType", "ASYMMETRIC"),
        intx_packing_format=_enum("IntxPackingFormat", "UNPACKED_TO_INT8"),
        intx_choose_qparams_algorithm=_enum("IntxChooseQParamsAlgorithm", "AFFINE"),
    )


def intx_weight_only(*, bits: int, group_size: int) -> Json:
    return config(
        "IntxWeightOnlyConfig",
        weight_dtype=_dtype(f"int{bits}"),
        granularity=_per_group(group_size),
        mapping_type=_enum("MappingType", "SYMMETRIC"),
        scale_dtype=None,
        intx_packing_format=_enum("IntxPackingFormat", "UNPACKED_TO_INT8"),
        intx_choose_qparams_algorithm=_enum("IntxChooseQParamsAlgorithm", "AFFINE"),
    )


def int4_weight_only(*, group_size: int) -> Json:
    return config(
        "Int4WeightOnlyConfig",
        group_size=group_size,
        set_inductor_config=True,
        int4_packing_format=_enum("Int4PackingFormat", "PLAIN"),
        int4_choose_qparams_algorithm=_enum("Int4ChooseQParamsAlgorithm", "TINYGEMM"),
        int4_tile_packed_ntile=8,
    )


def int8_weight_only() -> Json:
    return config("Int8WeightOnlyConfig", group_size=None, granularity=_per_row(), set_inductor_config=True)


def int8_dynamic_activation_int8_weight(*, mapping: str) -> Json:
    """`mapping` of the activations: SYMMETRIC, torchao's default, or ASYMMETRIC."""
    return config(
        "Int8DynamicActivationInt8WeightConfig",
        act_mapping_type=_enum("MappingType", mapping),
        weight_only_decode=False,
        granularity=_per_row(),
        set_inductor_config=True,
        reduce_range=False,
    )


def float8_dynamic_activation_float8_weight() -> Json:
    return config(
        "Float8DynamicActivationFloat8WeightConfig",
        activation_dtype=_dtype("float8_e4m3fn"),
        weight_dtype=_dtype("float8_e4m3fn"),
        granularity=[_per_row(), _per_row()],
        packing_format=_enum("Float8PackingFormat", "PLAIN"),
        mm_config=config("Float8MMConfig", emulate=False, use_fast_accum=True, pad_inner_dim=False),
        activation_value_lb=None,
        activation_value_ub=None,
        kernel_preference=_enum("KernelPreference", "AUTO"),
        set_inductor_config=True,
        alg_id=0,
    )


def float8_dynamic_activation_int4_weight() -> Json:
    return config("Float8DynamicActivationInt4WeightConfig", int4_packing_format="plain")


def group_size_of(config: Json) -> int | None:
    """The group size along in_features; None where the config has none."""
    data = config["_data"]
    for granularity in (data.get("weight_granularity"), data.get("granularity")):
        if isinstance(granularity, dict) and granularity.get("_type") == "PerGroup":
            return int(granularity["_data"]["group_size"])
    if config["_type"] == "Float8DynamicActivationInt4WeightConfig":
        return 128  # not a setting of this config
    group_size = data.get("group_size")
    return None if group_size is None else int(group_size)


def with_group_size(config: Json, group_size: int) -> Json:
    """The same config with another group size; itself where it has none to set."""
    data = dict(config["_data"])
    for key in ("weight_granularity", "granularity"):
        if isinstance(data.get(key), dict) and data[key].get("_type") == "PerGroup":
            data[key] = _per_group(group_size)
    if data.get("group_size") is not None:
        data["group_size"] = group_size
    return {**config, "_data": data}


def bits_of(config: Json) -> int | None:
    """Bits of a weight's code; None for a config that this module does not know."""
    dtype = config["_data"].get("weight_dtype")
    if isinstance(dtype, dict) and dtype["_data"].startswith("int"):
        return int(dtype["_data"].removeprefix("int"))
    return _BITS.get(config["_type"])


_BITS = {
    "Int4WeightOnlyConfig": 4,
    "Float8DynamicActivationInt4WeightConfig": 4,
    "Int8WeightOnlyConfig": 8,
    "Int8DynamicActivationInt8WeightConfig": 8,
    "Float8WeightOnlyConfig": 8,
    "Float8DynamicActivationFloat8WeightConfig": 8,
}


def _per_group(group_size: int) -> Json:
    return config("PerGroup", group_size=group_size)


def _per_row() -> Json:
    return config("PerRow", dim=-1)


def _dtype(name: str) -> Json:
    return {"_type": "torch.dtype", "_data": name}


def _enum(enum_type: str, member: str) -> Json:
    return {"_type": enum_type, "_data": member}
