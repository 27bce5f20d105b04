"""What an artifact says beside its weights: new tokens, a chat template, tokens that stop, how to sample.

Changes a model's embeddings for new tokens and gives the texts of the files that are to be written; knows no recipes.
"""

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qserve.errors import UsageError

CHATML = """\
{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}\
{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
ZEPHYR = """\
{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' + message['content'] + eos_token + '\\n' }}\
{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"""
TEMPLATES = {"chatml": CHATML, "zephyr": ZEPHYR}

CARRY, NONE = "carry", "none"
PRESETS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "balanced": {"do_sample": True, "temperature": 0.7, "top_p": 0.9},
    "creative": {"do_sample": True, "temperature": 1.0, "top_p": 0.95, "min_p": 0.05},
}
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_KEYS = {"token", "special", "init", "like"}


@dataclass(frozen=True, slots=True, kw_only=True)
class NewToken:
    """A token to be added, and what its rows of embedding and head begin as."""

    token: str
    special: bool = True
    init: str = "mean"  # of all rows, zero, or copy of the rows of `like`
    like: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Dressing:
    """What is to be changed. Nothing, by default."""

    tokens: tuple[NewToken, ...] = ()
    chat_template: str | None = None
    stops: tuple[str, ...] = ()
    generation: str = CARRY

    @property
    def is_plain(self) -> bool:
        return self == PLAIN


PLAIN = Dressing()


def dress(dressing: Dressing, model: Any, home: Path) -> dict[str, str]:
    """Give `model` rows for new tokens, and the artifact its files, by name, where they differ from those in `home`."""
    if dressing.is_plain:
        return {}
    from transformers import AutoTokenizer  # takes seconds

    tokenizer = AutoTokenizer.from_pretrained(home)
    files: dict[str, str] = {}
    if dressing.tokens:
        add_tokens(dressing.tokens, model, tokenizer)
        files |= _written(tokenizer)
    if dressing.chat_template is not None:
        files["chat_template.jinja"] = dressing.chat_template
    if dressing.stops or dressing.generation != CARRY:
        files["generation_config.json"] = json.dumps(_generation(dressing, tokenizer, home), indent=2) + "\n"
    return files


def read_tokens(path: Path) -> tuple[NewToken, ...]:
    """A YAML list of tokens: each a string, or token with special, init (mean, zero, copy) and like."""
    import yaml  # comes with transformers

    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UsageError(f"{path} is no YAML ({error})") from error
    if not isinstance(entries, list) or not entries:
        raise UsageError(f"{path} holds no list of tokens; expected lines such as: - token: <|im_start|>")
    return tuple(_token(entry, path) for entry in entries)


def read_template(given: str) -> str:
    """A bundled template by its name, or the text of a file."""
    if given in TEMPLATES:
        return TEMPLATES[given]
    if not Path(given).is_file():
        raise UsageError(f"{given} is neither a file nor one of the bundled templates, {', '.join(TEMPLATES)}")
    return Path(given).read_text(encoding="utf-8")


@torch.no_grad()
def add_tokens(tokens: Sequence[NewToken], model: Any, tokenizer: Any) -> None:
    """Rows for the tokens in embedding and head. A token that is there already keeps its rows."""
    known = tokenizer.get_vocab()
    new = [token for token in tokens if token.token not in known]
    rows = [_Rows(token, tokenizer) for token in new]
    for token in new:
        tokenizer.add_tokens([token.token], special_tokens=token.special)
    ids = [tokenizer.convert_tokens_to_ids(token.token) for token in new]
    matrices = _matrices(model)
    old = [matrix.clone() for matrix in matrices]
    if ids and max(ids) >= len(matrices[0]):
        model.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
        matrices = _matrices(model)
    for matrix, before in zip(matrices, old, strict=True):
        for index, each in zip(ids, rows, strict=True):
            matrix[index] = each.of(before[: len(known)])


class _Rows:
    """What a new token's row begins as, in any matrix."""

    def __init__(self, token: NewToken, tokenizer: Any) -> None:
        self._init = token.init
        self._like = tokenizer.get_vocab().get(token.like)
        if token.init == "copy" and self._like is None:
            raise UsageError(f"{token.token} is to be a copy of {token.like!r}, which the tokenizer does not know")

    def of(self, matrix: Tensor) -> Tensor:
        return matrix[self._like] if self._init == "copy" else _INITS[self._init](matrix)


_INITS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda matrix: matrix.float().mean(0).to(matrix.dtype),
    "zero": lambda matrix: torch.zeros_like(matrix[0]),
}


def _matrices(model: Any) -> list[Tensor]:
    """Embedding and head; one where they are tied."""
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    return [embedding.data] if head is embedding else [embedding.data, head.data]


def _token(entry: Any, path: Path) -> NewToken:
    if isinstance(entry, str):
        return NewToken(token=entry)
    if not isinstance(entry, dict) or "token" not in entry or set(entry) - _KEYS:
        raise UsageError(
            f"{path}: {entry!r} is no token; expected token, and perhaps {', '.join(sorted(_KEYS - {'token'}))}"
        )
    token = NewToken(**entry)
    if token.init not in ("mean", "zero", "copy") or (token.init == "copy") != (token.like is not None):
        raise UsageError(
            f"{path}: {token.token} has init {token.init!r} and like {token.like!r}; expected mean, zero, or copy with "
            "the token to be like"
        )
    return token


def _written(tokenizer: Any) -> dict[str, str]:
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return {file.name: file.read_text(encoding="utf-8") for file in sorted(Path(folder).iterdir())}


def _generation(dressing: Dressing, tokenizer: Any, home: Path) -> dict[str, Any]:
    """The source's own or a preset, and every token that stops: the source's, the tokenizer's, those asked for."""
    own = _json(home / "generation_config.json")
    ids = {key: own.get(key, _json(home / "config.json").get(key)) for key in _IDS}
    kept = own if dressing.generation == CARRY else PRESETS.get(dressing.generation, {})
    stops = [*_listed(ids["eos_token_id"]), *_listed(tokenizer.eos_token_id)]
    stops += [_id_of(stop, tokenizer) for stop in dressing.stops]
    merged = list(dict.fromkeys(stops))
    ids["eos_token_id"] = merged[0] if len(merged) == 1 else merged
    return {**kept, **{key: value for key, value in ids.items() if value not in (None, [])}}


def _id_of(stop: str, tokenizer: Any) -> int:
    found = tokenizer.get_vocab().get(stop)
    if found is None:
        raise UsageError(f"--stop {stop}: the tokenizer has no such token; add it with --add-tokens")
    return int(found)


def _listed(value: Any) -> list[int]:
    return [] if value is None else value if isinstance(value, list) else [value]


def _json(path: Path) -> Mapping[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}
