"""How GGUF names and stores each family of models, against transformers' names: data, and the config made from it.

Knows no tensors: it turns metadata and a few facts about the tensors into what config.json says.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from qserve.errors import UnsupportedArchitecture, UnsupportedWeight

Metadata = Mapping[str, Any]
Config = dict[str, Any]

_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_NORMS_ON_BOTH_SIDES = {
    "ffn_norm": "pre_feedforward_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_PLAIN_KEYS = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}
_TOKEN_KEYS = {
    "bos_token_id": "tokenizer.ggml.bos_token_id",
    "eos_token_id": "tokenizer.ggml.eos_token_id",
    "pad_token_id": "tokenizer.ggml.padding_token_id",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What the config needs to know of the tensors."""

    vocab_size: int
    is_tied: bool
    has_query_bias: bool
    rope_factors: Mapping[str, Sequence[float]]  # by the name of their tensor, where the file has such


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One of GGUF's architectures in transformers' terms."""

    model_type: str
    class_name: str
    names: Mapping[str, str] = field(default_factory=dict)  # over those that most families share
    # Rows of q and k are stored for rotating neighbours; transformers rotates halves.
    interleaves_rotary: bool = False
    norm_offset: float = 0.0  # what the file adds to the weights of norms
    keys: Mapping[str, str] = field(default_factory=dict)  # more config keys
    extend: Callable[[Config, "Facts"], None] | None = None

    def layer_name(self, name: str) -> str | None:
        return self.names.get(name) or _LAYER.get(name)


def _gemma2(config: Config, facts: Facts) -> None:
    config["query_pre_attn_scalar"] = _query_scalar(config, largest=46)


def _gemma3(config: Config, facts: Facts) -> None:
    config["query_pre_attn_scalar"] = _query_scalar(config, largest=62)
    local = {"rope_type": "default", "rope_theta": 10_000.0}
    config["rope_parameters"] = {"full_attention": config["rope_parameters"], "sliding_attention": local}


def _query_scalar(config: Config, *, largest: int) -> int:
    """The file does not say it: the largest of the family takes its width per head, all others head_dim."""
    if config["num_hidden_layers"] == largest:
        return int(config["hidden_size"] // config["num_attention_heads"])
    return int(config["head_dim"])


def _phi3(config: Config, facts: Facts) -> None:
    config.pop("head_dim")
    rope = config["rope_parameters"]
    long, short = facts.rope_factors.get("rope_factors_long"), facts.rope_factors.get("rope_factors_short")
    if long and short:
        rope |= {"rope_type": "longrope", "long_factor": list(long), "short_factor": list(short)}


def _llama(config: Config, facts: Facts) -> None:
    config["attention_bias"] = facts.has_query_bias
    factors = facts.rope_factors.get("rope_freqs")
    if factors:
        config["rope_parameters"] |= _llama3_scaling(factors, config)


def _smollm3(config: Config, facts: Facts) -> None:
    _llama(config, facts)
    config["no_rope_layer_interval"] = 4


FAMILIES: Mapping[str, Family] = {
    "llama": Family(model_type="llama", class_name="LlamaForCausalLM", interleaves_rotary=True, extend=_llama),
    "smollm3": Family(model_type="smollm3", class_name="SmolLM3ForCausalLM", interleaves_rotary=True, extend=_smollm3),
    "granite": Family(
        model_type="granite",
        class_name="GraniteForCausalLM",
        interleaves_rotary=True,
        keys={
            "attention_multiplier": "attention.scale",
            "embedding_multiplier": "embedding_scale",
            "residual_multiplier": "residual_scale",
            "logits_scaling": "logit_scale",
        },
    ),
    "qwen2": Family(model_type="qwen2", class_name="Qwen2ForCausalLM"),
    "qwen3": Family(model_type="qwen3", class_name="Qwen3ForCausalLM"),
    "olmo2": Family(model_type="olmo2", class_name="Olmo2ForCausalLM", names=_NORMS_ON_BOTH_SIDES),
    "phi3": Family(
        model_type="phi3",
        class_name="Phi3ForCausalLM",
        names={"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"},
        keys={
            "sliding_window": "attention.sliding_window",
            "original_max_position_embeddings": "rope.scaling.original_context_length",
        },
        extend=_phi3,
    ),
    "gemma": Family(model_type="gemma", class_name="GemmaForCausalLM", norm_offset=1.0),
    "gemma2": Family(
        model_type="gemma2",
        class_name="Gemma2ForCausalLM",
        names=_NORMS_ON_BOTH_SIDES,
        norm_offset=1.0,
        keys={
            "attn_logit_softcapping": "attn_logit_softcapping",
            "final_logit_softcapping": "final_logit_softcapping",
            "sliding_window": "attention.sliding_window",
        },
        extend=_gemma2,
    ),
    "gemma3": Family(
        model_type="gemma3_text",
        class_name="Gemma3ForCausalLM",
        names=_NORMS_ON_BOTH_SIDES,
        norm_offset=1.0,
        keys={"sliding_window": "attention.sliding_window"},
        extend=_gemma3,
    ),
}


def family_of(metadata: Metadata) -> Family:
    architecture = str(metadata.get("general.architecture"))
    if architecture not in FAMILIES:
        raise UnsupportedArchitecture(
            f"the GGUF file holds a model of architecture {architecture!r}; those read here are {', '.join(FAMILIES)}. "
            f"Start from the model's own checkpoint instead"
        )
    return FAMILIES[architecture]


def make_config(metadata: Metadata, *, family: Family, facts: Facts) -> Config:
    """What transformers' config.json says of this model."""
    prefix = metadata["general.architecture"]
    config: Config = {"architectures": [family.class_name], "model_type": family.model_type}
    config |= {ours: _figure(metadata, f"{prefix}.{theirs}") for ours, theirs in _PLAIN_KEYS.items()}
    found = {ours: metadata.get(f"{prefix}.{theirs}") for ours, theirs in family.keys.items()}
    config |= {ours: _shortest(value) for ours, value in found.items() if value is not None}
    # Null where the file has none: transformers' own defaults are those of one published model.
    config |= {ours: metadata.get(theirs) for ours, theirs in _TOKEN_KEYS.items()}
    width_per_head = config["hidden_size"] // config["num_attention_heads"]
    config["head_dim"] = metadata.get(f"{prefix}.attention.key_length", width_per_head)
    config["vocab_size"] = facts.vocab_size
    config["tie_word_embeddings"] = facts.is_tied
    config["rope_parameters"] = _rope(metadata, prefix=prefix, head_dim=config["head_dim"])
    if family.extend is not None:
        family.extend(config, facts)
    return config


def _figure(metadata: Metadata, key: str) -> Any:
    value = metadata.get(key)
    if isinstance(value, list):
        if len(set(value)) > 1:
            raise UnsupportedArchitecture(f"{key} differs from layer to layer: {value}; expected one figure for all")
        value = value[0]
    if value is None and key.endswith("head_count_kv"):
        return _figure(metadata, key.removesuffix("_kv"))
    if value is None:
        raise UnsupportedWeight(f"the GGUF file does not say {key}; convert the model anew")
    return _shortest(value)


def _shortest(value: Any) -> Any:
    """The file keeps floats in 32 bits: 1e-05 rather than 9.999999747378752e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _rope(metadata: Metadata, *, prefix: str, head_dim: int) -> Config:
    rope: Config = {"rope_type": "default", "rope_theta": _shortest(metadata.get(f"{prefix}.rope.freq_base", 10_000.0))}
    rotated = metadata.get(f"{prefix}.rope.dimension_count", head_dim)
    if rotated != head_dim:
        rope["partial_rotary_factor"] = rotated / head_dim
    kind, factor = (metadata.get(f"{prefix}.rope.scaling.{key}") for key in ("type", "factor"))
    if kind in ("linear", "yarn") and factor:
        rope |= {"rope_type": kind, "factor": _shortest(factor)}
    if kind == "yarn":
        rope["original_max_position_embeddings"] = _figure(metadata, f"{prefix}.rope.scaling.original_context_length")
    return rope


def _llama3_scaling(factors: Sequence[float], config: Config) -> Config:
    """Llama 3's rotary scaling, of which the file keeps only the outcome: one divisor for each frequency.

    All published models share three of its four parameters; the fourth is the largest divisor. That this is so here
    is checked by computing the divisors again.
    """
    scaling = {
        "rope_type": "llama3",
        "factor": float(max(factors)),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    theta = config["rope_parameters"]["rope_theta"]
    size = len(factors)
    again = [_llama3_divisor(2 * math.pi * theta ** (i / size), scaling) for i in range(size)]
    if not all(math.isclose(a, b, rel_tol=1e-3) for a, b in zip(again, factors, strict=True)):
        raise UnsupportedWeight(
            "the rotary divisors of the GGUF file (rope_freqs) are not those of Llama 3's scaling; "
            "start from the model's own checkpoint instead"
        )
    return scaling


def _llama3_divisor(wavelength: float, scaling: Mapping[str, Any]) -> float:
    turns = float(scaling["original_max_position_embeddings"] / wavelength)  # over the original context
    low, high, factor = (float(scaling[key]) for key in ("low_freq_factor", "high_freq_factor", "factor"))
    if turns > high:
        return 1.0
    if turns < low:
        return factor
    smooth = (turns - low) / (high - low)
    return 1 / ((1 - smooth) / factor + smooth)
