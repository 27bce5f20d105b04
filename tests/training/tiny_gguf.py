"""A tiny GGUF file, written from a tiny model of transformers the way converters write one."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy
import torch
from gguf import GGMLQuantizationType, GGUFWriter

from tests.tiny import CHATML, VOCABULARY_SIZE, make_tokenizer

_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_CONTROL, _NORMAL = 3, 1


def write_gguf(
    path: Path,
    model: Any,
    *,
    kind: GGMLQuantizationType = GGMLQuantizationType.F32,
    pre: str = "smollm",
    changes: Mapping[str, Any] | None = None,
) -> dict[str, torch.Tensor]:
    """Write a Llama of transformers; answers the values that the file holds, under transformers' names.

    `changes` replace metadata keys of the tokenizer, or remove them with None.
    """
    writer = GGUFWriter(path, "llama")
    _add_shape(writer, model.config)
    _add_tokenizer(writer, path.parent, pre, changes or {})
    values = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        values[name] = _add_tensor(writer, name, tensor, model.config, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


def _add_shape(writer: GGUFWriter, config: Any) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)


def _add_tokenizer(writer: GGUFWriter, directory: Path, pre: str, changes: Mapping[str, Any]) -> None:
    make_tokenizer(directory)
    parts = json.loads((directory / "tokenizer.json").read_text())
    vocabulary = sorted(parts["model"]["vocab"].items(), key=lambda item: item[1])
    special = {token["content"] for token in parts["added_tokens"]}
    tokens = [token for token, _ in vocabulary]
    assert len(tokens) == VOCABULARY_SIZE
    settings = {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "token_type": [_CONTROL if token in special else _NORMAL for token in tokens],
        "merges": [" ".join(merge) for merge in parts["model"]["merges"]],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "padding_token_id": 0,
        **changes,
    }
    adders = {str: writer.add_string, int: writer.add_uint32, bool: writer.add_bool, list: writer.add_array}
    for key, value in settings.items():
        if value is not None:
            adders[type(value)](f"tokenizer.ggml.{key}", value)
    writer.add_chat_template(CHATML)


def _add_tensor(
    writer: GGUFWriter, name: str, tensor: torch.Tensor, config: Any, kind: GGMLQuantizationType
) -> torch.Tensor:
    """Matrices in `kind`, vectors in float32; queries and keys with their halves interleaved, as GGUF wants them."""
    array = tensor.to(torch.float32).numpy()
    if tensor.ndim == 1:
        writer.add_tensor(_gguf_name(name), array)
        return tensor
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2], 0)
    stored = gguf.quants.quantize(_interleave(array, heads) if heads else array, kind)
    writer.add_tensor(_gguf_name(name), stored, raw_dtype=kind)
    values = gguf.quants.dequantize(stored, kind)
    return torch.from_numpy(_part(values, heads) if heads else values).clone()


def _interleave(array: numpy.ndarray, heads: int) -> numpy.ndarray:
    """(heads, 2, half, in) -> (heads, half, 2, in)"""
    return array.reshape(heads, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)


def _part(array: numpy.ndarray, heads: int) -> numpy.ndarray:
    return array.reshape(heads, -1, 2, array.shape[1]).swapaxes(1, 2).reshape(array.shape)


def _gguf_name(name: str) -> str:
    stem = name.removesuffix(".weight")
    if stem in _NAMES:
        return f"{_NAMES[stem]}.weight"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{_LAYER_NAMES[part]}.weight"
