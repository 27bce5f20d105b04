"""`qserve-train import`: a GGUF file becomes a transformers checkpoint in bfloat16, with its tokenizer.

`qserve.checkpoint` reads the tensors and writes the directory, `gguf_tokenizer` makes the tokenizer; this joins them.
"""

import argparse
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from tokenizers import Tokenizer
from torch import Tensor

from qserve.checkpoint.read_gguf import GGUFModel, read_gguf
from qserve.checkpoint.save import save
from qserve.errors import BrokenCheckpoint, NotACheckpoint
from training.destination import mebibytes, require_absent, require_space
from training.gguf_tokenizer import (
    PRE_TOKENIZERS,
    build_tokenizer,
    generation_settings,
    stop_ids,
    tokenizer_settings,
)
from training.source import describe_source

_DTYPE = torch.bfloat16
_MAGIC = b"GGUF"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Make a transformers checkpoint of a GGUF file: bfloat16 safetensors, config, tokenizer and chat template. "
        "What the file's own quantization lost stays lost; its values are carried over as they are."
    )
    parser.add_argument("file", type=Path, metavar="MODEL.gguf", help="the GGUF file")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the new directory")
    parser.add_argument(
        "--pre-tokenizer",
        default="",
        choices=sorted(PRE_TOKENIZERS),
        metavar="NAME",
        help=f"how text is cut before it is encoded, if the file's own name for it is unknown: "
        f"{', '.join(sorted(PRE_TOKENIZERS))}",
    )


def run(options: argparse.Namespace) -> None:
    import_gguf(options.file, options.out, console=Console(), pre_tokenizer=options.pre_tokenizer)


def import_gguf(file: Path, out: Path, *, console: Console, pre_tokenizer: str = "") -> None:
    """Write `out` as a whole or not at all, and print what was done."""
    require_absent(out)
    _require_gguf(file)
    model = read_gguf(file)
    tokenizer = build_tokenizer(model.metadata, pre_tokenizer=pre_tokenizer)
    config = _config(model)
    _require_rows(tokenizer, config["vocab_size"])
    tensors = {name: tensor.to(_DTYPE) for name, tensor in _progress(model.tensors, console)}
    require_space(out, num_bytes=_num_bytes(tensors))
    provenance = {"method": "imported from GGUF", "source": describe_source((file,))}
    save(out, tensors, config=config, files=_files(tokenizer, model.metadata), provenance=provenance)
    console.print(_report(file, out, model=model, tensors=tensors, tokenizer=tokenizer))


def _require_gguf(file: Path) -> None:
    if not file.is_file():
        raise NotACheckpoint(f"{file} is no file; expected a .gguf file.")
    with file.open("rb") as opened:
        if opened.read(len(_MAGIC)) != _MAGIC:
            raise NotACheckpoint(f"{file} does not begin as GGUF files do; was it downloaded as a whole?")


def _require_rows(tokenizer: Tokenizer, rows: int) -> None:
    """Padding rows may follow the last token; a token without a row could not be run."""
    if (tokens := tokenizer.get_vocab_size()) > rows:
        raise BrokenCheckpoint(
            f"the file has {tokens} tokens and embeddings for {rows}; expected a row for each. Convert the model anew."
        )


def _config(model: GGUFModel) -> dict[str, Any]:
    stops = stop_ids(model.metadata)
    return {
        **model.config,
        "eos_token_id": stops[0] if len(stops) == 1 else stops or None,
        "dtype": str(_DTYPE).removeprefix("torch."),
    }


def _files(tokenizer: Tokenizer, metadata: Mapping[str, Any]) -> dict[str, str]:
    """The files beside the weights, by name."""
    return {
        "tokenizer.json": tokenizer.to_str(pretty=True),
        "tokenizer_config.json": json.dumps(tokenizer_settings(metadata), indent=2, ensure_ascii=False),
        "generation_config.json": json.dumps(generation_settings(metadata), indent=2),
    }


def _progress(tensors: Mapping[str, Tensor], console: Console) -> Iterator[tuple[str, Tensor]]:
    for name in track(tensors, description="reading tensors", console=console, total=len(tensors)):
        yield name, tensors[name]


def _num_bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def _report(file: Path, out: Path, *, model: GGUFModel, tensors: Mapping[str, Tensor], tokenizer: Tokenizer) -> Table:
    """What was read and what it became."""
    metadata, config = model.metadata, model.config
    settings = tokenizer_settings(metadata)
    special = ", ".join(
        f"{role.removesuffix('_token')} {settings[role]}" for role in settings if role.endswith("_token")
    )
    types = ", ".join(f"{count} {kind}" for kind, count in model.type_counts.items())
    parameters = sum(tensor.numel() for tensor in tensors.values())
    rows = {
        "model": str(metadata.get("general.name", file.stem)),
        "architecture": f"{config['model_type']}, {config['num_hidden_layers']} layers of {config['hidden_size']}",
        "parameters": f"{parameters:,}" + (", head tied to the embedding" if config["tie_word_embeddings"] else ""),
        "weights": f"{types} ({mebibytes(file.stat().st_size)}) -> bfloat16 ({mebibytes(_num_bytes(tensors))})",
        "tokenizer": f"{tokenizer.get_vocab_size():,} tokens, cut as {metadata.get('tokenizer.ggml.pre', 'default')}",
        "special tokens": special,
        "chat template": "yes"
        if "chat_template" in settings
        else "none in the file: chat requests need --chat-template",
        "written to": str(out),
    }
    table = Table(title=f"imported {file.name}", show_header=False, title_justify="left")
    for name, value in rows.items():
        table.add_row(name, value)
    return table
