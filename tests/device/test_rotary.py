"""Every rotary scaling against transformers: the same logits, from new and from older configurations."""

from typing import Any

import pytest

from qserve.device.architectures import read_spec
from qserve.errors import BrokenCheckpoint, UnsupportedArchitecture
from tests.device.driving import assert_close, config_of, load, prompt, their_logits, weights_of, whole_logits
from tests.tiny import make_model

LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7],
    "long_factor": [1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0],
}
SCALINGS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "yarn-options": {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 16,
        "beta_slow": 2,
        "mscale": 0.7,
        "mscale_all_dim": 1.1,
        "truncate": False,
    },
    "yarn-attention-factor": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "attention_factor": 1.3,
    },
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}


@pytest.mark.parametrize("name", SCALINGS)
def test_scalings(name: str) -> None:
    theirs = make_model("llama", rope_parameters={"rope_theta": 1000.0, **SCALINGS[name]})
    ours = load(config_of(theirs), weights_of(theirs))
    assert_close(whole_logits(ours, prompt(90)), their_logits(theirs, prompt(90)))


@pytest.mark.parametrize("name", ["linear", "yarn", "llama3"])
def test_older_configurations(name: str) -> None:
    theirs = make_model("llama", rope_parameters={"rope_theta": 1000.0, **SCALINGS[name]})
    config = config_of(theirs)
    scaling = config.pop("rope_parameters")
    config["rope_theta"] = scaling.pop("rope_theta")
    config["rope_scaling"] = {"type": scaling.pop("rope_type"), **scaling}
    assert_close(whole_logits(load(config, weights_of(theirs)), prompt(90)), their_logits(theirs, prompt(90)))


@pytest.mark.parametrize("length", [40, 100])
def test_dynamic_is_stretched_for_the_longest_context(length: int) -> None:
    parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1000.0}
    theirs = make_model("llama", rope_parameters=parameters, max_position_embeddings=64)
    ours = load(config_of(theirs), weights_of(theirs), max_positions=length)
    assert_close(whole_logits(ours, prompt(length)), their_logits(theirs, prompt(length)))


@pytest.mark.parametrize("model_type", ["llama", "phi3"])
@pytest.mark.parametrize("length", [40, 100])
def test_longrope_takes_its_factors_for_the_longest_context(model_type: str, length: int) -> None:
    changes: dict[str, Any] = {"original_max_position_embeddings": 64} if model_type == "phi3" else {}
    parameters = {**LONGROPE, "rope_theta": 1000.0, "original_max_position_embeddings": 64}
    theirs = make_model(model_type, rope_parameters=parameters, max_position_embeddings=256, **changes)
    ours = load(config_of(theirs), weights_of(theirs), max_positions=length)
    assert_close(whole_logits(ours, prompt(length)), their_logits(theirs, prompt(length)))


def test_phi3_calls_it_su_too() -> None:
    theirs = make_model("phi3", rope_parameters={**LONGROPE, "rope_theta": 1000.0}, original_max_position_embeddings=64)
    config = config_of(theirs)
    config["rope_parameters"]["rope_type"] = "su"
    ours = load(config, weights_of(theirs), max_positions=64)
    assert_close(whole_logits(ours, prompt(50)), their_logits(theirs, prompt(50)))


def test_gemma3_has_two_bases_in_old_files_too() -> None:
    theirs = make_model(
        "gemma3_text",
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 700.0},
        },
    )
    config = config_of(theirs)
    assert_close(whole_logits(load(config, weights_of(theirs)), prompt(60)), their_logits(theirs, prompt(60)))
    del config["rope_parameters"]
    config |= {"rope_theta": 5000.0, "rope_local_base_freq": 700.0, "rope_scaling": {"type": "linear", "factor": 8.0}}
    assert_close(whole_logits(load(config, weights_of(theirs)), prompt(60)), their_logits(theirs, prompt(60)))


def test_bases_that_only_the_class_knows() -> None:
    for model_type in ("smollm3", "gemma3_text", "llama"):
        theirs = make_model(model_type)
        config = config_of(theirs)
        del config["rope_parameters"]
        assert_close(whole_logits(load(config, weights_of(theirs)), prompt(60)), their_logits(theirs, prompt(60)))


def test_what_cannot_be_computed_is_said() -> None:
    config = config_of(make_model("llama"))
    config["rope_parameters"] = {"rope_type": "spiral"}
    with pytest.raises(UnsupportedArchitecture, match="'spiral' is not known; expected one of default, dynamic"):
        read_spec(config)
    config["rope_parameters"] = {"rope_type": "llama3", "factor": 2.0}
    with pytest.raises(BrokenCheckpoint, match="'llama3' lacks low_freq_factor, high_freq_factor"):
        read_spec(config)
    config["rope_parameters"] = {**LONGROPE, "short_factor": [1.0]}
    with pytest.raises(BrokenCheckpoint, match="longrope has 1 factors, expected 8"):
        load(config, {})
