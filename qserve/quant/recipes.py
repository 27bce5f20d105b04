"""The table of recipes, and the way back from a `quantization_config` block to a recipe, without torchao.

What a block says is information for people and for `qserve inspect`: how each weight is read is written beside it in
the files, so a config that the table does not know is no reason to refuse a model.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from qserve.errors import BrokenCheckpoint, UnsupportedWeight, UsageError
from qserve.quant import configs
from qserve.quant.configs import Json
from qserve.quant.recipe import HeadPolicy, Recipe, entries_of, int8_head, most_common

HEAD_NAMES = ("lm_head", "model.lm_head", "embed_out", "output_projection", "language_model.lm_head")

_DYNAMIC = configs.int8_dynamic_activation_intx_weight(bits=4, group_size=32)
_NO_SYMMETRIC_FAKE_QUANTIZER = (
    "torchao has no fake quantizer for symmetric int8 activations; train int8-weight-only, or quantize after training"
)

_TABLE = (
    Recipe(
        name="int8-dynamic-act-int4-weight",
        config=_DYNAMIC,
        notes="the default: int4 weights in groups of 32, each token's activations in int8",
    ),
    Recipe(
        name="int4-weight-only",
        config=configs.int4_weight_only(group_size=128),
        torchao_needs="CUDA 9.0 and mslk",
        notes="two weights a byte, with a minimum for each group",
    ),
    Recipe(
        name="float8-dynamic-act-float8-weight",
        config=configs.float8_dynamic_activation_float8_weight(),
        torchao_needs="CUDA 8.9, MI300 or XPU",
        notes="e4m3 by row and by token",
    ),
    Recipe(
        name="float8-dynamic-act-int4-weight",
        config=configs.float8_dynamic_activation_int4_weight(),
        refusals={
            "prepare": "torchao's fake quantizer imitates a kernel that first rounds the weights to float8, which "
            "conversion does not; train with int8-dynamic-act-int4-weight"
        },
        torchao_needs="CUDA 9.0 and mslk",
        notes="symmetric int4, in groups of 128 always; activations in e4m3 by token",
    ),
    Recipe(
        name="int8-weight-only",
        config=configs.int8_weight_only(),
        notes="one scale a row; nearly lossless",
    ),
    Recipe(
        name="int8-dynamic-act-int8-weight",
        config=configs.int8_dynamic_activation_int8_weight(mapping="SYMMETRIC"),
        refusals={"prepare": _NO_SYMMETRIC_FAKE_QUANTIZER},
        notes="one scale a row, one a token",
    ),
    *(
        Recipe(
            name=f"intx-int{bits}-weight-only",
            config=configs.intx_weight_only(bits=bits, group_size=32),
            notes=f"int{bits} in groups of 32, float activations",
        )
        for bits in (4, 3, 2)
    ),
    Recipe(
        name="mixed",
        config=_DYNAMIC,
        rules=((r".*\.(v_proj|down_proj)", configs.int8_dynamic_activation_int8_weight(mapping="ASYMMETRIC")),),
        notes="the default, but int8 where errors cost most: value and down projections",
    ),
)

RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in _TABLE}
DEFAULT_RECIPE = "int8-dynamic-act-int4-weight"

# The quant_type of files from before torchao had config objects, and the recipe that takes its place.
_STRING_TYPES = {
    "int4_weight_only": "int4-weight-only",
    "int8_weight_only": "int8-weight-only",
    "int8_dynamic_activation_int8_weight": "int8-dynamic-act-int8-weight",
    "int8_dynamic_activation_int4_weight": DEFAULT_RECIPE,
    "float8_weight_only": "float8-dynamic-act-float8-weight",
    "float8_dynamic_activation_float8_weight": "float8-dynamic-act-float8-weight",
}


def find_recipe(name: str) -> Recipe:
    if name not in RECIPES:
        raise UsageError(f"no recipe is named {name!r}; known are {', '.join(RECIPES)}")
    return RECIPES[name]


def recipe_from_config(block: Mapping[str, Any]) -> Recipe:
    """The recipe that a `quantization_config` block names; the inverse of `Recipe.to_config`."""
    config = _config_of(block)
    if config["_type"] not in configs.NAMED_CONFIG_TYPES:
        recipe = _from_base(config)
        return replace(
            recipe, head=HeadPolicy.SAME if block.get("include_input_output_embeddings") else HeadPolicy.FLOAT
        )
    entries = {name: _checked(entry) for name, entry in entries_of(config).items()}
    head_name = next((name for name in HEAD_NAMES if name in entries), "lm_head")
    head = entries.pop(head_name, None)
    used = [entry for entry in entries.values() if entry is not None]
    if not used and head is None:
        raise BrokenCheckpoint("the quantization_config names no module that is quantized; expected at least one")
    base = most_common(used or [head])
    assert base is not None
    recipe = _from_entries(base, used)
    return replace(recipe, head=_head_policy(head, recipe), head_name=head_name, layers=entries)


def _config_of(block: Mapping[str, Any]) -> Json:
    """The one torchao config of a block; raises where there is none, or one whose weights cannot be read any more."""
    method = block.get("quant_method")
    if method != "torchao":
        raise UnsupportedWeight(
            f"the model is quantized by {method!r}; qserve reads torchao: take the float model and quantize it with "
            f"`qserve-train finalize BASE --quantize {DEFAULT_RECIPE} --out DIR`"
        )
    quant_type = block.get("quant_type")
    if isinstance(quant_type, str):
        recipe = _STRING_TYPES.get(quant_type, DEFAULT_RECIPE)
        raise UnsupportedWeight(_gone(f"quant_type {quant_type!r} is a name from before torchao had configs", recipe))
    if not isinstance(quant_type, Mapping) or not isinstance(quant_type.get("default"), Mapping):
        raise BrokenCheckpoint(f'quant_type is {quant_type!r}; expected {{"default": ...}} with a torchao config')
    config = _checked(quant_type["default"])
    assert config is not None
    return config


def _checked(config: Any) -> Json | None:
    if config is None:
        return None
    if not isinstance(config, Mapping) or "_type" not in config or not isinstance(config.get("_data"), Mapping):
        raise BrokenCheckpoint(f"found {config!r} as a torchao config; expected _type, _version and _data")
    config_type, version = config["_type"], config.get("_version", 1)
    if version < configs.CURRENT_VERSIONS.get(config_type, 1):
        raise UnsupportedWeight(
            _gone(f"{config_type} is of version {version}", _name_of(dict(config)) or DEFAULT_RECIPE)
        )
    if config_type == "Int8DynamicActivationInt4WeightConfig":
        return configs.with_group_size(_DYNAMIC, int(config["_data"].get("group_size", 32)))
    return dict(config)


def _gone(found: str, recipe: str) -> str:
    return (
        f"{found}; its weights are kept in a tensor class that torchao has removed. Make the artifact again from the "
        f"float model with `qserve-train finalize BASE --quantize {recipe} --out DIR`"
    )


def _from_base(config: Json) -> Recipe:
    name = _name_of(config)
    if name is None:
        return Recipe(
            name=config["_type"],
            config=config,
            refusals=dict.fromkeys(("prepare", "make"), "it is in no row of the table; choose a recipe that is"),
            notes="not in the table of recipes; each weight says itself how it is read",
        )
    return replace(RECIPES[name], config=config)


def _from_entries(base: Json, used: list[Json]) -> Recipe:
    if len({_name_of(entry) for entry in used}) > 1:
        return replace(RECIPES["mixed"], config=base, rules=())
    return _from_base(base)


def _name_of(config: Json) -> str | None:
    """The first row of the table that stores weights as this config does, whatever its group size and packing."""
    kind = (config["_type"], configs.bits_of(config))
    return next((row.name for row in _TABLE if (row.config["_type"], row.bits) == kind), None)


def _head_policy(head: Json | None, recipe: Recipe) -> HeadPolicy:
    if head is None:
        return HeadPolicy.FLOAT
    return HeadPolicy.INT8 if head == int8_head(recipe.activation) else HeadPolicy.SAME
