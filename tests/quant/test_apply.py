"""Every recipe over tiny models on this machine: what it makes, what it leaves, and what it says about both."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchao.core.config import config_from_dict
from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
from torchao.quantization import quantize_
from transformers import AutoModelForCausalLM

from qserve.errors import UsageError
from qserve.quant import configs
from qserve.quant.apply import Report, convert_qat, num_bytes, prepare_qat, quantize
from qserve.quant.read import read_tensor
from qserve.quant.recipe import HeadPolicy
from qserve.quant.recipes import DEFAULT_RECIPE, RECIPES, find_recipe
from qserve.quant.tensors import make_tensor
from qserve.quant.weight import QuantizedWeight
from tests import tiny

CLASSES = {
    "int8-dynamic-act-int4-weight": "IntxUnpackedToInt8Tensor",
    "int4-weight-only": "Int4Tensor",
    "float8-dynamic-act-float8-weight": "Float8Tensor",
    "float8-dynamic-act-int4-weight": "Int4Tensor",
    "int8-weight-only": "Int8Tensor",
    "int8-dynamic-act-int8-weight": "Int8Tensor",
    "intx-int4-weight-only": "IntxUnpackedToInt8Tensor",
    "intx-int3-weight-only": "IntxUnpackedToInt8Tensor",
    "intx-int2-weight-only": "IntxUnpackedToInt8Tensor",
    "mixed": "IntxUnpackedToInt8Tensor",
}
# The worst relative error of a weight that the format allows for values drawn from a normal distribution.
TOLERANCE = {2: 0.7, 3: 0.35, 4: 0.15, 8: 0.03}
TRAINABLE = sorted(set(RECIPES) - {"float8-dynamic-act-int4-weight", "int8-dynamic-act-int8-weight"})
IDS = torch.tensor([[5, 99, 3, 200, 17, 42]])


def weight_of(model: nn.Module, name: str) -> QuantizedWeight:
    weight = read_tensor(name, model.get_submodule(name).get_parameter("weight"))
    assert isinstance(weight, QuantizedWeight)
    return weight


def small_model(**changes: Any) -> Any:
    """Wide enough that every recipe finds its groups."""
    return tiny.make_model(**{"hidden_size": 128, "num_hidden_layers": 1, **changes})


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_recipe_is_made_here(name: str, tied: bool, dtype: torch.dtype) -> None:
    model = small_model(tie_word_embeddings=tied, num_hidden_layers=2).to(dtype)
    original = copy.deepcopy(model)
    steps: list[tuple[int, int, str]] = []
    report = quantize(model, find_recipe(name), progress=lambda *step: steps.append(step))
    assert len(steps) == len(report.layers) == 2 * 7 + 1
    assert not report.skipped
    assert {layer.class_name for layer in report.layers} == {CLASSES[name], "Int8Tensor"}
    for layer in report.layers:
        before = original.get_submodule(layer.name).weight.float()
        weight = weight_of(model, layer.name)
        error = (weight.dequantize().float() - before).norm() / before.norm()
        assert error < TOLERANCE[weight.bits], layer
        assert (weight.bits, weight.dtype) == (layer.bits, dtype)
    assert not model.config.tie_word_embeddings
    assert torch.equal(model.model.embed_tokens.weight, original.model.embed_tokens.weight)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert (report.bytes_before, report.bytes_after) == (num_bytes(original), num_bytes(model))


@pytest.mark.parametrize("name", [DEFAULT_RECIPE, "int8-weight-only", "int8-dynamic-act-int8-weight"])
def test_weights_are_what_torchao_makes_of_them(name: str) -> None:
    weight = torch.randn(48, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    linear = nn.Linear(128, 48, bias=False)
    linear.weight = nn.Parameter(weight)
    holder = nn.Sequential(linear)
    quantize_(holder, config_from_dict(find_recipe(name).config))
    theirs: Any = holder[0].weight
    ours: Any = make_tensor(weight, find_recipe(name).config)
    assert torch.equal(ours.qdata, theirs.qdata)
    assert torch.equal(ours.scale, theirs.scale)
    assert ours._quantization_type() == theirs._quantization_type() if hasattr(ours, "_quantization_type") else True


def test_a_float_head_stays_tied() -> None:
    model = small_model(tie_word_embeddings=True)
    report = quantize(model, find_recipe(DEFAULT_RECIPE), head="float")
    assert model.config.tie_word_embeddings
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert [(layer.name, layer.reason) for layer in report.skipped] == [
        ("lm_head", "the recipe leaves the head as it is")
    ]


def test_a_head_can_be_as_the_body() -> None:
    model = small_model()
    quantize(model, find_recipe("int4-weight-only"), head=HeadPolicy.SAME, group_size=32)
    assert (weight_of(model, "lm_head").bits, weight_of(model, "lm_head").group_size) == (4, 32)


def test_widths_that_do_not_divide_fall_back_or_are_named() -> None:
    model = tiny.make_model(hidden_size=64, intermediate_size=172, num_hidden_layers=2)
    report = quantize(model, find_recipe("int4-weight-only"))
    by_name = {layer.name: layer for layer in report.layers}
    assert by_name["model.layers.0.mlp.up_proj"].group_size == 64
    assert "group size 64, because in_features 64" in by_name["model.layers.0.mlp.up_proj"].note
    assert {layer.name for layer in report.skipped} == {f"model.layers.{layer}.mlp.down_proj" for layer in range(2)}
    assert "in_features 172" in report.skipped[0].reason
    entries = report.recipe.to_config()["quant_type"]["default"]["_data"]["fqn_to_config"]
    assert not any("down_proj" in name for name in entries)
    assert configs.group_size_of(entries[r"re:model\.layers\.\d+\.mlp\.up_proj"]) == 64


def test_float8_leaves_widths_that_its_kernels_refuse() -> None:
    model = tiny.make_model(intermediate_size=172, num_hidden_layers=1)
    report = quantize(model, find_recipe("float8-dynamic-act-float8-weight"))
    assert len(report.skipped) == 3
    assert "not a multiple of 16" in report.skipped[0].reason


def test_matrices_outside_linears_are_named() -> None:
    model = tiny.make_model("gpt2", n_embd=64, n_layer=1, n_head=4)
    report = quantize(model, find_recipe("int8-weight-only"))
    assert [layer.name for layer in report.layers] == ["lm_head"]
    assert all("Conv1D" in layer.reason for layer in report.skipped)
    assert len(report.skipped) == 4 * 3


def test_nothing_to_quantize_is_an_error() -> None:
    model = nn.Sequential(nn.Linear(20, 4))
    with pytest.raises(UsageError, match=r"no layer could be quantized.*in_features 20"):
        quantize(model, find_recipe(DEFAULT_RECIPE))


def test_a_quantized_model_is_refused() -> None:
    model = small_model()
    quantize(model, find_recipe("int8-weight-only"))
    with pytest.raises(UsageError, match="is quantized already"):
        quantize(model, find_recipe("int8-weight-only"))


def on_grid(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """(weight, scales, offsets) of a weight whose groups of 32 lie on all of their 16 levels."""
    generator = torch.Generator().manual_seed(3)
    codes = torch.stack([torch.randperm(32, generator=generator) % 16 - 8 for _ in range(24 * 4)]).view(24, 4, 32)
    scales = (torch.rand(24, 4, generator=generator) + 0.5).mul(0.01).to(dtype)
    offsets = (torch.rand(24, 4, generator=generator) - 0.5).mul(0.05).to(dtype)
    values = codes * scales.float().unsqueeze(-1) + offsets.float().unsqueeze(-1)
    return values.view(24, 128).to(dtype), scales, offsets


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-6)])
def test_int4_keeps_weights_that_lie_on_sixteen_levels(dtype: torch.dtype, tolerance: float) -> None:
    weight, scales, offsets = on_grid(dtype)
    config = configs.int4_weight_only(group_size=32)
    found = read_tensor("w", make_tensor(weight, config))
    given = read_tensor("w", make_tensor(weight, config, scales=scales, offsets=offsets))
    assert isinstance(found, QuantizedWeight)
    assert isinstance(given, QuantizedWeight)
    assert torch.equal(found.codes, given.codes)
    assert torch.equal(given.dequantize(), weight)
    assert (found.dequantize() - weight).abs().max() <= tolerance * weight.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [0.0, 0.37, -5.0])
def test_int4_keeps_constant_groups(dtype: torch.dtype, value: float) -> None:
    weight = torch.full((4, 64), value, dtype=dtype)
    read = read_tensor("w", make_tensor(weight, configs.int4_weight_only(group_size=32)))
    assert isinstance(read, QuantizedWeight)
    torch.testing.assert_close(read.dequantize(), weight)


def test_given_scales_are_kept_where_choosing_again_would_change_them() -> None:
    scales = torch.rand(8, 2, generator=torch.Generator().manual_seed(0)) + 0.5
    codes = torch.randint(-8, 8, (8, 2, 32), generator=torch.Generator().manual_seed(1))
    weight = (codes * scales.unsqueeze(-1)).view(8, 64)
    config = find_recipe(DEFAULT_RECIPE).config
    kept = read_tensor("w", make_tensor(weight, config, scales=scales))
    again = read_tensor("w", make_tensor(weight, config))
    assert isinstance(kept, QuantizedWeight)
    assert isinstance(again, QuantizedWeight)
    assert torch.equal(kept.dequantize(), weight)
    assert not torch.allclose(again.dequantize(), weight, rtol=0.01)


def fake_quantized_weights(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: module.weight_fake_quantizer(module.weight).detach()  # type: ignore[operator]
        for name, module in model.named_modules()
        if hasattr(module, "weight_fake_quantizer")
    }


@pytest.mark.parametrize("name", TRAINABLE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_was_trained_is_what_is_converted(name: str, dtype: torch.dtype) -> None:
    model = small_model(tie_word_embeddings=True).to(dtype)
    if name == "int4-weight-only" and dtype != torch.float32:
        with pytest.raises(UsageError, match="trains exactly in float32 alone"):
            prepare_qat(model, find_recipe(name))
        return
    plan = prepare_qat(model, find_recipe(name))
    model.train()
    model(IDS, labels=IDS).loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.01 * (parameter.grad if parameter.grad is not None else 0)
    trained = fake_quantized_weights(model)
    report = convert_qat(model, plan)
    assert [layer.name for layer in report.layers] == list(trained)
    for layer, values in trained.items():
        assert torch.equal(weight_of(model, layer).dequantize(), values), layer


@pytest.mark.parametrize("name", [DEFAULT_RECIPE, "intx-int4-weight-only"])
def test_logits_before_and_after_conversion_are_equal(name: str) -> None:
    model = small_model()
    plan = prepare_qat(model, find_recipe(name), head="float")
    with torch.no_grad():
        trained = model(IDS).logits
        convert_qat(model, plan)
        assert torch.equal(model(IDS).logits, trained)


@pytest.mark.parametrize("name", sorted(set(RECIPES) - set(TRAINABLE)))
def test_what_would_not_convert_exactly_is_refused_before_training(name: str) -> None:
    with pytest.raises(UsageError, match=f"recipe {name} cannot prepare: torchao"):
        prepare_qat(small_model(), find_recipe(name))


def test_convert_wants_the_prepared_model() -> None:
    plan = prepare_qat(small_model(), find_recipe(DEFAULT_RECIPE))
    with pytest.raises(UsageError, match="carries no fake quantizer"):
        convert_qat(small_model(), plan)


def test_a_prepared_model_is_not_prepared_again() -> None:
    model = small_model()
    prepare_qat(model, find_recipe(DEFAULT_RECIPE))
    with pytest.raises(UsageError, match="carries a fake quantizer already"):
        quantize(model, find_recipe(DEFAULT_RECIPE))


def save(model: Any, report: Report, directory: Path) -> None:
    """As an artifact is written: torchao's flattened safetensors and the recipe's block in config.json."""
    tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    flat, metadata = flatten_tensor_state_dict(tensors)
    save_file(flat, directory / "model.safetensors", metadata={**metadata, "format": "pt"})
    config = {**model.config.to_dict(), "quantization_config": report.recipe.to_config(), "dtype": "float32"}
    (directory / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("name", RECIPES)
def test_transformers_loads_every_recipe_with_equal_weights(name: str, tmp_path: Path) -> None:
    model = small_model(tie_word_embeddings=True)
    report = quantize(model, find_recipe(name))
    save(model, report, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    for layer in report.layers:
        assert torch.equal(weight_of(loaded, layer.name).dequantize(), weight_of(model, layer.name).dequantize())
        assert weight_of(loaded, layer.name).activation is weight_of(model, layer.name).activation


@pytest.mark.parametrize("name", [DEFAULT_RECIPE, "int8-weight-only", "mixed"])
@pytest.mark.parametrize("head", HeadPolicy)
def test_transformers_loads_it_with_equal_logits(name: str, head: HeadPolicy, tmp_path: Path) -> None:
    model = small_model(tie_word_embeddings=True)
    report = quantize(model, find_recipe(name), head=head)
    save(model, report, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)
