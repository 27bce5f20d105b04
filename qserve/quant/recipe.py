"""Recipe: what quantized means for a model, and the block of config.json that says it to transformers and vLLM.

Knows no tensors: `apply.py` carries a recipe out, `recipes.py` holds the table and reads a block back.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from qserve.errors import UsageError
from qserve.quant import configs
from qserve.quant.configs import Json
from qserve.quant.weight import ActivationQuantization

# What a group size falls back to where it does not divide in_features: the largest of these that does.
GROUP_SIZES = (128, 64, 32)


class HeadPolicy(StrEnum):
    """How the output head is quantized. The embedding is a look-up and always stays as it is."""

    INT8 = "int8"  # per row, with dynamic int8 activations where the recipe quantizes activations
    SAME = "same"  # as every other linear
    FLOAT = "float"  # not at all


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """One way to quantize a model, as data: torchao's own config, exceptions by name, and the head's policy.

    `rules` choose another config for modules whose whole name a pattern matches, first match first. `layers` is what
    came of them for one model: every quantized module by name or by `re:` pattern; None leaves a module as it is.
    """

    name: str
    config: Json  # torchao's base config, as its JSON
    rules: tuple[tuple[str, Json], ...] = ()
    head: HeadPolicy = HeadPolicy.INT8
    head_name: str = "lm_head"
    layers: Mapping[str, Json | None] = field(default_factory=dict)
    refusals: Mapping[str, str] = field(default_factory=dict)  # prepare, make or run -> why it cannot be done
    torchao_needs: str = ""  # to run it itself; qserve makes and runs every recipe on any machine
    notes: str = ""

    @property
    def group_size(self) -> int | None:
        return configs.group_size_of(self.config)

    @property
    def bits(self) -> int | None:
        return configs.bits_of(self.config)

    @property
    def activation(self) -> ActivationQuantization:
        return activation_of(self.config)

    @property
    def head_config(self) -> Json | None:
        match self.head:
            case HeadPolicy.FLOAT:
                return None
            case HeadPolicy.SAME:
                return self.config
        return int8_head(self.activation)

    def demand(self, verb: str) -> None:
        """Raises UsageError where `verb`, one of prepare, make and run, cannot be done with this recipe."""
        if verb in self.refusals:
            raise UsageError(f"recipe {self.name} cannot {verb}: {self.refusals[verb]}")

    def with_group_size(self, group_size: int) -> "Recipe":
        if self.group_size is None:
            raise UsageError(f"recipe {self.name} has no group size to set: it scales whole rows; leave it out")
        changed = configs.with_group_size(self.config, group_size)
        if configs.group_size_of(changed) != group_size:
            raise UsageError(f"recipe {self.name} has the fixed group size {self.group_size}; leave it out")
        rules = tuple((pattern, configs.with_group_size(rule, group_size)) for pattern, rule in self.rules)
        return replace(self, config=changed, rules=rules)

    def config_for(self, name: str) -> Json | None:
        """What the recipe asks for the linear module `name`, before its width is looked at."""
        if name == self.head_name:
            return self.head_config
        return next((rule for pattern, rule in self.rules if re.fullmatch(pattern, name)), self.config)

    def resolved(self, plan: Mapping[str, Json | None]) -> "Recipe":
        """This recipe with what was done to each linear module of a model written into `layers`."""
        body = {name: config for name, config in plan.items() if name != self.head_name}
        is_plain = self.head is HeadPolicy.FLOAT and all(config == self.config for config in body.values())
        return replace(self, layers={} if is_plain else collapse(body))

    def to_config(self) -> Json:
        """The `quantization_config` block as transformers 5 writes it and vLLM reads it."""
        head = self.head_config
        is_plain = head is None and not self.layers and not self.rules
        entries = {**(self.layers or self._usual_layers), **({} if head is None else {self.head_name: head})}
        return {
            "quant_method": "torchao",
            "quant_type": {"default": self.config if is_plain else configs.named(entries)},
            "modules_to_not_convert": None,
            "include_input_output_embeddings": head is not None,
            "untie_embedding_weights": False,
        }

    @property
    def _usual_layers(self) -> dict[str, Json | None]:
        """For a model that was not looked at: what linears are usually called."""
        rules: dict[str, Json | None] = {f"re:{pattern}": rule for pattern, rule in self.rules}
        return {**rules, "re:.*_proj": self.config}


_ACTIVATIONS = {
    "Int8DynamicActivationIntxWeightConfig": ActivationQuantization.INT8_ASYMMETRIC,
    "Float8DynamicActivationFloat8WeightConfig": ActivationQuantization.FLOAT8,
    "Float8DynamicActivationInt4WeightConfig": ActivationQuantization.FLOAT8,
    "MXDynamicActivationMXWeightConfig": ActivationQuantization.MXFP8,
    "NVFP4DynamicActivationNVFP4WeightConfig": ActivationQuantization.NVFP4,
}


def activation_of(config: Json) -> ActivationQuantization:
    """How a linear with this config quantizes its input."""
    if config["_type"] == "Int8DynamicActivationInt8WeightConfig":
        mapping = config["_data"].get("act_mapping_type") or {"_data": "SYMMETRIC"}
        is_asymmetric = mapping["_data"] == "ASYMMETRIC"
        return ActivationQuantization.INT8_ASYMMETRIC if is_asymmetric else ActivationQuantization.INT8_SYMMETRIC
    return _ACTIVATIONS.get(config["_type"], ActivationQuantization.NONE)


def int8_head(activation: ActivationQuantization) -> Json:
    """Asymmetric activations, as in the body of the default recipe: QAT has a fake quantizer for those alone."""
    if activation is ActivationQuantization.NONE:
        return configs.int8_weight_only()
    return configs.int8_dynamic_activation_int8_weight(mapping="ASYMMETRIC")


def fitting_group_size(in_features: int, group_size: int) -> int | None:
    """`group_size` where it divides in_features, else the largest smaller one of GROUP_SIZES that does."""
    candidates = (group_size, *(size for size in GROUP_SIZES if size < group_size))
    return next((size for size in candidates if in_features % size == 0), None)


def collapse(plan: Mapping[str, Json | None]) -> dict[str, Json | None]:
    """Module names -> a pattern for all layers that differ in their number alone; what deviates keeps its own name.

    model.layers.0.mlp.up_proj, model.layers.1.mlp.up_proj, ... -> re:model\\.layers\\.\\d+\\.mlp\\.up_proj
    """
    families: dict[str, list[str]] = {}
    for name in plan:
        families.setdefault(_family(name), []).append(name)
    exact: dict[str, Json | None] = {}
    patterns: dict[str, Json | None] = {}
    for family, names in families.items():
        usual = most_common(plan[name] for name in names)
        exact |= {name: plan[name] for name in names if plan[name] != usual}
        if usual is not None:
            patterns[family] = usual
    return exact | patterns


def most_common(values: Iterable[Json | None]) -> Json | None:
    """The value that occurs most often, the first of several."""
    found = list(values)
    counts = Counter(map(repr, found))
    return max(found, key=lambda value: counts[repr(value)])


def _family(name: str) -> str:
    if not any(part.isdigit() for part in name.split(".")):
        return name
    return "re:" + r"\.".join(r"\d+" if part.isdigit() else re.escape(part) for part in name.split("."))


def describe(config: Json | None) -> str:
    """A config in a few words, for reports: its torchao name and its group size."""
    if config is None:
        return "not quantized"
    group_size = configs.group_size_of(config)
    return str(config["_type"]) + (f" group {group_size}" if group_size else "")


def entries_of(config: Json) -> dict[str, Any]:
    """The entries of a config by module names."""
    data = config["_data"]
    return dict(data.get("fqn_to_config") or data.get("module_fqn_to_config") or {})
