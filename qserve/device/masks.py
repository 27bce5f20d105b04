"""What a row may choose: by its grammar or its list of tokens, no end of a bad word, no end too early.

Two questions, of which the first costs far less: which of these tokens may come next, and which tokens may. Knows no
grammars: a constraint tells its tokens as bits, and so do the rules.
"""

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from qserve.device.draw import Floats
from qserve.engine.request import Request


class Rules:
    """What one request may say next."""

    def __init__(self, request: Request) -> None:
        self._constraint = request.constraint
        self._listed = request.params.allowed_token_ids
        self._banned = find_banned_ids(request)

    def find_permitted(self, token_ids: Sequence[int]) -> int | None:
        """The first of these that may come next."""
        if self._listed is not None or self._banned:
            token_ids = [each for each in token_ids if self._leaves(each)]
        if self._constraint is None:
            return token_ids[0] if token_ids else None
        return self._constraint.find_allowed(token_ids)

    def _leaves(self, token_id: int) -> bool:
        return token_id not in self._banned and (self._listed is None or token_id in self._listed)

    def permitted(self, vocabulary: int) -> bytes:
        """One bit for each token id, the lowest bit of the first byte for id 0."""
        bits = self._constraint.allowed() if self._constraint is not None else b"\xff" * ((vocabulary + 7) // 8)
        if self._listed is not None:
            bits = (np.frombuffer(bits, dtype=np.uint8) & _pack(self._listed, size=len(bits))).tobytes()
        if self._banned:
            bits = (np.frombuffer(bits, dtype=np.uint8) & ~_pack(self._banned, size=len(bits))).tobytes()
        return bits


def _pack(token_ids: Iterable[int], *, size: int) -> NDArray[np.uint8]:
    flags = np.zeros(size * 8, dtype=bool)
    flags[[token_id for token_id in token_ids if token_id < size * 8]] = True
    return np.packbits(flags, bitorder="little")


def forbid(logits: Floats, bits: bytes) -> Floats:
    """A copy with minus infinity for what is not permitted."""
    flags = np.unpackbits(np.frombuffer(bits, dtype=np.uint8), count=len(logits), bitorder="little")
    return np.where(flags, logits, np.float32(-np.inf))


def has_rules(request: Request) -> bool:
    """Whether any rule may forbid this request's next token something."""
    params = request.params
    return request.constraint is not None or params.forbids_tokens or request.num_output_tokens < params.min_tokens


def find_banned_ids(request: Request) -> set[int]:
    """What would complete a bad word, and what would end the request before it has as many tokens as it must have."""
    params = request.params
    banned = set(params.stop_token_ids) if request.num_output_tokens < params.min_tokens else set()
    for word in params.bad_words:
        start = request.num_tokens - (len(word) - 1)
        if start >= request.num_prompt_tokens and request.token_ids[start:] == list(word[:-1]):
            banned.add(word[-1])
    return banned
