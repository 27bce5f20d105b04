"""Configurations and tensors that do not go together, and the ways in which files name the same model."""

from typing import Any

import pytest
import torch

from qserve.device.architectures import read_spec
from qserve.errors import ArtifactError, BrokenCheckpoint, UnsupportedArchitecture
from qserve.quant.weight import Weight
from tests.device.driving import assert_close, config_of, load, prompt, their_logits, weights_of, whole_logits
from tests.tiny import make_model

Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def llama() -> tuple[dict[str, Any], dict[str, Weight]]:
    theirs = make_model("llama")
    return config_of(theirs), weights_of(theirs)


def _message(config: dict[str, Any], weights: dict[str, Weight], kind: type[ArtifactError] = BrokenCheckpoint) -> str:
    with pytest.raises(kind) as caught:
        load(config, weights)
    return str(caught.value)


def test_a_shape_that_disagrees(llama: tuple[dict[str, Any], dict[str, Weight]]) -> None:
    config, weights = llama
    message = _message({**config, "num_attention_heads": 8}, weights)
    assert "model.layers.0.self_attn.q_proj.weight has shape (64, 64), but config.json implies (128, 64)" in message
    message = _message({**config, "vocab_size": 500}, weights)
    assert "model.embed_tokens.weight has shape (512, 64), but config.json implies (500, 64)" in message


def test_a_missing_tensor(llama: tuple[dict[str, Any], dict[str, Weight]]) -> None:
    config, weights = llama
    message = _message(config, {name: weight for name, weight in weights.items() if name != Q_PROJ})
    assert f"{Q_PROJ} is missing; config.json expects it with shape (64, 64)" in message
    message = _message(config, {name: weight for name, weight in weights.items() if name != "lm_head.weight"})
    assert "lm_head.weight is missing, and config.json does not tie" in message


def test_a_tensor_too_many(llama: tuple[dict[str, Any], dict[str, Weight]]) -> None:
    config, weights = llama
    extra = "model.layers.1.self_attn.q_proj.bias"
    assert f"the first is {extra}" in _message(config, {**weights, extra: torch.zeros(64)})
    assert "model.layers.2." in _message({**config, "num_hidden_layers": 2}, weights)
    load(config, {**weights, "model.layers.1.self_attn.rotary_emb.inv_freq": torch.zeros(8)})


def test_numbers_that_make_no_model(llama: tuple[dict[str, Any], dict[str, Weight]]) -> None:
    config, weights = llama
    assert "4 attention heads cannot share 3" in _message({**config, "num_key_value_heads": 3}, weights)
    assert "hidden_size is None, expected a whole number" in _message({**config, "hidden_size": None}, weights)


def test_what_no_kernel_can_compute(llama: tuple[dict[str, Any], dict[str, Weight]]) -> None:
    config, weights = llama
    assert "hidden_act is 'tan'" in _message({**config, "hidden_act": "tan"}, weights, UnsupportedArchitecture)
    gemma = {**config_of(make_model("gemma3_text")), "use_bidirectional_attention": True}
    assert "use_bidirectional_attention" in _message(gemma, weights, UnsupportedArchitecture)


def test_an_unknown_type_is_left_to_the_fallback() -> None:
    assert read_spec({"model_type": "gpt_neox"}) is None


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model."])
def test_gemma3_inside_a_multimodal_checkpoint(prefix: str) -> None:
    theirs = make_model("gemma3_text")
    text = config_of(theirs)
    del text["tie_word_embeddings"]
    weights = {name.replace("model.", prefix, 1): weight for name, weight in weights_of(theirs).items()}
    weights["model.vision_tower.patch.weight"] = torch.zeros(3)
    ours = load({"model_type": "gemma3", "text_config": text}, weights)
    assert_close(whole_logits(ours, prompt(40)), their_logits(theirs, prompt(40)))


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "granite", "smollm3", "olmo2"])
def test_biases(model_type: str) -> None:
    theirs = make_model(model_type, attention_bias=True, mlp_bias=True)
    assert_close(
        whole_logits(load(config_of(theirs), weights_of(theirs)), prompt(40)), their_logits(theirs, prompt(40))
    )


@pytest.mark.parametrize(
    ("model_type", "silent"),
    [
        ("gemma2", {"tie_word_embeddings": True, "layer_types": ["sliding_attention", "full_attention"] * 2}),
        ("gemma3_text", {"layer_types": ["sliding_attention"] * 5 + ["full_attention"], "num_hidden_layers": 6}),
        ("qwen2", {"num_key_value_heads": 4}),
        ("smollm3", {}),
        ("llama", {"num_key_value_heads": 4, "rms_norm_eps": 1e-6}),
    ],
)
def test_what_older_files_leave_out(model_type: str, silent: dict[str, Any]) -> None:
    layers = len(silent.get("layer_types", [0] * 3))
    theirs = make_model(model_type, **{"num_hidden_layers": layers, **silent})
    left_out = {*silent, "layer_types", "no_rope_layers", "head_dim"} - {"num_hidden_layers"}
    left_out -= {"head_dim"} if model_type.startswith("gemma") else set()
    config = {name: value for name, value in config_of(theirs).items() if name not in left_out}
    assert_close(whole_logits(load(config, weights_of(theirs)), prompt(60)), their_logits(theirs, prompt(60)))
