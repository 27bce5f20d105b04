"""The tokenizer of a checkpoint: text to ids, ids to text, and what a single token stands for.

Reads tokenizer.json with the tokenizers library alone. transformers is loaded only for a directory that has none.
Knows no tensors and no HTTP; text that arrives token by token is the business of detokenizer.py.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from qserve.errors import BrokenCheckpoint, NotACheckpoint

_SPACE = "\u2581"  # SentencePiece writes a space as this lower block
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_of_character() -> dict[str, int]:
    """GPT-2's table: every byte is written as one printable character, the printable ones as themselves."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(256 + number): byte for number, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_of_character()


@dataclass(frozen=True, slots=True, kw_only=True)
class SpecialTokens:
    """The tokens that a checkpoint gives a role; None where it gives none."""

    bos: str | None
    eos: str | None
    pad: str | None


class Tokenizer:
    """Text to ids and back, with the same ids as transformers gives for the same directory."""

    def __init__(self, backend: Backend, *, special: SpecialTokens, end_token_ids: frozenset[int]) -> None:
        self._backend = backend
        self._bytes: dict[int, bytes] = {}
        self._added = {token_id: token.content for token_id, token in backend.get_added_tokens_decoder().items()}
        self._decoder = _describe(backend)
        self.special = special
        self.end_token_ids = end_token_ids
        self.special_ids = frozenset(i for i, token in backend.get_added_tokens_decoder().items() if token.special)
        vocabulary = backend.get_vocab(with_added_tokens=True)
        self.vocabulary_size = max(vocabulary.values(), default=-1) + 1
        # The characters that one token stands for at most. Normalizers may shorten a text before: room is left for it.
        self.longest_token = max(map(len, vocabulary), default=1) * (1 if backend.normalizer is None else 4)

    @property
    def is_byte_level(self) -> bool:
        """Whether every token stands for fixed bytes, and text is those bytes joined."""
        return self._decoder == {"ByteLevel"}

    @property
    def has_byte_tokens(self) -> bool:
        """Whether some tokens are single bytes, written <0x0A>, whose run is decoded as a whole."""
        return "ByteFallback" in self._decoder

    @property
    def special_token_ids(self) -> dict[str, int]:
        """The special tokens by what they are written as."""
        return {self._added[token_id]: token_id for token_id in self.special_ids}

    @property
    def bos_id(self) -> int | None:
        return None if self.special.bos is None else self.token_to_id(self.special.bos)

    @property
    def eos_id(self) -> int | None:
        return None if self.special.eos is None else self.token_to_id(self.special.eos)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return self._backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def token_to_id(self, token: str) -> int | None:
        return self._backend.token_to_id(token)

    def id_to_token(self, token_id: int) -> str:
        """The token as the vocabulary writes it; empty for an id that stands for nothing."""
        return self._backend.id_to_token(token_id) or ""

    def is_byte_token(self, token_id: int) -> bool:
        return self.has_byte_tokens and _BYTE_TOKEN.fullmatch(self.id_to_token(token_id)) is not None

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token adds to a text, looked at alone."""
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = self._find_bytes(token_id)
        return known

    def token_text(self, token_id: int) -> str:
        r"""A token as log-probability reports print it; a piece of a character as OpenAI does, `bytes:\xe2\x80`."""
        piece = self.token_bytes(token_id)
        try:
            return piece.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)

    def _find_bytes(self, token_id: int) -> bytes:
        token = self.id_to_token(token_id)
        if self.is_byte_level:
            values = [_BYTE_OF_CHARACTER.get(character) for character in token]
            return token.encode() if None in values else bytes(value for value in values if value is not None)
        if token_id in self._added:
            return token.encode()
        if self.has_byte_tokens and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes.fromhex(match[1])
        if self._decoder & {"Replace", "Metaspace"}:
            return token.replace(_SPACE, " ").encode()
        return self.decode([token_id], skip_special_tokens=False).encode()


def load_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer of a checkpoint directory, set up by the rules that transformers applies.

    The post-processor in tokenizer.json alone decides which special tokens a prompt gets. `add_bos_token` of
    tokenizer_config.json counts for nothing beside it: transformers 5 drops it too.
    """
    settings = _read_json(directory / "special_tokens_map.json") | _read_json(directory / "tokenizer_config.json")
    backend = _load_backend(directory)
    backend.no_truncation()
    backend.no_padding()
    special = SpecialTokens(**{role: _content(settings.get(f"{role}_token")) for role in ("bos", "eos", "pad")})
    _add_missing_tokens(backend, settings)
    return Tokenizer(backend, special=special, end_token_ids=_end_token_ids(directory, backend, special))


def _load_backend(directory: Path) -> Backend:
    path = directory / "tokenizer.json"
    if path.is_file():
        try:
            return Backend.from_file(str(path))
        except Exception as error:
            raise BrokenCheckpoint(f"{path} cannot be read as a tokenizer: {error}. Fetch it again.") from error
    if not (directory / "tokenizer_config.json").is_file() and not (directory / "tokenizer.model").is_file():
        raise NotACheckpoint(f"{directory} has no tokenizer: expected tokenizer.json beside the model's weights.")
    return _convert_with_transformers(directory)


def _convert_with_transformers(directory: Path) -> Backend:
    from transformers import AutoTokenizer  # seconds to import, and needed only where there is no tokenizer.json

    converted = AutoTokenizer.from_pretrained(directory)
    backend = getattr(converted, "backend_tokenizer", None)
    if not isinstance(backend, Backend):
        raise BrokenCheckpoint(
            f"{directory} has no tokenizer.json, and its {type(converted).__name__} cannot be turned into one. "
            "Save it as a fast tokenizer first."
        )
    return backend


def _describe(backend: Backend) -> frozenset[str]:
    """The kinds of decoder that turn this tokenizer's tokens into text."""
    if backend.decoder is None:
        return frozenset()
    return frozenset(_kinds(json.loads(backend.decoder.__getstate__())))


def _kinds(description: Mapping[str, Any]) -> Iterator[str]:
    if description["type"] != "Sequence":
        yield description["type"]
    for part in description.get("decoders", ()):
        yield from _kinds(part)


def _add_missing_tokens(backend: Backend, settings: Mapping[str, Any]) -> None:
    """Tokens that the settings name and tokenizer.json does not know, in the order of their ids."""
    listed = settings.get("added_tokens_decoder") or {}
    tokens = [_added_token(listed[key]) for key in sorted(listed, key=int)]
    named = [settings.get(f"{role}_token") for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")]
    extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
    extra = list(extra.values()) if isinstance(extra, Mapping) else extra
    tokens += [_added_token(token) for token in [*named, *extra] if token is not None]
    missing = {token.content: token for token in reversed(tokens) if backend.token_to_id(token.content) is None}
    backend.add_tokens(list(reversed(missing.values())))


def _added_token(token: Any) -> AddedToken:
    if isinstance(token, str):
        return AddedToken(token, special=True)
    flags = ("single_word", "lstrip", "rstrip", "normalized")
    return AddedToken(
        token["content"], special=bool(token.get("special", True)), **{name: bool(token.get(name)) for name in flags}
    )


def _end_token_ids(directory: Path, backend: Backend, special: SpecialTokens) -> frozenset[int]:
    """The ids that end a text: what the generation settings list, else the config, and the tokenizer's own."""
    listed = _read_json(directory / "generation_config.json").get("eos_token_id")
    if listed is None:
        listed = _read_json(directory / "config.json").get("eos_token_id")
    ids = listed if isinstance(listed, list) else [listed]
    own = backend.token_to_id(special.eos) if special.eos else None
    return frozenset(token_id for token_id in [*ids, own] if isinstance(token_id, int))


def _content(token: Any) -> str | None:
    """A special token is written as a string or as an object with its flags."""
    return token.get("content") if isinstance(token, Mapping) else token


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BrokenCheckpoint(f"{path} is not JSON ({error}). Fetch it again.") from error
    return content if isinstance(content, dict) else {}
