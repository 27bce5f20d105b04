"""Models that only transformers knows, over our cache: the same logits, the same text, and clear refusals."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from qserve.device.fallback import Fallback, PackedLinear, load_fallback
from qserve.device.load import load_model, model_limit
from qserve.engine.request import Request
from qserve.errors import BrokenCheckpoint, UnsupportedArchitecture
from qserve.kernels.reference import ReferenceOps
from qserve.quant.weight import ActivationQuantization, QuantizedWeight, Weight
from tests.device.driving import (
    CPU,
    GREEDY,
    assert_close,
    chunked_logits,
    config_of,
    generate,
    prompt,
    runner_for,
    their_logits,
    weights_of,
    whole_logits,
)
from tests.device.quantizing import imitate, quantize_int4, quantize_int8
from tests.tiny import make_model

FLOAT32, INT8 = torch.float32, torch.int8
MODELS: dict[str, dict[str, Any]] = {
    "gpt_neox": {},
    "gpt2": {},
    "opt": {"word_embed_proj_dim": 64},
    "stablelm": {"partial_rotary_factor": 0.5},
    "olmo": {},
    "starcoder2": {"sliding_window": 24},
    "cohere2": {"sliding_window": 24, "logit_scale": 0.4},
    "mixtral": {"num_local_experts": 4},
    "deepseek_v3": {  # keys are wider than values
        "num_key_value_heads": 4,
        "q_lora_rank": 24,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 12,
        "qk_rope_head_dim": 8,
        "v_head_dim": 10,
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "first_k_dense_replace": 1,
    },
}


def _load(theirs: Any, weights: dict[str, Weight] | None = None, *, max_positions: int = 256) -> Fallback:
    weights = weights_of(theirs) if weights is None else weights
    ops = ReferenceOps(device=CPU)
    return load_fallback(config_of(theirs), weights, ops=ops, device=CPU, max_positions=max_positions)


@pytest.mark.parametrize("model_type", MODELS)
def test_logits(model_type: str) -> None:
    theirs = make_model(model_type, **MODELS[model_type])
    ours = _load(theirs)
    prompts = [prompt(60), prompt(21, seed=1)]
    expected = [their_logits(theirs, ids) for ids in prompts]
    assert_close(whole_logits(ours, prompts[0]), expected[0])
    for found, wanted in zip(chunked_logits(ours, prompts, sizes=[16, 1]), expected, strict=True):
        assert_close(found, wanted)


@pytest.mark.parametrize("model_type", ["starcoder2", "deepseek_v3"])
def test_a_cache_of_codes_is_close(model_type: str) -> None:
    ours = _load(make_model(model_type, **MODELS[model_type]))
    exact, rounded = (chunked_logits(ours, [prompt(60)], sizes=[16], dtype=dtype)[0] for dtype in (FLOAT32, INT8))
    assert 0 < float((rounded - exact).norm() / exact.norm()) < 0.02


@pytest.mark.parametrize("model_type", ["gpt_neox", "starcoder2"])
def test_greedy_text(model_type: str) -> None:
    theirs = make_model(model_type, **MODELS[model_type])
    request = Request("r", prompt(12), GREEDY)
    generate(runner_for(_load(theirs)), [request], num_tokens=64)
    ids = torch.tensor([request.token_ids[:12]])
    wanted = theirs.generate(ids, do_sample=False, min_new_tokens=64, max_new_tokens=64, eos_token_id=None)
    assert request.token_ids == wanted[0].tolist()


@pytest.mark.parametrize("quantize", [quantize_int4, quantize_int8])
def test_quantized_linears_are_packed_as_they_are(quantize: Callable[..., QuantizedWeight]) -> None:
    theirs = make_model("gpt_neox")
    weights = weights_of(theirs)
    for name, module in theirs.named_modules():
        if isinstance(module, torch.nn.Linear):
            weights[f"{name}.weight"] = quantize(weights[f"{name}.weight"])
    ours = _load(theirs, weights)
    imitate(theirs, weights)
    assert_close(whole_logits(ours, prompt(40)), their_logits(theirs, prompt(40)))


def test_dynamic_activations_reach_the_fallback() -> None:
    theirs = make_model("gpt_neox")
    weights = weights_of(theirs)
    name = "gpt_neox.layers.0.mlp.dense_h_to_4h.weight"
    weights[name] = quantize_int8(weights[name], activation=ActivationQuantization.INT8_ASYMMETRIC)  # type: ignore[arg-type]
    ours = _load(theirs, weights)
    imitate(theirs, weights)
    found, wanted = whole_logits(ours, prompt(40)), their_logits(theirs, prompt(40))
    assert (found - wanted).abs().mean() < 0.01 * wanted.std()


def test_a_quantized_input_without_a_linear_is_refused() -> None:
    theirs = make_model("gpt2")  # whose linears are of a class of its own
    weights = weights_of(theirs)
    name = "transformer.h.0.mlp.c_fc.weight"
    weights[name] = quantize_int8(weights[name], activation=ActivationQuantization.INT8_ASYMMETRIC)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedArchitecture, match=f"{name} quantizes its input"):
        _load(theirs, weights)


@pytest.mark.parametrize(
    ("model_type", "changes", "message"),
    [
        ("mamba", {"num_hidden_layers": 1}, "layers of type linear_attention keep other state"),
        ("falcon", {}, "asks transformers' attention interface for nothing"),
        ("bloom", {}, "takes no position_ids"),
        ("gpt_oss", {"num_local_experts": 4, "head_dim": 16}, "over a paged cache the logits"),
    ],
)
def test_what_cannot_run_says_why(model_type: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedArchitecture, match=message):
        _load(make_model(model_type, **changes))


def test_a_type_that_nobody_knows() -> None:
    ops = ReferenceOps(device=CPU)
    for name, message in (("mystery", "which neither the decoder nor"), ("vit", "is no causal language model")):
        with pytest.raises(UnsupportedArchitecture, match=message):
            load_model({"model_type": name}, {}, ops=ops, device=CPU, max_positions=8)


def test_what_only_a_long_text_would_show() -> None:
    rotary = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1000.0}
    theirs = make_model("olmo", rope_parameters=rotary, max_position_embeddings=64)
    with pytest.raises(UnsupportedArchitecture, match="--max-model-len 64"):
        _load(theirs, max_positions=65)
    assert_close(whole_logits(_load(theirs, max_positions=64), prompt(60)), their_logits(theirs, prompt(60)))


def test_tensors_that_do_not_fit() -> None:
    theirs = make_model("gpt_neox")
    name = "gpt_neox.layers.1.attention.dense.weight"
    with pytest.raises(BrokenCheckpoint, match=f"{name} has shape .3, 3., but config.json implies .64, 64."):
        _load(theirs, {**weights_of(theirs), name: torch.zeros(3, 3)})
    weights = weights_of(theirs)
    del weights[name]
    with pytest.raises(BrokenCheckpoint, match=f"1 tensors are missing, the first is {name}"):
        _load(theirs, weights)


def test_no_linear_is_left_to_transformers() -> None:
    ours = _load(make_model("stablelm"))
    modules = list(ours._theirs.modules())
    assert not any(type(module) is torch.nn.Linear for module in modules)
    assert sum(isinstance(module, PackedLinear) for module in modules) == 3 * 7 + 1
    assert ours.num_bytes > 0


def test_limits() -> None:
    assert model_limit({"model_type": "gpt2", "n_positions": 77}) == 77
    assert model_limit({"model_type": "mystery"}) is None
    assert model_limit(config_of(make_model("llama"))) == 512
