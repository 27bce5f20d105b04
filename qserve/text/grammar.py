"""Structured output: what a text must look like, as the tokens that may come next.

llguidance compiles and follows the grammars; here they are asked for, limited, and tied to a tokenizer and to the
tokens that end a text. Knows no HTTP and no tensors; a mask is bytes, one bit a token.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper, grammar_from, regex_to_lark

from qserve.errors import InvalidRequest
from qserve.text.tokenizer import Tokenizer

_LONGEST_SOURCE = 1 << 17  # characters; compilation is quadratic in some parts, and 4 s at twice as many
_LONGEST_COMPLAINT = 400
_NUM_KEPT = 64  # compiled grammars
# A lexer state takes one to two KiB, and a request has its own: without a limit one request could fill the memory.
# The fuel is a fifth of the library's own, which lets a pattern like (a{1000}){1000} compile for seconds.
_LIMITS = LLParserLimits(max_lexer_states=20_000, initial_lexer_fuel=200_000, verbose_errors=False)
# Between two parts of a JSON text: what people and models write, but no endless blanks, which small models fall into.
_WHITESPACE = r"[ \t]{0,2}(\r?\n[ \t]{0,64})?"
_NO_MEANING = "\x02"
_ANY_TEXT = r"/(.|\n)*/"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tag:
    """A piece of structure in free text: `begin`, JSON of a schema, `end`."""

    begin: str
    schema: Mapping[str, Any]
    end: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GrammarSource:
    """A grammar as llguidance reads it, and the request's field that it came in."""

    text: str
    param: str


def from_json_schema(schema: Mapping[str, Any] | str, *, param: str, whitespace: str = _WHITESPACE) -> GrammarSource:
    """JSON that is valid under a schema; `whitespace` is the regex of what may stand between its parts."""
    text = schema if isinstance(schema, str) else json.dumps(schema)
    _check_length(text, param=param)
    try:
        grammar = LLMatcher.grammar_from_json_schema(
            text, overrides={"whitespace_pattern": whitespace} if whitespace else {"whitespace_flexible": False}
        )
    except ValueError as error:
        raise InvalidRequest(f"The schema is not JSON: {_cut(error)}", param=param) from error
    return GrammarSource(text=grammar, param=param)


def from_regex(pattern: str, *, param: str) -> GrammarSource:
    r"""Text that matches as a whole; look-around and back-references cannot be compiled. `\d` is 0 to 9 alone."""
    _check_length(pattern, param=param)
    return GrammarSource(text=LLMatcher.grammar_from_lark(f"start: /{regex_to_lark(pattern, 'd')}/"), param=param)


def from_choices(choices: Sequence[str], *, param: str) -> GrammarSource:
    """One of these strings."""
    # As a terminal, which is one automaton: a rule would be followed choice by choice, and 2,000 at most.
    return from_grammar("start: CHOICE\nCHOICE: " + " | ".join(map(json.dumps, choices)), param=param)


def from_grammar(grammar: str, *, param: str) -> GrammarSource:
    """A context-free grammar: Lark as llguidance extends it, or GBNF, which has `::=`."""
    _check_length(grammar, param=param)
    try:
        return GrammarSource(text=grammar_from("gbnf" if "::=" in grammar else "lark", grammar), param=param)
    except ValueError as error:
        raise InvalidRequest(f"The grammar cannot be compiled: {_cut(error)}", param=param) from error


def from_tags(
    tags: Sequence[Tag], *, triggers: Sequence[str], param: str, special_ids: Mapping[str, int]
) -> GrammarSource:
    """Free text, but what follows a trigger must be one of the tags that begin with it.

    `special_ids` are the tokenizer's special tokens: a trigger that is one of them can be written in no other way.
    """
    rules = []
    for number, trigger in enumerate(triggers):
        bodies = [_tag_body(tag, trigger) for tag in tags if tag.begin.startswith(trigger)]
        if not trigger or not bodies:
            raise InvalidRequest(f"No tag begins with the trigger {trigger[:80]!r}.", param=param)
        if trigger in special_ids:
            rules.append(f"tag_{number}: ANY <[{special_ids[trigger]}]> ({' | '.join(bodies)})")
        else:
            rules.append(f"lead_{number}[lazy]: ANY {json.dumps(trigger)}")
            rules.append(f"tag_{number}: lead_{number} ({' | '.join(bodies)})")
    untriggered = next((tag.begin for tag in tags if not tag.begin.startswith(tuple(triggers))), None)
    if untriggered is not None:
        raise InvalidRequest(f"No trigger begins the tag {untriggered[:80]!r}.", param=param)
    names = " | ".join(f"tag_{number}" for number in range(len(triggers)))
    return from_grammar("\n".join([f"start: ({names})* ANY", f"ANY: {_ANY_TEXT}", *rules]), param=param)


def _tag_body(tag: Tag, trigger: str) -> str:
    rest = tag.begin.removeprefix(trigger)
    parts = (
        json.dumps(rest) if rest else "",
        f"%json {json.dumps(tag.schema)}",
        json.dumps(tag.end) if tag.end else "",
    )
    return " ".join(part for part in parts if part)


class Grammar:
    """A compiled grammar; each generation under it follows it with a constraint of its own."""

    def __init__(self, matcher: LLMatcher, *, vocabulary_size: int) -> None:
        self._matcher = matcher
        self._vocabulary_size = vocabulary_size

    def start(self, *, stop_ids: frozenset[int]) -> "GrammarConstraint":
        return GrammarConstraint(
            self._matcher.deep_copy(), stop_ids=stop_ids, num_bytes=(self._vocabulary_size + 7) // 8
        )


class GrammarConstraint:
    """A grammar and how far one generation has come in it. The engine's Constraint.

    The stop ids may come exactly where the text may end, whatever else they stand for.
    """

    def __init__(self, matcher: LLMatcher, *, stop_ids: frozenset[int], num_bytes: int) -> None:
        self._matcher = matcher
        self._stop_ids = stop_ids
        self._num_bytes = num_bytes
        self._bits: bytes | None = None  # what is allowed next, once it had to be found out

    @property
    def is_finished(self) -> bool:
        """Whether the text is complete and nothing can be added to it."""
        return self._matcher.is_stopped() and self._matcher.is_accepting()

    def accept(self, token_id: int) -> None:
        """Takes in the next token of the generation. One that was not allowed leaves nothing allowed."""
        self._bits = None
        if token_id not in self._stop_ids:
            self._matcher.consume_token(token_id)

    def allowed(self) -> bytes:
        """One bit for each token id, the lowest bit of the first byte for id 0; no bit at all in a dead end."""
        if self._bits is None:
            self._bits = self._find_bits()
        return self._bits

    def _find_bits(self) -> bytes:
        matcher = self._matcher
        bits = bytearray(self._num_bytes)
        if not matcher.is_stopped():
            bits[:] = matcher.compute_bitmask()[: self._num_bytes]
        if matcher.is_error():  # it may have become so just now, when a limit was met
            return bytes(self._num_bytes)
        can_end = matcher.is_accepting()
        for token_id in self._stop_ids:
            place, bit = divmod(token_id, 8)
            bits[place] = bits[place] | 1 << bit if can_end else bits[place] & ~(1 << bit)
        return bytes(bits)

    def find_allowed(self, token_ids: Sequence[int]) -> int | None:
        """The first of these that is: 1 µs each and some for the first, where all bits take 4 to 30, or 1,000."""
        # Where only one text can follow, only its own tokens are allowed, and the matcher would take others too.
        if self._bits is None and (self._matcher.is_stopped() or self._matcher.compute_ff_bytes()):
            self._bits = self._find_bits()
        return next((token_id for token_id in token_ids if self._allows(token_id)), None)

    def correct(self, guess: Sequence[int]) -> Sequence[int]:
        """The tokens that must come next, where only one text can follow; else as much of the guess as may come."""
        return self._matcher.compute_ff_tokens() or guess[: self._matcher.validate_tokens([*guess])]

    def supposing(self, token_ids: Sequence[int]) -> "GrammarConstraint":
        """As it will be if these come next; this one stays as it is."""
        supposed = GrammarConstraint(self._matcher.deep_copy(), stop_ids=self._stop_ids, num_bytes=self._num_bytes)
        for token_id in token_ids:
            supposed.accept(token_id)
        return supposed

    def _allows(self, token_id: int) -> bool:
        if self._bits is not None:
            return bool(self._bits[token_id // 8] >> token_id % 8 & 1)
        if token_id in self._stop_ids:
            return self._matcher.is_accepting()
        return self._matcher.validate_tokens([token_id]) == 1


class GrammarCompiler:
    """Compiles grammars for one vocabulary. Any thread may call; what was compiled of late is kept."""

    def __init__(self, tokenizer: Tokenizer, *, vocabulary_size: int) -> None:
        self._tokenizer = tokenizer
        self._vocabulary_size = vocabulary_size
        self.compile = lru_cache(maxsize=_NUM_KEPT)(self._compile)

    def _compile(self, source: GrammarSource) -> Grammar:
        """Raises InvalidRequest with the compiler's complaint. May take a second: not for an event loop's thread."""
        matcher = LLMatcher(self._backend, source.text, log_level=0, limits=_LIMITS)
        complaint = matcher.get_error() or _try_first_token(matcher)
        if complaint.startswith("NoExtensionBias"):
            complaint = "it allows no text at all"
        if complaint:
            raise InvalidRequest(f"{source.param} cannot be compiled: {_cut(complaint)}", param=source.param)
        return Grammar(matcher, vocabulary_size=self._vocabulary_size)

    @cached_property
    def _backend(self) -> LLTokenizer:
        """Made when first needed, for it takes a few tenths of a second.

        The id after the last stands for the end of the text, so that no real token has that meaning in a mask: which
        tokens end a text differs from request to request.
        """
        wrapper = TokenizerWrapper(_Vocabulary(self._tokenizer, size=self._vocabulary_size))
        return LLTokenizer(wrapper, n_vocab=self._vocabulary_size + 1, eos_token=self._vocabulary_size)


def _try_first_token(matcher: LLMatcher) -> str:
    """What the first step complains of; it is the slowest, and some limits are met only there."""
    allowed = int.from_bytes(matcher.compute_bitmask(), "little")
    lowest = (allowed & -allowed).bit_length() - 1
    trial = matcher.deep_copy()
    if not matcher.is_error() and trial.consume_token(lowest):
        trial.compute_bitmask()
    return matcher.get_error() if matcher.is_error() else trial.get_error() if trial.is_error() else ""


class _Vocabulary:
    """A tokenizer in the shape that llguidance asks for."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, *, size: int) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = size
        self.special_token_ids = [*sorted(token_id for token_id in tokenizer.special_ids if token_id < size), size]
        self.tokens = [*map(tokenizer.token_bytes, range(size)), b"<end of text>"]

    def __call__(self, text: str) -> list[int]:
        """The tokens of text in the middle of a text: where only one text can follow, only they are allowed.

        Many tokenizers put a space before all that they encode; behind a character of no meaning they cannot.
        """
        for lead in ("", _NO_MEANING):
            num_lead = len(self._encode(lead))
            ids = self._encode(lead + text)[num_lead:]
            if b"".join(self.tokens[token_id] for token_id in ids) == text.encode():
                return ids
        return self._encode_greedily(text.encode())

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)

    def _encode_greedily(self, text: bytes) -> list[int]:
        """The longest token that fits, again and again, for as long as one does."""
        ids: list[int] = []
        while text:
            ends = (end for end in range(min(len(text), self._longest), 0, -1) if text[:end] in self._ids)
            end = next(ends, None)
            if end is None:
                break
            ids.append(self._ids[text[:end]])
            text = text[end:]
        return ids

    @cached_property
    def _ids(self) -> dict[bytes, int]:
        special = set(self.special_token_ids)
        return {piece: token_id for token_id, piece in enumerate(self.tokens) if piece and token_id not in special}

    @cached_property
    def _longest(self) -> int:
        return max(map(len, self._ids), default=0)


def _check_length(text: str, *, param: str) -> None:
    if len(text) > _LONGEST_SOURCE:
        raise InvalidRequest(f"{param} has {len(text)} characters; at most {_LONGEST_SOURCE} are taken.", param=param)


def _cut(complaint: object) -> str:
    text = str(complaint).removesuffix("<non-verbose/>").strip()
    return text if len(text) <= _LONGEST_COMPLAINT else text[:_LONGEST_COMPLAINT] + "..."
