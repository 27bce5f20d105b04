"""Text to tokens: documents of .txt, .json and .jsonl files and saved datasets, packed into one run of tokens.

Documents follow each other with the end-of-text token between them, cut into windows wherever a window ends. Knows no
models and no training.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qserve.errors import UsageError
from training.source import sha256

END_OF_TEXT = "<|endoftext|>"
_ENDLESS = 10**9  # texts are cut into windows here: a tokenizer need not warn of their length
_BATCH = 256  # documents that the tokenizer gets at once, to use all cores


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """Packed tokens and what they came from."""

    tokens: Tensor  # (tokens,) int32
    num_bytes: int  # of the text, in UTF-8, end-of-text marks left out
    files: dict[str, str]  # name -> sha256

    @property
    def identity(self) -> dict[str, Any]:
        """What a manifest says of it."""
        digest = hashlib.sha256(self.tokens.numpy().tobytes()).hexdigest()
        return {"files": self.files, "tokens": len(self.tokens), "sha256": digest}


def read_text(paths: Iterable[Path], tokenizer: Any, *, max_tokens: int | None = None) -> Text:
    """The documents of all files, in their order, as one run of tokens."""
    files: dict[str, str] = {}
    ids: list[int] = []
    num_bytes = 0
    for path in paths:
        files |= hashes(path)
        for documents in _batches(read_documents(path, tokenizer)):
            encoded = tokenizer(documents, add_special_tokens=False)["input_ids"]
            num_bytes += sum(len(document.encode()) for document in documents)
            ids += [token for document in encoded for token in (*document, tokenizer.eos_token_id)]
            if max_tokens is not None and len(ids) >= max_tokens:
                break
    if not ids:
        raise UsageError(f"no text was found in {', '.join(map(str, files)) or 'no file'}")
    if max_tokens is not None and len(ids) > max_tokens:
        num_bytes = round(num_bytes * max_tokens / len(ids))
        ids = ids[:max_tokens]
    return Text(tokens=torch.tensor(ids, dtype=torch.int32), num_bytes=num_bytes, files=files)


def read_documents(path: Path, tokenizer: Any) -> Iterator[str]:
    """The texts of one file, or of a directory that `datasets` has saved."""
    if path.is_dir():
        yield from _of_records(_load_dataset(path), path, tokenizer)
    elif not path.is_file():
        raise UsageError(f"{path} does not exist; --data takes .txt, .json and .jsonl files, and saved datasets")
    elif path.suffix in (".jsonl", ".json"):
        yield from _of_records(_load_json(path), path, tokenizer)
    else:
        texts = path.read_text(encoding="utf-8").split(f"\n{END_OF_TEXT}\n")
        yield from (text.removesuffix(f"\n{END_OF_TEXT}") for text in texts if text.strip())


def load_tokenizer(home: Path) -> Any:
    """The tokenizer of a checkpoint; without an end-of-text token of its own, text cannot be packed."""
    from transformers import AutoTokenizer  # takes seconds

    if not any((home / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")):
        raise UsageError(f"{home} has no tokenizer; copy tokenizer.json and tokenizer_config.json beside its weights")
    tokenizer = AutoTokenizer.from_pretrained(home)
    if tokenizer.eos_token_id is None:
        raise UsageError(f"the tokenizer of {home} has no end-of-text token; set eos_token in tokenizer_config.json")
    tokenizer.model_max_length = _ENDLESS
    return tokenizer


def windows(tokens: Tensor, length: int) -> Tensor:
    """(tokens,) -> (windows, length + 1): each predicts `length` tokens, and its last is the next one's first."""
    number = (len(tokens) - 1) // length
    if number < 1:
        raise UsageError(f"the text has {len(tokens)} tokens; a window of {length} needs one more than that")
    return tokens.unfold(0, length + 1, length)[:number]


def hashes(path: Path) -> dict[str, str]:
    """By name; the files of a directory by their path from it, since splits have files of the same names."""
    if not path.is_dir():
        return {path.name: sha256(path)} if path.is_file() else {}
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return {file.relative_to(path.parent).as_posix(): sha256(file) for file in files}


def _load_json(path: Path) -> Iterator[Any]:
    text = path.read_text(encoding="utf-8")
    try:
        if path.suffix == ".json":
            yield from json.loads(text)
        else:
            yield from (json.loads(line) for line in text.splitlines() if line.strip())
    except ValueError as error:
        raise UsageError(f"{path} is no {path.suffix[1:].upper()} ({error})") from error


def _load_dataset(path: Path) -> Iterable[Any]:
    try:
        import datasets  # optional
    except ImportError as error:
        raise UsageError(
            f"{path} is a directory; reading a saved dataset needs the library `datasets` (pip install datasets). "
            "Without it, give .txt or .jsonl files"
        ) from error
    try:
        found = datasets.load_from_disk(str(path))
    except FileNotFoundError as error:
        raise UsageError(f"{path} was not saved by `datasets` ({error})") from error
    if isinstance(found, dict) and "train" not in found:
        raise UsageError(f"{path} has no split train; name the directory of one, such as {path / next(iter(found))}")
    return found["train"] if isinstance(found, dict) else found  # type: ignore[no-any-return]


def _of_records(records: Iterable[Any], path: Path, tokenizer: Any) -> Iterator[str]:
    for number, record in enumerate(records, start=1):
        text = _text_of(record, tokenizer)
        if text is None:
            keys = ", ".join(record) if isinstance(record, dict) else type(record).__name__
            raise UsageError(f"{path}, record {number}, holds {keys}; expected text, or messages with role and content")
        if text.strip():
            yield text


def _text_of(record: Any, tokenizer: Any) -> str | None:
    if isinstance(record, str):
        return record
    if not isinstance(record, dict):
        return None
    if isinstance(record.get("text"), str):
        return str(record["text"])
    if isinstance(record.get("messages"), list):
        return str(tokenizer.apply_chat_template(record["messages"], tokenize=False))
    return None


def _batches(documents: Iterator[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    for document in documents:
        batch.append(document)
        if len(batch) == _BATCH:
            yield batch
            batch = []
    if batch:
        yield batch
