"""Tiny random models and tokenizers, made on the spot: the tests need no file that is not made here."""

import json
import pydoc_data.topics
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
VOCABULARY_SIZE = 512

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY_SIZE,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

# What makes each architecture show its own habits in a small model and a short text.
_HABITS: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 24},
    "qwen2": {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1},
    "qwen3": {"head_dim": 24},
    "gemma2": {"head_dim": 24, "query_pre_attn_scalar": 20, "sliding_window": 24, "attn_logit_softcapping": 5.0},
    "gemma3_text": {
        "head_dim": 24,
        "query_pre_attn_scalar": 20,
        "sliding_window": 24,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "phi3": {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.75}},
    "smollm3": {"no_rope_layer_interval": 2},
    "granite": {
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.2,
        "residual_multiplier": 0.7,
        "logits_scaling": 1.5,
    },
}


def prose() -> str:
    """English text that every Python installation has."""
    return "\n".join(pydoc_data.topics.topics.values())


def make_tokenizer(directory: Path) -> None:
    """A byte-level BPE tokenizer with ChatML special tokens and template, written as transformers writes one."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([prose()[:200_000]], trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "chat_template": CHATML,
        "model_max_length": _SHAPE["max_position_embeddings"],
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))


def make_model(model_type: str = "llama", *, seed: int = 0, **changes: Any) -> Any:
    """A random model of transformers' own class for `model_type`, in float32; `changes` go into its config.

    Weights are drawn wider than transformers' initialization, so that greedy text is not one token repeated.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    config = AutoConfig.for_model(model_type, **{**_SHAPE, **_HABITS.get(model_type, {}), **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.15)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def make_checkpoint(
    directory: Path, model_type: str = "llama", *, dtype: torch.dtype = torch.float32, **changes: Any
) -> Path:
    """A whole checkpoint, model and tokenizer, as `save_pretrained` writes it."""
    directory.mkdir(parents=True, exist_ok=True)
    make_model(model_type, **changes).to(dtype).save_pretrained(directory)
    make_tokenizer(directory)
    return directory
