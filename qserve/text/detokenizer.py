"""Text that arrives token by token: only whole characters leave, and the pieces joined are the text decoded at once.

One detokenizer serves one text. Knows no stop strings (stop.py) and no requests.
"""

import codecs
from collections.abc import Sequence
from typing import Protocol

from qserve.text.tokenizer import Tokenizer

# A character has at most four bytes, so what the prompt left unfinished lies within its last four tokens.
_LONGEST_CHARACTER = 4
_REPLACEMENT = "\ufffd"


class Detokenizer(Protocol):
    """Feed it every token of one text, then finish it once."""

    def feed(self, token_id: int) -> str:
        """The text that became certain with this token; empty while a character is incomplete."""

    def finish(self) -> str:
        """What was held back; a character that stayed incomplete is U+FFFD now."""


def make_detokenizer(
    tokenizer: Tokenizer, prompt_ids: Sequence[int] = (), *, skipped: frozenset[int] | None = None
) -> Detokenizer:
    """A detokenizer for text that continues a prompt, so that the first word keeps the space before it.

    The tokens that are skipped are by default all special ones.
    """
    kind = _ByteDetokenizer if tokenizer.is_byte_level else _WindowDetokenizer
    skipped = tokenizer.special_ids if skipped is None else skipped
    detokenizer: _ByteDetokenizer | _WindowDetokenizer = kind(tokenizer, skipped)
    detokenizer.continue_from(prompt_ids)
    return detokenizer


class _ByteDetokenizer:
    """For byte-level vocabularies: a token is bytes, and the standard library decodes UTF-8 that comes in pieces."""

    def __init__(self, tokenizer: Tokenizer, skipped: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._skipped = skipped
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def continue_from(self, prompt_ids: Sequence[int]) -> None:
        for token_id in prompt_ids[-_LONGEST_CHARACTER:]:
            self.feed(token_id)

    def feed(self, token_id: int) -> str:
        if token_id in self._skipped:
            return ""
        return self._decoder.decode(self._tokenizer.token_bytes(token_id))

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


class _WindowDetokenizer:
    """For every other vocabulary: decodes a short window of tokens with the tokenizer's own decoder.

        tokens    a0 a1 a2 [A] b0 b1 b2
                            |  `- pending: not yet certain, decoded again with every token
                            `- anchor: the last certain token; it stands before the pending ones so that what a
                               decoder does at the start of a text (SentencePiece drops a space) happens to it

    A run of byte tokens is decoded as a whole (one bad byte turns all of it into U+FFFD), so it is held to its end.
    """

    def __init__(self, tokenizer: Tokenizer, skipped: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._skipped = skipped
        self._anchor: list[int] = []
        self._pending: list[int] = []

    def continue_from(self, prompt_ids: Sequence[int]) -> None:
        is_byte = self._tokenizer.is_byte_token
        self._anchor = [i for i in reversed(prompt_ids) if not self._is_silent(i) and not is_byte(i)][:1]

    def feed(self, token_id: int) -> str:
        if self._is_silent(token_id):
            return ""
        self._pending.append(token_id)
        if self._tokenizer.is_byte_token(token_id):
            return ""
        text = self._decode_pending()
        if text.endswith(_REPLACEMENT) and not self._tokenizer.has_byte_tokens:
            return ""
        self._anchor, self._pending = [token_id], []
        return text

    def finish(self) -> str:
        text = self._decode_pending()
        self._pending = []
        return text

    def _is_silent(self, token_id: int) -> bool:
        """A token that the decoder never sees: skipped, or an id that the vocabulary does not hold."""
        return token_id in self._skipped or not self._tokenizer.id_to_token(token_id)

    def _decode_pending(self) -> str:
        before = self._decode(self._anchor)
        return self._decode(self._anchor + self._pending)[len(before) :]

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=False)
