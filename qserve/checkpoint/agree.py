"""Whether config.json and the tensors speak of the same model: width, vocabulary, number of layers.

Knows no architecture: it looks at the input embedding and at the numbering of the layers beside it. What a family
needs beyond that is checked by who builds the family.
"""

import re
from collections.abc import Mapping
from typing import Any

from qserve.checkpoint.contents import TensorInfo
from qserve.errors import BrokenCheckpoint

EMBEDDING = re.compile(r"(?:.*\.)?(?:embed_tokens|wte|embed_in|word_embeddings|tok_embeddings)\.weight")
_WIDTHS = ("hidden_size", "n_embd", "d_model", "embedding_size", "word_embed_proj_dim")
_LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")


def require_agreement(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> None:
    """Raises BrokenCheckpoint with both figures where they differ."""
    text = config.get("text_config", config)
    embeddings = [info for name, info in tensors.items() if EMBEDDING.fullmatch(name) and len(info.shape) == 2]
    if len(embeddings) != 1:  # none, or several (encoder and decoder): nothing to compare with
        return
    embedding = embeddings[0]
    vocabulary, width = embedding.shape
    _compare(embedding.name, "vocab_size", told=_figures(text, ("vocab_size",)), found=vocabulary)
    _compare(embedding.name, "hidden_size", told=_figures(text, _WIDTHS), found=width)
    _compare_layers(text, tensors, before=embedding.name.removesuffix(".weight").rpartition(".")[0])


def _figures(config: Mapping[str, Any], names: tuple[str, ...]) -> list[int]:
    return [config[name] for name in names if isinstance(config.get(name), int)]


def _compare(name: str, key: str, *, told: list[int], found: int) -> None:
    if told and found not in told:
        raise _disagreement(f"config.json says {key} {told[0]}, {name} has {found}")


def _compare_layers(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo], *, before: str) -> None:
    pattern = re.compile(re.escape(f"{before}." if before else "") + r"(?:layers|h|blocks)\.(\d+)\.")
    numbers = {int(match.group(1)) for name in tensors if (match := pattern.match(name))}
    told = _figures(config, _LAYERS)
    if not numbers or not told:
        return
    # Layers for predicting several tokens are numbered on after the model's own.
    extra = config.get("num_nextn_predict_layers") or 0
    missing = set(range(told[0])) - numbers
    if missing:
        raise _disagreement(
            f"config.json says {told[0]} layers, the tensors have {len(numbers)}; missing are {sorted(missing)}"
        )
    if max(numbers) >= told[0] + extra:
        raise _disagreement(f"config.json says {told[0]} layers, the tensors go up to layer {max(numbers)}")


def _disagreement(found: str) -> BrokenCheckpoint:
    return BrokenCheckpoint(f"{found}. The config is of another model than the weights; take both from one place.")
