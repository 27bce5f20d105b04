"""Writing an artifact: weights in torchao's flattened safetensors form, config, tokenizer files, provenance.

What is written is what transformers 5 and vLLM read, and what `detect` and `load` read back. The directory comes into
being whole or not at all. Knows nothing of how the tensors were made.
"""

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qserve.checkpoint.atomic import new_directory
from qserve.checkpoint.contents import PLAIN
from qserve.checkpoint.shards import LAYOUTS
from qserve.checkpoint.write_safetensors import write_safetensors
from qserve.quant.read import take_apart
from qserve.quant.recipe import Recipe

PROVENANCE_FILE = "provenance.json"
MAX_SHARD_BYTES = 5_000_000_000

# What travels with a model from its source: how it speaks, how it samples, on what terms it may be used.
CARRIED_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "LICENSE",
    "LICENSE.txt",
    "NOTICE",
)
_LIBRARIES = ("qserve", "torch", "torchao", "transformers")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Piece:
    """One tensor as it is stored: a plain one, or one of torchao's with its parts."""

    name: str
    tensor: Tensor
    stored: Mapping[str, Tensor]  # by their keys in a safetensors file
    metadata: str

    @property
    def num_bytes(self) -> int:
        return sum(part.nbytes for part in self.stored.values())


def save(
    directory: Path,
    tensors: Mapping[str, Tensor],
    *,
    config: Mapping[str, Any],
    recipe: Recipe | None = None,
    source: Path | None = None,
    files: Mapping[str, str] | None = None,
    provenance: Mapping[str, Any] | None = None,
    format: str = "safetensors",
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write `directory`, which must not exist yet (UsageError).

    `tensors` are float tensors and torchao's own by transformers' names, as a state_dict has them. `recipe` is what
    config.json will say of the quantization. The tokenizer's files come from the folder `source`, or as text in
    `files`, which win. `format` is safetensors, or bin.
    """
    pieces = _pieces(tensors, is_tied=bool(config.get("tie_word_embeddings")))
    texts = {
        "config.json": _json(artifact_config(config, names=[piece.name for piece in pieces], recipe=recipe)),
        PROVENANCE_FILE: _json(_provenance(recipe, provenance or {})),
        **(files or {}),
    }
    with new_directory(directory) as partial:
        _write_weights(partial, pieces, format=format, max_shard_bytes=max_shard_bytes)
        if source is not None:
            _carry(source, partial)
        for name, text in texts.items():
            (partial / name).write_text(text)


def artifact_config(config: Mapping[str, Any], *, names: Iterable[str], recipe: Recipe | None = None) -> dict[str, Any]:
    """What config.json says of an artifact that holds the tensors `names`.

    A head that is stored apart is not tied. The rotary base stands both where transformers 5 looks for it and where
    every other reader does.
    """
    artifact = dict(config)
    if "lm_head.weight" in names:
        artifact["tie_word_embeddings"] = False
    if recipe is not None:
        artifact["quantization_config"] = recipe.to_config()
    rope = artifact.get("rope_parameters") or {}
    full, local = rope.get("full_attention", rope), rope.get("sliding_attention", {})
    if "rope_theta" in full:
        artifact["rope_theta"] = full["rope_theta"]
    if "rope_theta" in local:
        artifact["rope_local_base_freq"] = local["rope_theta"]
    return artifact


def _provenance(recipe: Recipe | None, told: Mapping[str, Any]) -> dict[str, Any]:
    """No time and no machine: the same command makes the same bytes."""
    versions = {library: version(library) for library in _LIBRARIES}
    return {"recipe": recipe.name if recipe else None, "versions": versions, **told}


def read_provenance(directory: Path) -> Mapping[str, Any]:
    """What an artifact tells of its making; nothing for a checkpoint that nobody made here."""
    file = directory / PROVENANCE_FILE
    told: Mapping[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return told


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True) + "\n"


def _carry(source: Path, target: Path) -> None:
    for name in CARRIED_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def _pieces(tensors: Mapping[str, Tensor], *, is_tied: bool) -> list[_Piece]:
    """What is to be written; of tied tensors the first."""
    seen: set[tuple[Any, ...]] = set()
    pieces = []
    for name, tensor in tensors.items():
        identity = _identity(tensor)
        if is_tied and identity in seen:
            continue
        seen.add(identity)
        pieces.append(_piece(name, tensor.detach()))
    return pieces


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    """Equal for tensors that are the same numbers at the same place."""
    _, parts, _ = take_apart(tensor)
    arrays = parts.values() or (tensor,)
    return tuple((array.data_ptr(), array.dtype, tuple(array.shape), array.stride()) for array in arrays)


def _piece(name: str, tensor: Tensor) -> _Piece:
    class_name, parts, _ = take_apart(tensor)
    if class_name == PLAIN:
        return _Piece(name=name, tensor=tensor, stored={name: tensor}, metadata=json.dumps({"_type": PLAIN}))
    from torchao.prototype.safetensors.safetensors_utils import TensorSubclassAttributeJSONEncoder  # takes seconds

    module, _, parameter = name.rpartition(".")
    stored = {f"{module}._{parameter}_{part}": value for part, value in parts.items()}
    return _Piece(
        name=name, tensor=tensor, stored=stored, metadata=json.dumps(tensor, cls=TensorSubclassAttributeJSONEncoder)
    )


def _write_weights(directory: Path, pieces: Sequence[_Piece], *, format: str, max_shard_bytes: int) -> None:
    layout = next(layout for layout in LAYOUTS if layout.format == format)
    shards = _shards(pieces, max_shard_bytes)
    stem, _, ending = layout.single.rpartition(".")
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = layout.single if len(shards) == 1 else f"{stem}-{number:05d}-of-{len(shards):05d}.{ending}"
        if format == "bin":
            torch.save({piece.name: piece.tensor for piece in shard}, directory / name)
            weight_map |= {piece.name: name for piece in shard}
        else:
            stored = {key: part for piece in shard for key, part in piece.stored.items()}
            write_safetensors(directory / name, stored, metadata=_metadata(pieces))
            weight_map |= dict.fromkeys(stored, name)
    if len(shards) > 1:
        total_size = sum(piece.num_bytes for piece in pieces)
        index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
        (directory / layout.index).write_text(_json(index))


def _shards(pieces: Sequence[_Piece], max_shard_bytes: int) -> list[list[_Piece]]:
    """In order, as many to a shard as fit; a single tensor that is larger has one for itself."""
    shards: list[list[_Piece]] = [[]]
    room = max_shard_bytes
    for piece in pieces:
        if shards[-1] and piece.num_bytes > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(piece)
        room -= piece.num_bytes
    return shards


def _metadata(pieces: Sequence[_Piece]) -> dict[str, str]:
    """Torchao's description of all tensors, in every shard: transformers joins the shards' by overwriting.

    A float model needs none.
    """
    metadata = {"format": "pt"}
    if all(piece.name in piece.stored for piece in pieces):
        return metadata
    metadata |= {piece.name: piece.metadata for piece in pieces}
    return metadata | {"tensor_names": json.dumps([piece.name for piece in pieces])}
