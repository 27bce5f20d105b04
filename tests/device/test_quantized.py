"""Quantized models against transformers' float model with the dequantized weights and the same rounding of inputs."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from qserve.kernels.aligned_scales import align_scales
from qserve.kernels.reference import ReferenceOps
from qserve.kernels.reference_activations import ROUND_TRIPS
from qserve.kernels.reference_integer import integer_linear
from qserve.quant.weight import ActivationQuantization, QuantizedWeight, Weight
from tests.device.driving import (
    CPU,
    assert_close,
    chunked_logits,
    config_of,
    load,
    prompt,
    their_logits,
    weights_of,
    whole_logits,
)
from tests.device.quantizing import DYNAMIC, WEIGHT_ONLY, imitate, quantize_int4, quantize_int8, quantize_linears
from tests.tiny import make_model


@pytest.mark.parametrize("name", WEIGHT_ONLY)
@pytest.mark.parametrize("model_type", ["llama", "phi3"])
def test_weight_only(model_type: str, name: str) -> None:
    theirs = make_model(model_type)
    weights = quantize_linears(weights_of(theirs), WEIGHT_ONLY[name])
    imitate(theirs, weights)
    ours = load(config_of(theirs), weights)
    expected = their_logits(theirs, prompt(40))
    assert_close(whole_logits(ours, prompt(40)), expected)
    assert_close(chunked_logits(ours, [prompt(40), prompt(7)], sizes=[9, 1])[0], expected)


@pytest.mark.parametrize("name", DYNAMIC)
def test_dynamic_activations(name: str) -> None:
    """Float noise tips a code that lies on an edge, so what the tipped ones reach may be a little apart."""
    theirs = make_model("llama")
    weights = quantize_linears(weights_of(theirs), DYNAMIC[name])
    imitate(theirs, weights)
    found = whole_logits(load(config_of(theirs), weights), prompt(40))
    wanted = their_logits(theirs, prompt(40))
    assert_close(found[0], wanted[0])
    assert (found - wanted).abs().mean() < 0.03 * wanted.std()


@pytest.mark.parametrize("name", DYNAMIC)
def test_one_dynamic_linear(name: str) -> None:
    """From the same input the codes are the same, and only the order of the sums differs."""
    torch.manual_seed(0)
    values, x = torch.randn(48, 64), torch.randn(20, 64)
    weight = DYNAMIC[name](values)
    aligned = align_scales(weight)
    if aligned is not None:
        weight = replace(weight, scales=aligned.values)
    ops = ReferenceOps(device=CPU)
    found = ops.norm_linear(x, None, ops.pack([weight], biases=[None]))
    assert_close(found, ROUND_TRIPS[weight.activation](x) @ weight.dequantize().T)
    if weight.activation is not ActivationQuantization.FLOAT8:
        assert_close(found, integer_linear(x, weight))


def test_each_linear_has_its_own_scale_for_the_input() -> None:
    theirs = make_model("llama")
    generator = torch.Generator().manual_seed(3)

    def quantize(values: torch.Tensor) -> QuantizedWeight:
        pre_scale = torch.rand(values.shape[1], generator=generator) + 0.5
        return replace(quantize_int8(values / pre_scale), pre_scale=pre_scale)

    weights = quantize_linears(weights_of(theirs), quantize)
    imitate(theirs, weights)
    assert_close(whole_logits(load(config_of(theirs), weights), prompt(40)), their_logits(theirs, prompt(40)))


def test_mixed_weights_that_share_an_input() -> None:
    theirs = make_model("qwen2")
    weights = weights_of(theirs)
    for name, quantize in (("q_proj", quantize_int4), ("v_proj", quantize_int8)):
        for layer in range(3):
            key = f"model.layers.{layer}.self_attn.{name}.weight"
            weights[key] = quantize(weights[key])  # type: ignore[operator]
    imitate(theirs, weights)
    assert_close(whole_logits(load(config_of(theirs), weights), prompt(40)), their_logits(theirs, prompt(40)))


def test_bfloat16_weights_compute_as_in_float32() -> None:
    theirs = make_model("llama")
    weights: dict[str, Weight] = {}
    for name, weight in weights_of(theirs).items():
        assert isinstance(weight, torch.Tensor)
        weights[name] = weight.to(torch.bfloat16)
        theirs.get_parameter(name).data.copy_(weights[name])
    assert_close(whole_logits(load(config_of(theirs), weights), prompt(40)), their_logits(theirs, prompt(40)))


def test_compact_weights_compute_the_same() -> None:
    """Kept in their own dtype and widened at every call: the same numbers in half the memory."""
    torch.manual_seed(0)
    weight, x = torch.randn(48, 64).to(torch.bfloat16), torch.randn(5, 64)
    wide, compact = ReferenceOps(device=CPU), ReferenceOps(device=CPU, is_compact=True)
    packed = [ops.pack([weight], biases=[None]) for ops in (wide, compact)]
    assert packed[0].num_bytes == 2 * packed[1].num_bytes
    assert torch.equal(wide.norm_linear(x, None, packed[0]), compact.norm_linear(x, None, packed[1]))


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "lm_head.weight"])
@pytest.mark.parametrize("quantize", [None, quantize_int8, quantize_int4])
def test_tied_heads(quantize: Callable[..., QuantizedWeight] | None, name: str) -> None:
    """Float or quantized, and whichever of the two tensors the file has."""
    theirs = make_model("llama", tie_word_embeddings=True)
    weights = weights_of(theirs)
    table = weights.pop("model.embed_tokens.weight")
    assert isinstance(table, torch.Tensor)
    tied: Weight = table if quantize is None else quantize(table)
    if isinstance(tied, QuantizedWeight):
        theirs.model.embed_tokens.weight.data.copy_(tied.dequantize())
    ours = load(config_of(theirs), {**weights, name: tied})
    assert_close(whole_logits(ours, prompt(40)), their_logits(theirs, prompt(40)))


def test_a_quantized_head_beside_a_float_embedding() -> None:
    theirs = make_model("llama", tie_word_embeddings=True)
    weights = weights_of(theirs)
    table = weights["model.embed_tokens.weight"]
    assert isinstance(table, torch.Tensor)
    weights["lm_head.weight"] = quantize_int8(table)
    theirs.lm_head.weight = torch.nn.Parameter(quantize_int8(table).dequantize())
    assert_close(whole_logits(load(config_of(theirs), weights), prompt(40)), their_logits(theirs, prompt(40)))
