"""Weighs what config.json says about quantization against what the tensors are.

The tensors themselves win for reading: they carry all that reading needs. The config says which recipe made them.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qserve.checkpoint.contents import TensorInfo, Tier
from qserve.errors import UnsupportedWeight
from qserve.quant.recipe import Recipe
from qserve.quant.recipes import recipe_from_config

# The tensor classes that each torchao config makes; a config that is not listed is not compared.
CLASSES = {
    "Float8DynamicActivationFloat8WeightConfig": ("Float8Tensor",),
    "Float8DynamicActivationInt4WeightConfig": ("Int4Tensor",),
    "Float8WeightOnlyConfig": ("Float8Tensor",),
    "Int4WeightOnlyConfig": ("Int4Tensor", "Int4TilePackedTo4dTensor", "Int4PlainInt32Tensor"),
    "Int8DynamicActivationInt8WeightConfig": ("Int8Tensor",),
    "Int8DynamicActivationIntxWeightConfig": ("IntxUnpackedToInt8Tensor",),
    "Int8WeightOnlyConfig": ("Int8Tensor",),
    "IntxWeightOnlyConfig": ("IntxUnpackedToInt8Tensor",),
    "MXDynamicActivationMXWeightConfig": ("MXTensor",),
    "NVFP4DynamicActivationNVFP4WeightConfig": ("NVFP4Tensor",),
    "NVFP4WeightOnlyConfig": ("NVFP4Tensor",),
}
_TIERS = {"safetensors": Tier.METADATA, "bin": Tier.TENSORS}


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    recipe: Recipe | None
    tier: Tier
    evidence: str
    warnings: tuple[str, ...]


def weigh(
    quantization: Mapping[str, Any] | None, tensors: Mapping[str, TensorInfo], *, told_in: Path, format: str
) -> Verdict:
    """`quantization` is the quantization_config of `told_in`, or None where it has none."""
    classes = sorted({info.class_name for info in tensors.values() if info.is_quantized})
    if quantization is None:
        return _without_config(classes, format=format)
    try:
        recipe = recipe_from_config(dict(quantization))
    except UnsupportedWeight as error:
        return _with_unknown_config(error, classes, told_in=told_in, format=format)
    return _with_config(recipe, quantization, tensors, told_in=told_in, format=format)


def _without_config(classes: list[str], *, format: str) -> Verdict:
    if not classes:
        return Verdict(recipe=None, tier=Tier.NONE, evidence="nothing is quantized", warnings=())
    return Verdict(recipe=None, tier=_TIERS[format], evidence=_seen(classes, format), warnings=())


def _with_unknown_config(error: UnsupportedWeight, classes: list[str], *, told_in: Path, format: str) -> Verdict:
    """A config that cannot be read any more does no harm where the tensors speak for themselves."""
    if not classes:
        raise UnsupportedWeight(f"{told_in}: {error}") from error
    warning = f"{told_in}: {error} The tensors ({', '.join(classes)}) can be read without it, and won"
    return Verdict(recipe=None, tier=_TIERS[format], evidence=_seen(classes, format), warnings=(warning,))


def _with_config(
    recipe: Recipe, quantization: Mapping[str, Any], tensors: Mapping[str, TensorInfo], *, told_in: Path, format: str
) -> Verdict:
    configs = sorted(set(_config_types(quantization)))
    told = f"quantization_config of {told_in} ({', '.join(configs)})"
    quantized = [info for info in tensors.values() if info.is_quantized]
    if not quantized:
        warning = f"{told}: yet no tensor is quantized. The tensors won: the model is read as float"
        return Verdict(recipe=None, tier=Tier.NONE, evidence="no tensor is quantized", warnings=(warning,))
    difference = _difference(recipe, configs, quantized)
    if difference is None:
        return Verdict(recipe=recipe, tier=Tier.CONFIG, evidence=told, warnings=())
    warning = f"{told} makes {difference}: the tensors won, for they carry all that reading needs"
    evidence = _seen(sorted({info.class_name for info in quantized}), format)
    return Verdict(recipe=None, tier=_TIERS[format], evidence=evidence, warnings=(warning,))


def _difference(recipe: Recipe, configs: list[str], quantized: list[TensorInfo]) -> str | None:
    """What the config makes and what the tensors are instead, in words; None where they agree."""
    known = {name for config in configs for name in CLASSES.get(config, ())}
    classes = {info.class_name for info in quantized}
    if known and not classes <= known:
        return f"{', '.join(sorted(known))}, yet the tensors are {', '.join(sorted(classes))}"
    own = [info for info in quantized if info.class_name in CLASSES.get(recipe.config["_type"], ())]
    for what, told, found in (
        ("group size", recipe.group_size, {info.group_size for info in own}),
        ("bits", recipe.bits, {info.bits for info in own}),
    ):
        if own and told is not None and told not in found:
            return f"{what} {told}, yet the tensors have {', '.join(map(str, sorted(found)))}"
    return None


def _seen(classes: list[str], format: str) -> str:
    where = {"safetensors": "__metadata__ of the safetensors shards", "bin": "the tensors of the .bin shards"}[format]
    return f"{where} ({', '.join(classes)})"


def _config_types(config: Any) -> Iterable[str]:
    """The torchao config classes named anywhere in a quantization_config."""
    if isinstance(config, list):
        for item in config:
            yield from _config_types(item)
    if isinstance(config, dict):
        if str(config.get("_type", "")).endswith("Config") and config["_type"] not in ("FqnToConfig", "AOBaseConfig"):
            yield config["_type"]
        for value in config.values():
            yield from _config_types(value)
