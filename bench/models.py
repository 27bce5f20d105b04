"""The models of the benches: SmolLM2, and one of a billion random weights; each as every recipe, made once.

The large one is there to keep us honest: its weights fit into no cache, so memory is the limit. Its tokens are bytes
and pairs of bytes, so that it can be served too; what it says means nothing.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from itertools import islice, product
from pathlib import Path
from typing import Any

import torch
from tokenizers import pre_tokenizers

from qserve.checkpoint.save import save
from training.demo import cache_directory

FLOAT = "bf16"
GROUP_SIZE = 32  # where a recipe has groups; SmolLM2's width is no multiple of larger ones

BILLION: dict[str, Any] = {
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 8192,
    "vocab_size": 32_000,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def get_model(name: str, recipe: str = FLOAT) -> Path:
    """The checkpoint's directory: of one of MODELS, or of a path, as it is or quantized by a recipe."""
    source = MODELS[name]() if name in MODELS else Path(name)
    if recipe == FLOAT:
        return source
    target = folder() / f"{source.name}-{recipe}"
    if not target.is_dir():
        _train("finalize", str(source), "--out", str(target), "--quantize", recipe, *_group_size(recipe))
    return target


def folder() -> Path:
    path = cache_directory() / "bench"
    path.mkdir(parents=True, exist_ok=True)
    return path


def _smollm2() -> Path:
    return Path(_train("demo", "--float").splitlines()[-1])


def _billion() -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM  # seconds, and needed once

    target = folder() / "random-1b"
    if not target.is_dir():
        print(f"making {target}, once: about a minute and 2 GB", file=sys.stderr)
        torch.manual_seed(0)
        config = LlamaConfig(**BILLION, dtype="bfloat16")
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            model = LlamaForCausalLM(config)
        finally:
            torch.set_default_dtype(before)
        files = {"tokenizer.json": json.dumps(_tokenizer(BILLION["vocab_size"]))}
        save(target, model.state_dict(), config={**config.to_dict(), "dtype": "bfloat16"}, files=files)
    return target


MODELS: dict[str, Callable[[], Path]] = {"smollm2": _smollm2, "1b": _billion}


def _tokenizer(size: int) -> dict[str, object]:
    """Bytes, and then pairs of them, which no text is ever encoded to."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<|end|>", *alphabet, *("".join(pair) for pair in product(alphabet, alphabet))]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    end = {"id": 0, "content": words[0], "special": True, "single_word": False, "lstrip": False, "rstrip": False}
    return {
        "version": "1.0",
        "added_tokens": [{**end, "normalized": False}],
        "pre_tokenizer": level,
        "decoder": level,
        "model": {"type": "BPE", "vocab": {word: i for i, word in enumerate(islice(words, size))}, "merges": []},
    }


def _group_size(recipe: str) -> list[str]:
    return ["--group-size", str(GROUP_SIZE)] if "int4" in recipe or "intx" in recipe else []


def _train(*arguments: str) -> str:
    """`qserve-train`, its words on stderr; what it prints is returned."""
    command = [sys.executable, "-m", "training.cli", *arguments]
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    print(ended.stdout, file=sys.stderr)
    return ended.stdout
