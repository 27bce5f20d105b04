"""The decoder families as data: what config.json says, what only transformers' class says, what the tensors are called.

Reads a config.json as a dict and gives back an `ArchitectureSpec`; knows no tensors. A new architecture is one entry of
FAMILIES; a model type that is not there goes to the fallback.
"""

from collections import ChainMap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from qserve.device.rotary import RotarySpec, parse_rotary
from qserve.errors import BrokenCheckpoint, UnsupportedArchitecture
from qserve.kernels.ops import Activation, AttentionSpec

Config = Mapping[str, Any]

ACTIVATIONS: Mapping[str, Activation] = {
    "silu": Activation.SILU,
    "swish": Activation.SILU,
    "gelu": Activation.GELU,
    "gelu_pytorch_tanh": Activation.GELU_TANH,
    "gelu_new": Activation.GELU_TANH,
    "relu": Activation.RELU,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSpec:
    """One layer: its attention (without the norms, which are tensors) and the name of its rotary, if it has one."""

    attention: AttentionSpec
    rotary: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ArchitectureSpec:
    """All that the decoder needs to know of a model beside its tensors."""

    family: "Family"
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int
    norm_eps: float
    activation: Activation
    embedding_scale: float
    residual_multiplier: float
    logits_scale: float
    logits_soft_cap: float | None
    is_tied: bool
    biased: frozenset[str]  # the projections that have a bias
    layers: tuple[LayerSpec, ...]
    rotaries: Mapping[str, RotarySpec]


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """What a model type's class fixes. Names are those below a layer; a norm that is None does not exist."""

    defaults: Config = field(default_factory=dict)  # where config.json is silent
    attention_norm: str | None = "input_layernorm"
    attention_post_norm: str | None = None  # of what is added to the residual
    feed_forward_norm: str | None = "post_attention_layernorm"
    feed_forward_post_norm: str | None = None
    norm_offset: float = 0.0  # added to every norm's weight
    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    gate_up: tuple[str, ...] = ("gate_proj", "up_proj")
    biases: Mapping[str, str | bool] = field(default_factory=dict)  # projection: always, or the config key that says
    head_norms: str | None = None  # "each" head alone, or "all" of them over their whole width
    activation_key: str = "hidden_act"
    attention_scale: Callable[[Config, int], float] = lambda config, head_dim: head_dim**-0.5
    embedding_scale: Callable[[Config], float] = lambda config: 1.0
    window: Callable[[Config, int], int | None] = lambda config, layer: None
    rotary: Callable[[Config, int], str | None] = lambda config, layer: "full_attention"


def read_spec(config: Config) -> ArchitectureSpec | None:
    """The spec of a config.json, or None for a model type that is not here."""
    family = FAMILIES.get(config.get("model_type", ""))
    if family is None:
        return None
    if "text_config" in config:  # the language model inside a multimodal one
        config = {"tie_word_embeddings": config.get("tie_word_embeddings", True), **config["text_config"]}
    return _read_family(family, ChainMap(dict(config), dict(family.defaults), dict(_DEFAULTS)))


def _read_family(family: Family, config: Config) -> ArchitectureSpec:
    if config.get("use_bidirectional_attention"):
        raise UnsupportedArchitecture(
            "config.json: use_bidirectional_attention is set, and a model that sees later tokens cannot generate"
            " from a cache. Serve the causal version of the model."
        )
    num_layers = _number(config, "num_hidden_layers")
    rotary_names = [family.rotary(config, layer) for layer in range(num_layers)]
    return ArchitectureSpec(
        family=family,
        hidden_size=_number(config, "hidden_size"),
        intermediate_size=_number(config, "intermediate_size"),
        vocab_size=_number(config, "vocab_size"),
        max_position_embeddings=_number(config, "max_position_embeddings"),
        norm_eps=config["rms_norm_eps"],
        activation=_read_activation(config, family.activation_key),
        embedding_scale=family.embedding_scale(config),
        residual_multiplier=config["residual_multiplier"],
        logits_scale=1.0 / config["logits_scaling"],
        logits_soft_cap=config.get("final_logit_softcapping"),
        is_tied=bool(config["tie_word_embeddings"]),
        biased=frozenset(name for name, key in family.biases.items() if key is True or config.get(str(key))),
        layers=tuple(
            LayerSpec(attention=_read_attention(family, config, layer), rotary=rotary_names[layer])
            for layer in range(num_layers)
        ),
        rotaries={name: _read_rotary(config, name) for name in set(rotary_names) if name is not None},
    )


def _number(config: Config, key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int):
        raise BrokenCheckpoint(
            f"config.json: {key} is {value!r}, expected a whole number. Restore config.json from the model's source."
        )
    return value


def _head_dim(config: Config) -> int:
    return config.get("head_dim") or _number(config, "hidden_size") // _number(config, "num_attention_heads")


def _read_activation(config: Config, key: str) -> Activation:
    name = str(config.get(key))
    if name not in ACTIVATIONS:
        raise UnsupportedArchitecture(
            f"config.json: {key} is {name!r}, expected one of {', '.join(ACTIVATIONS)}. No kernel has this activation."
        )
    return ACTIVATIONS[name]


def _read_attention(family: Family, config: Config, layer: int) -> AttentionSpec:
    num_heads, head_dim = _number(config, "num_attention_heads"), _head_dim(config)
    num_kv_heads = config.get("num_key_value_heads") or num_heads
    if num_heads % num_kv_heads:
        raise BrokenCheckpoint(
            f"config.json: {num_heads} attention heads cannot share {num_kv_heads} key-value heads evenly."
            " Restore config.json from the model's source."
        )
    return AttentionSpec(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        scale=family.attention_scale(config, head_dim),
        sliding_window=family.window(config, layer),
        soft_cap=config.get("attn_logit_softcapping"),
    )


def _read_rotary(config: Config, name: str) -> RotarySpec:
    """transformers 5 nests the parameters by layer type where they differ; older files have them at the top."""
    parameters = config.get("rope_parameters")
    if parameters is None:
        is_local = name == "sliding_attention"
        parameters = {} if is_local else dict(config.get("rope_scaling") or {})
        theta = config.get("rope_local_base_freq") if is_local else config.get("rope_theta")
        parameters.setdefault("rope_theta", theta)
    elif name in parameters:
        parameters = parameters[name] or {}
    if config.get("original_max_position_embeddings"):  # Phi-3 has it beside the parameters, and means it
        key = "original_max_position_embeddings"
        parameters = {**parameters, key: config[key]}
    return parse_rotary(
        parameters,
        theta=config["default_theta"][name],
        head_dim=_head_dim(config),
        partial=config.get("partial_rotary_factor") or 1.0,
        max_position_embeddings=_number(config, "max_position_embeddings"),
    )


def _window_by_layer_type(config: Config, layer: int) -> int | None:
    is_sliding = _layer_type(config, layer) == "sliding_attention"
    return config.get("sliding_window") if is_sliding else None


def _layer_type(config: Config, layer: int) -> str:
    """What `layer_types` says, or the older fields that it was made from."""
    if config.get("layer_types"):
        return str(config["layer_types"][layer])
    pattern = config.get("sliding_window_pattern")  # every so many layers, one sees everything
    is_full = (layer + 1) % pattern == 0 if pattern else layer < config.get("max_window_layers", 0)
    return "full_attention" if is_full else "sliding_attention"


def _window_if_used(config: Config, layer: int) -> int | None:
    return _window_by_layer_type(config, layer) if config.get("use_sliding_window") else None


def _window_without_rotary(config: Config, layer: int) -> int | None:
    """SmolLM3: where layer types are not given, the layers without rotary are the sliding ones."""
    if config.get("layer_types"):
        return _window_if_used(config, layer)
    is_sliding = config.get("use_sliding_window") and _rotary_of_smollm3(config, layer) is None
    return config.get("sliding_window") if is_sliding else None


def _rotary_of_smollm3(config: Config, layer: int) -> str | None:
    flags = config.get("no_rope_layers")  # 1 means that the layer does turn, whatever the name says
    has_rotary = flags[layer] if flags else (layer + 1) % config["no_rope_layer_interval"] != 0
    return "full_attention" if has_rotary else None


_DEFAULTS: Config = {
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "residual_multiplier": 1.0,
    "logits_scaling": 1.0,
    "default_theta": {"full_attention": 10_000.0, "sliding_attention": 10_000.0},
}

_OUTER_BIASES: Mapping[str, str | bool] = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), "attention_bias")
_ALL_BIASES: Mapping[str, str | bool] = {
    **_OUTER_BIASES,
    **dict.fromkeys(("gate_proj", "up_proj", "down_proj"), "mlp_bias"),
}

_GEMMA: Mapping[str, Any] = {
    "attention_post_norm": "post_attention_layernorm",
    "feed_forward_norm": "pre_feedforward_layernorm",
    "feed_forward_post_norm": "post_feedforward_layernorm",
    "norm_offset": 1.0,
    "biases": _OUTER_BIASES,
    "activation_key": "hidden_activation",
    "attention_scale": lambda config, head_dim: config["query_pre_attn_scalar"] ** -0.5,
    "embedding_scale": lambda config: config["hidden_size"] ** 0.5,
    "window": _window_by_layer_type,
}
_GEMMA_DEFAULTS: Config = {
    "tie_word_embeddings": True,
    "hidden_activation": "gelu_pytorch_tanh",
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
_GEMMA3 = Family(
    **_GEMMA,
    head_norms="each",
    rotary=_layer_type,
    defaults={
        **_GEMMA_DEFAULTS,
        "vocab_size": 262_208,
        "max_position_embeddings": 131_072,
        "sliding_window_pattern": 6,
        "default_theta": {"full_attention": 1_000_000.0, "sliding_attention": 10_000.0},
    },
)

FAMILIES: Mapping[str, Family] = {
    "llama": Family(biases=_ALL_BIASES),
    "mistral": Family(
        window=lambda config, layer: config.get("sliding_window"),
        defaults={"num_key_value_heads": 8, "sliding_window": 4096},
    ),
    "qwen2": Family(
        biases=dict.fromkeys(("q_proj", "k_proj", "v_proj"), True),
        window=_window_if_used,
        defaults={"sliding_window": 4096, "max_window_layers": 28},
    ),
    "qwen3": Family(
        biases=_OUTER_BIASES,
        head_norms="each",
        window=_window_if_used,
        defaults={"head_dim": 128, "sliding_window": 4096, "max_window_layers": 28},
    ),
    "gemma2": Family(
        **_GEMMA,
        defaults={
            **_GEMMA_DEFAULTS,
            "sliding_window_pattern": 2,
            "final_logit_softcapping": 30.0,
            "attn_logit_softcapping": 50.0,
        },
    ),
    "gemma3": _GEMMA3,
    "gemma3_text": _GEMMA3,
    "phi3": Family(
        qkv=("qkv_proj",),
        gate_up=("gate_up_proj",),
        window=lambda config, layer: config.get("sliding_window"),
        defaults={"rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096},
    ),
    "smollm3": Family(
        biases=_ALL_BIASES,
        window=_window_without_rotary,
        rotary=_rotary_of_smollm3,
        defaults={
            "num_key_value_heads": 4,
            "tie_word_embeddings": True,
            "no_rope_layer_interval": 4,
            "default_theta": {"full_attention": 2_000_000.0},
        },
    ),
    "olmo2": Family(
        attention_norm=None,
        attention_post_norm="post_attention_layernorm",
        feed_forward_norm=None,
        feed_forward_post_norm="post_feedforward_layernorm",
        biases=_OUTER_BIASES,
        head_norms="all",
        defaults={"rms_norm_eps": 1e-5},
    ),
    "granite": Family(
        biases=_ALL_BIASES,
        attention_scale=lambda config, head_dim: config.get("attention_multiplier", 1.0),
        embedding_scale=lambda config: config.get("embedding_multiplier", 1.0),
    ),
}
