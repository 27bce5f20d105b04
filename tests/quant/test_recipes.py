"""Recipes go to config.json and back, and transformers reads what is written."""

import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
from torchao.core.config import config_from_dict, config_to_dict
from transformers import TorchAoConfig

from qserve.errors import BrokenCheckpoint, UnsupportedWeight, UsageError
from qserve.quant import configs
from qserve.quant.recipe import HeadPolicy, Recipe, collapse, fitting_group_size
from qserve.quant.recipes import DEFAULT_RECIPE, RECIPES, find_recipe, recipe_from_config
from qserve.quant.weight import ActivationQuantization

LINEARS = [
    f"model.layers.{layer}.{name}"
    for layer in range(3)
    for name in ("self_attn.v_proj", "mlp.up_proj", "mlp.gate_proj")
]


def resolved(recipe: Recipe, head: HeadPolicy) -> Recipe:
    recipe = replace(recipe, head=head)
    return recipe.resolved({name: recipe.config_for(name) for name in (*LINEARS, "lm_head")})


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("head", HeadPolicy)
def test_a_block_is_what_transformers_writes_and_comes_back(name: str, head: HeadPolicy) -> None:
    recipe = resolved(RECIPES[name], head)
    block = recipe.to_config()
    assert TorchAoConfig.from_dict(block).to_dict() == block
    back = recipe_from_config(block)
    assert back.to_config() == block
    assert (back.name, back.group_size, back.bits, back.activation) == (
        recipe.name,
        recipe.group_size,
        recipe.bits,
        recipe.activation,
    )
    assert back.head_config == recipe.head_config
    assert dict(back.layers) == dict(recipe.layers)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_without_a_model_comes_back_too(name: str) -> None:
    block = RECIPES[name].to_config()
    assert TorchAoConfig.from_dict(block).to_dict() == block
    assert recipe_from_config(block).name == name


@pytest.mark.parametrize("name", RECIPES)
def test_configs_are_torchaos_own(name: str) -> None:
    config = RECIPES[name].config
    assert config_to_dict(config_from_dict(config)) == config


def test_a_float_head_and_equal_layers_need_no_names() -> None:
    block = resolved(find_recipe(DEFAULT_RECIPE), HeadPolicy.FLOAT).to_config()
    assert block["quant_type"]["default"]["_type"] == "Int8DynamicActivationIntxWeightConfig"
    assert block["include_input_output_embeddings"] is False


def test_a_quantized_head_is_named_beside_patterns() -> None:
    block = resolved(find_recipe("int4-weight-only"), HeadPolicy.INT8).to_config()
    entries = block["quant_type"]["default"]["_data"]["fqn_to_config"]
    assert list(entries) == [
        r"re:model\.layers\.\d+\.self_attn\.v_proj",
        r"re:model\.layers\.\d+\.mlp\.up_proj",
        r"re:model\.layers\.\d+\.mlp\.gate_proj",
        "lm_head",
    ]
    assert entries["lm_head"]["_type"] == "Int8WeightOnlyConfig"
    assert block["include_input_output_embeddings"] is True


def test_dynamic_recipes_have_a_dynamic_head() -> None:
    head = find_recipe(DEFAULT_RECIPE).head_config
    assert head is not None
    assert head["_type"] == "Int8DynamicActivationInt8WeightConfig"


def test_a_layer_that_deviates_keeps_its_name_before_the_pattern() -> None:
    usual, other = configs.int4_weight_only(group_size=64), configs.int4_weight_only(group_size=32)
    plan = {"a.0.q": usual, "a.1.q": other, "a.2.q": usual, "a.0.k": None, "a.1.k": None, "a.2.k": usual, "b": None}
    assert collapse(plan) == {"a.1.q": other, "a.2.k": usual, r"re:a\.\d+\.q": usual}


@pytest.mark.parametrize(
    ("in_features", "asked", "fitting"),
    [(576, 128, 64), (1024, 128, 128), (96, 128, 32), (172, 128, None), (64, 16, 16), (48, 32, None)],
)
def test_a_group_size_falls_back_to_one_that_divides(in_features: int, asked: int, fitting: int | None) -> None:
    assert fitting_group_size(in_features, asked) == fitting


def test_a_group_size_can_be_set_where_there_is_one() -> None:
    assert find_recipe("int4-weight-only").with_group_size(32).group_size == 32
    assert find_recipe(DEFAULT_RECIPE).with_group_size(64).group_size == 64
    for name in ("int8-weight-only", "float8-dynamic-act-int4-weight"):
        with pytest.raises(UsageError, match="leave it out"):
            find_recipe(name).with_group_size(32)


def block_of(config: Any) -> dict[str, Any]:
    return {"quant_method": "torchao", "quant_type": config}


def test_the_old_name_of_the_default_recipe_is_read() -> None:
    config = configs.config("Int8DynamicActivationInt4WeightConfig", group_size=64)
    recipe = recipe_from_config(block_of({"default": config}))
    assert (recipe.name, recipe.group_size) == (DEFAULT_RECIPE, 64)


def test_an_unknown_config_is_no_reason_to_refuse() -> None:
    config = configs.config("MXDynamicActivationMXWeightConfig", block_size=32)
    recipe = recipe_from_config(block_of({"default": config}))
    assert recipe.name == "MXDynamicActivationMXWeightConfig"
    assert recipe.activation is ActivationQuantization.MXFP8
    with pytest.raises(UsageError, match="in no row of the table"):
        recipe.demand("make")


def test_other_packings_and_granularities_are_the_same_recipe() -> None:
    tiles = configs.int4_weight_only(group_size=32)
    tiles["_data"]["int4_packing_format"]["_data"] = "TILE_PACKED_TO_4D"
    assert recipe_from_config(block_of({"default": tiles})).name == "int4-weight-only"


@pytest.mark.parametrize("config_type", configs.CURRENT_VERSIONS)
def test_version_one_is_refused_with_the_way_out(config_type: str) -> None:
    config = {"_type": config_type, "_version": 1, "_data": {}}
    with pytest.raises(UnsupportedWeight, match=f"{config_type} is of version 1.*qserve-train finalize"):
        recipe_from_config(block_of({"default": config}))
    inside = configs.named({"lm_head": config})
    with pytest.raises(UnsupportedWeight, match=f"{config_type} is of version 1"):
        recipe_from_config(block_of({"default": inside}))


def test_names_from_before_configs_are_refused_with_the_way_out() -> None:
    with pytest.raises(UnsupportedWeight, match=r"'int4_weight_only' .*--quantize int4-weight-only"):
        recipe_from_config(block_of("int4_weight_only"))


def test_another_method_is_refused_with_the_way_out() -> None:
    with pytest.raises(UnsupportedWeight, match="quantized by 'gptq'; qserve reads torchao"):
        recipe_from_config({"quant_method": "gptq", "bits": 4})


@pytest.mark.parametrize("quant_type", [None, 3, {}, {"default": None}, {"default": {"_type": "X"}}])
def test_a_malformed_block_is_named(quant_type: Any) -> None:
    with pytest.raises(BrokenCheckpoint, match="expected"):
        recipe_from_config(block_of(quant_type))


def test_an_unknown_recipe_names_the_known() -> None:
    with pytest.raises(UsageError, match="known are int8-dynamic-act-int4-weight"):
        find_recipe("int5")


def test_a_block_is_read_without_torchao() -> None:
    program = (
        "import sys\n"
        "from qserve.quant.recipes import RECIPES, recipe_from_config\n"
        "for recipe in RECIPES.values(): recipe_from_config(recipe.to_config())\n"
        "found = [name for name in sys.modules if name.split('.')[0] in ('torchao', 'transformers')]\n"
        "assert not found, found"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
