"""GGUF files written here with the gguf library's own writer and name maps; the oracle is the model they came from."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from qserve.checkpoint.gguf_families import FAMILIES
from qserve.checkpoint.read_gguf import read_gguf
from qserve.errors import BrokenCheckpoint, UnsupportedArchitecture, UnsupportedWeight
from tests import tiny

ROTATES_NEIGHBOURS = ("llama", "smollm3", "granite")
SMALL_ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
# What such a file cannot say is set to what llama.cpp takes for granted.
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-tied": {"tie_word_embeddings": True},
    "llama-biased": {"attention_bias": True},
    "llama-wide-heads": {"head_dim": 32},
    "smollm3": {"tie_word_embeddings": True, "num_hidden_layers": 4, "no_rope_layer_interval": 4},
    "granite": {"attention_multiplier": 0.5, "embedding_multiplier": 3.0, "residual_multiplier": 0.25},
    "qwen2": {"use_sliding_window": False},
    "qwen3": {"head_dim": 32},
    "olmo2": {},
    "phi3": {"sliding_window": 16},
    "gemma": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8},
    "gemma3": {
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "sliding_window": 8,
        "num_hidden_layers": 6,
        "layer_types": None,
    },
}


def neighbours(values: Tensor, *, heads: int) -> Tensor:
    """The order in which such files keep the rows of q and k."""
    return values.view(heads, 2, -1, *values.shape[1:]).transpose(1, 2).reshape(values.shape)


def stored(name: str, values: Tensor, *, architecture: str, config: Any) -> Tensor:
    if architecture in ROTATES_NEIGHBOURS and ".q_proj." in name:
        return neighbours(values, heads=config.num_attention_heads)
    if architecture in ROTATES_NEIGHBOURS and ".k_proj." in name:
        return neighbours(values, heads=config.num_key_value_heads)
    return values + 1 if architecture.startswith("gemma") and name.endswith("norm.weight") else values


def write_gguf(file: Path, model: Any, *, architecture: str, extra: dict[str, np.ndarray] | None = None) -> None:
    config = model.config
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(head_dim)
    rope = config.rope_parameters
    writer.add_rope_dimension_count(int(head_dim * rope.get("partial_rotary_factor", 1.0)))
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    writer.add_bos_token_id(1)
    for key, name in FAMILIES[architecture].keys.items():
        if isinstance(value := getattr(config, key, None), int):
            writer.add_uint32(f"{architecture}.{name}", value)
        elif isinstance(value, float):
            writer.add_float32(f"{architecture}.{name}", value)
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, architecture.upper()), config.num_hidden_layers)
    for name, values in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        ours = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert ours is not None, name
        writer.add_tensor(ours, stored(name, values, architecture=architecture, config=config).contiguous().numpy())
    for name, array in (extra or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("case", MODELS)
def test_a_model_comes_back_whole(case: str, tmp_path: Path) -> None:
    architecture = case.partition("-")[0]
    model = tiny.make_model(FAMILIES[architecture].model_type, **MODELS[case])
    write_gguf(tmp_path / "model.gguf", model, architecture=architecture)
    read = read_gguf(tmp_path / "model.gguf")

    expected = model.state_dict()
    if model.config.tie_word_embeddings:
        del expected["lm_head.weight"]
    assert set(read.tensors) == set(expected)
    for name, values in expected.items():
        # Norms of Gemma lose a last bit in the sum that the file keeps.
        torch.testing.assert_close(read.tensors[name], values, rtol=0, atol=1e-6)

    again = AutoModelForCausalLM.from_config(AutoConfig.for_model(**read.config), dtype=torch.float32).eval()
    again.load_state_dict(dict(read.tensors), strict=False)
    again.tie_weights()
    ids = torch.arange(40)[None] % tiny.VOCABULARY_SIZE
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


def test_quantized_tensors_are_dequantized(tmp_path: Path) -> None:
    model = tiny.make_model("llama", tie_word_embeddings=True)
    weight = model.model.embed_tokens.weight.detach().numpy()
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    write_config_only(writer)
    packed = gguf.quants.quantize(weight, gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("token_embd.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    finish(writer)
    read = read_gguf(tmp_path / "model.gguf")
    assert read.type_counts == {"Q8_0": 1}
    values = read.tensors["model.embed_tokens.weight"]
    assert values.dtype == torch.float32
    torch.testing.assert_close(values, torch.from_numpy(weight), rtol=0, atol=float(np.abs(weight).max()) / 127)


def test_llama3_scaling_is_found_again(tmp_path: Path) -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    model = tiny.make_model("llama", rope_parameters=rope, max_position_embeddings=131072, head_dim=64)
    plain = 1 / 500_000.0 ** (torch.arange(0, 64, 2) / 64)
    divisors = (plain / model.model.rotary_emb.inv_freq).numpy()
    write_gguf(tmp_path / "model.gguf", model, architecture="llama", extra={"rope_freqs.weight": divisors})
    assert read_gguf(tmp_path / "model.gguf").config["rope_parameters"] == rope

    write_gguf(tmp_path / "odd.gguf", model, architecture="llama", extra={"rope_freqs.weight": divisors**2})
    with pytest.raises(UnsupportedWeight, match="rope_freqs"):
        read_gguf(tmp_path / "odd.gguf")


def test_rotary_scaling_of_the_metadata(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "qwen2")
    write_config_only(writer)
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(4.0)
    writer.add_rope_scaling_orig_ctx_len(128)
    writer.add_tensor("token_embd.weight", np.zeros((8, 16), np.float32))
    finish(writer)
    rope = read_gguf(tmp_path / "model.gguf").config["rope_parameters"]
    assert rope == {**SMALL_ROPE, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}


def test_an_unknown_architecture_is_named(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "mamba")
    write_config_only(writer)
    finish(writer)
    with pytest.raises(UnsupportedArchitecture, match="'mamba'"):
        read_gguf(tmp_path / "model.gguf")


def test_a_tensor_without_a_place_is_named(tmp_path: Path) -> None:
    model = tiny.make_model("llama")
    experts = {"blk.0.ffn_gate_exps.weight": np.zeros((2, 2), np.float32)}
    write_gguf(tmp_path / "model.gguf", model, architecture="llama", extra=experts)
    with pytest.raises(UnsupportedWeight, match="ffn_gate_exps"):
        read_gguf(tmp_path / "model.gguf")


@pytest.mark.parametrize("kept", [0, 3, 500, -1])
def test_a_file_cut_short_is_found(tmp_path: Path, kept: int) -> None:
    file = tmp_path / "model.gguf"
    write_gguf(file, tiny.make_model("llama"), architecture="llama")
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(BrokenCheckpoint, match="no whole GGUF file"):
        read_gguf(file)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(BrokenCheckpoint, match=r"absent\.gguf"):
        read_gguf(tmp_path / "absent.gguf")


def write_config_only(writer: gguf.GGUFWriter) -> None:
    writer.add_context_length(512)
    writer.add_embedding_length(64)
    writer.add_block_count(1)
    writer.add_feed_forward_length(128)
    writer.add_head_count(4)
    writer.add_layer_norm_rms_eps(1e-5)


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
