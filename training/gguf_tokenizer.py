"""The tokenizer that a GGUF file describes, as a tokenizer.json and a tokenizer_config.json.

Works on the file's metadata alone (plain keys and values); knows no tensors and no files.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from qserve.errors import ArtifactError

Metadata = Mapping[str, Any]


class TokenType(IntEnum):
    """What `tokenizer.ggml.token_type` says of each token."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class PreTokenizer:
    """How text is cut before byte-pair merging: first on `pattern` (the GPT-2 pattern if empty), then into bytes."""

    pattern: str = ""
    splits_digits: bool = False  # every digit alone, before anything else
    normalizes: bool = False  # to NFC
    ignores_merges: bool = False  # a piece that is a whole token needs no merges to become it
    adds_bos: bool = False  # where the file does not say

    def build(self) -> pre_tokenizers.PreTokenizer:
        steps: list[Any] = []
        if self.splits_digits:
            steps.append(pre_tokenizers.Digits(individual_digits=True))
        if self.pattern:
            steps.append(pre_tokenizers.Split(Regex(self.pattern), behavior="isolated"))
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not self.pattern))
        return pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]


def _word_pattern(words: str, digits: str, *, symbols_before: str = r"\r\n") -> str:
    """The pattern that the tokenizers after GPT-2 share; they differ in what a word is and how digits group."""
    return rf"{words}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[{symbols_before}]*|\s*[\r\n]+|\s+(?!\S)|\s+"


_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_PLAIN_WORDS = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


def _cased_words(ending: str) -> str:
    """Words that break where a lower-case letter is followed by an upper-case one."""
    lead = r"[^\r\n\p{L}\p{N}]?"
    return f"{lead}{_UPPER}*{_LOWER}+{ending}|{lead}{_UPPER}+{_LOWER}*{ending}"


_GPT2 = PreTokenizer()
_SINGLE_DIGITS = PreTokenizer(splits_digits=True)
_LLAMA3 = PreTokenizer(pattern=_word_pattern(_PLAIN_WORDS, r"\p{N}{1,3}"), ignores_merges=True, adds_bos=True)
_CL100K = PreTokenizer(pattern=_word_pattern(_PLAIN_WORDS, r"\p{N}{1,3}"))
_QWEN2 = PreTokenizer(pattern=_word_pattern(_PLAIN_WORDS, r"\p{N}"), normalizes=True)
_TEKKEN = PreTokenizer(
    pattern=_word_pattern(_cased_words(""), r"\p{N}", symbols_before=r"\r\n/"), ignores_merges=True, adds_bos=True
)
_O200K = PreTokenizer(
    pattern=_word_pattern(_cased_words(f"{_CONTRACTIONS}?"), r"\p{N}{1,3}", symbols_before=r"\r\n/"),
)

PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    "gpt-2": _GPT2,
    "phi-2": _GPT2,
    "olmo": _GPT2,
    "mpt": _GPT2,
    "smollm": _SINGLE_DIGITS,
    "starcoder": _SINGLE_DIGITS,
    "refact": _SINGLE_DIGITS,
    "codeshell": _SINGLE_DIGITS,
    "command-r": _SINGLE_DIGITS,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "dbrx": _CL100K,
    "smaug-bpe": _CL100K,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "tekken": _TEKKEN,
    "gpt-4o": _O200K,
}


def build_tokenizer(metadata: Metadata, *, pre_tokenizer: str = "") -> Tokenizer:
    """The tokenizer of a GGUF file; `pre_tokenizer` overrules the name that the file gives."""
    kind = _required(metadata, "tokenizer.ggml.model")
    if kind not in _BUILDERS:
        raise ArtifactError(
            f"the file's tokenizer is of kind {kind!r}; {', '.join(map(repr, _BUILDERS))} can be imported. "
            "Import from a transformers checkpoint of the same model instead, if there is one."
        )
    tokenizer = _BUILDERS[kind](metadata, pre_tokenizer)
    tokenizer.add_tokens(_added_tokens(metadata))
    return tokenizer


def tokenizer_settings(metadata: Metadata) -> dict[str, Any]:
    """The tokenizer_config.json: which tokens are special, and the chat template."""
    tokens = _required(metadata, "tokenizer.ggml.tokens")
    settings: dict[str, Any] = {
        # The class that reads tokenizer.json as it stands; a model's own class would rebuild it, and lose steps.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
    }
    for role, key in _ROLES.items():
        if (index := metadata.get(f"tokenizer.ggml.{key}_token_id")) is not None:
            settings[role] = tokens[index]
    if length := metadata.get(f"{metadata.get('general.architecture')}.context_length"):
        settings["model_max_length"] = int(length)
    if template := metadata.get("tokenizer.chat_template"):
        settings["chat_template"] = template
    return settings


def generation_settings(metadata: Metadata) -> dict[str, Any]:
    """The generation_config.json: where text begins, and every token that ends a turn."""
    settings: dict[str, Any] = {}
    for name, key in (("bos_token_id", "bos"), ("pad_token_id", "padding")):
        if (index := metadata.get(f"tokenizer.ggml.{key}_token_id")) is not None:
            settings[name] = int(index)
    if stops := stop_ids(metadata):
        settings["eos_token_id"] = stops[0] if len(stops) == 1 else stops
    return settings


def stop_ids(metadata: Metadata) -> list[int]:
    """End of text first, then end of turn and end of message where the file names them apart."""
    found = (metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom"))
    return list(dict.fromkeys(int(index) for index in found if index is not None))


_ROLES = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}


def _byte_level(metadata: Metadata, pre_tokenizer: str) -> Tokenizer:
    """Byte-pair merging over bytes, as GPT-2 began it."""
    rules = _pre_tokenizer(metadata, pre_tokenizer)
    merges = [tuple(merge.split(" ", 1)) for merge in _required(metadata, "tokenizer.ggml.merges")]
    vocabulary = _vocabulary(metadata)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=rules.ignores_merges))
    if rules.normalizes:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = rules.build()
    tokenizer.decoder = decoders.ByteLevel()
    _add_ends(tokenizer, metadata, adds_bos=rules.adds_bos)
    return tokenizer


def _sentence_piece(metadata: Metadata, pre_tokenizer: str) -> Tokenizer:
    """SentencePiece's byte-pair merging: scores rank the merges, spaces are letters, unknown letters become bytes."""
    vocabulary = _vocabulary(metadata)
    merges = _merges_by_score(vocabulary, metadata)
    unknown = _token(metadata, "unknown")
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    has_prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    replace = normalizers.Replace(" ", _SPACE)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), replace]) if has_prefix else replace
    steps: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if has_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(steps)
    _add_ends(tokenizer, metadata, adds_bos=True)
    return tokenizer


_SPACE = "▁"
_BUILDERS = {"gpt2": _byte_level, "llama": _sentence_piece}


def _merges_by_score(vocabulary: Mapping[str, int], metadata: Metadata) -> list[tuple[str, str]]:
    """Every way to make a token of two others, the best-scored token first."""
    scores = _required(metadata, "tokenizer.ggml.scores")
    ranked = sorted(vocabulary.items(), key=lambda item: -scores[item[1]])
    return [
        (token[:cut], token[cut:])
        for token, _ in ranked
        for cut in range(1, len(token))
        if token[:cut] in vocabulary and token[cut:] in vocabulary
    ]


def _pre_tokenizer(metadata: Metadata, name: str) -> PreTokenizer:
    name = name or metadata.get("tokenizer.ggml.pre", "")
    if name not in PRE_TOKENIZERS:
        raise ArtifactError(
            f"the file cuts text by the pre-tokenizer {name!r}, which is not known here; a wrong one would give "
            f"wrong token ids. Known: {', '.join(PRE_TOKENIZERS)}. Name one of equal rules with --pre-tokenizer."
        )
    return PRE_TOKENIZERS[name]


def _add_ends(tokenizer: Tokenizer, metadata: Metadata, *, adds_bos: bool) -> None:
    """Make the tokenizer begin and end every text with its special tokens, where the file asks for that."""
    begin = _token(metadata, "bos") if metadata.get("tokenizer.ggml.add_bos_token", adds_bos) else None
    end = _token(metadata, "eos") if metadata.get("tokenizer.ggml.add_eos_token", False) else None
    ends = [token for token in (begin, end) if token is not None]
    if ends:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*([begin] if begin else []), "$A", *([end] if end else [])],
            special_tokens=[(token, tokenizer.token_to_id(token)) for token in ends],
        )


def _added_tokens(metadata: Metadata) -> list[AddedToken]:
    """The tokens that are found in text before anything else cuts it; control tokens are left out of decoded text."""
    types = metadata.get("tokenizer.ggml.token_type") or []
    tokens = _required(metadata, "tokenizer.ggml.tokens")
    return [
        AddedToken(token, normalized=False, special=kind != TokenType.USER_DEFINED)
        for token, kind in zip(tokens, types, strict=False)
        if kind in (TokenType.CONTROL, TokenType.USER_DEFINED)
    ]


def _vocabulary(metadata: Metadata) -> dict[str, int]:
    tokens = _required(metadata, "tokenizer.ggml.tokens")
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise ArtifactError(
            f"the file names {len(tokens)} tokens of which only {len(vocabulary)} differ; text could not be encoded "
            "in one way only. The file is damaged, or was made by a tool that writes placeholders."
        )
    return vocabulary


def _token(metadata: Metadata, role: str) -> str | None:
    index = metadata.get(f"tokenizer.ggml.{role}_token_id")
    return None if index is None else str(_required(metadata, "tokenizer.ggml.tokens")[index])


def _required(metadata: Metadata, key: str) -> Any:
    if key not in metadata:
        raise ArtifactError(f"the GGUF file has no {key}: without it there is no tokenizer to import.")
    return metadata[key]
