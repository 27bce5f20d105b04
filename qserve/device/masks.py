"""What a row may choose: by its grammar or its list of tokens, no end of a bad word, no end too early.

Two questions, of which the first costs far less: may these tokens come next; and which tokens may. Knows no logits, and
no grammars: a constraint tells its tokens as bits.
"""

from collections.abc import Sequence

import numpy as np

from qserve.device.draw import Tokens
from qserve.engine.request import Request


class Rules:
    """What one request may say next."""

    def __init__(self, request: Request) -> None:
        self._constraint = request.constraint
        self._listed = request.params.allowed_token_ids
        self._banned = find_banned_ids(request)

    def permit(self, token_ids: Sequence[int]) -> list[bool]:
        """Of each token whether it may come next."""
        permitted = [True] * len(token_ids) if self._constraint is None else self._constraint.allows(token_ids)
        if self._listed is None and not self._banned:
            return permitted
        return [is_so and self._leaves(each) for is_so, each in zip(permitted, token_ids, strict=True)]

    def _leaves(self, token_id: int) -> bool:
        return token_id not in self._banned and (self._listed is None or token_id in self._listed)

    def find_permitted(self, *, vocabulary: int) -> Tokens:
        """All tokens that may come next, in order."""
        flags = np.ones(vocabulary, dtype=bool)
        if self._constraint is not None:
            bits = np.frombuffer(self._constraint.allowed(), dtype=np.uint8)
            flags = np.unpackbits(bits, count=vocabulary, bitorder="little").view(bool)
        if self._listed is not None:
            is_listed = np.zeros(vocabulary, dtype=bool)
            is_listed[[*self._listed]] = True
            flags &= is_listed
        flags[[token_id for token_id in self._banned if token_id < vocabulary]] = False
        return np.flatnonzero(flags)


def has_rules(request: Request) -> bool:
    """Whether any rule may forbid this request's next token something."""
    params = request.params
    return (
        request.constraint is not None
        or params.allowed_token_ids is not None
        or bool(params.bad_words)
        or request.num_output_tokens < params.min_tokens
    )


def find_banned_ids(request: Request) -> set[int]:
    """What would complete a bad word, and what would end the request before it has as many tokens as it must have."""
    params = request.params
    banned = set(params.stop_token_ids) if request.num_output_tokens < params.min_tokens else set()
    for word in params.bad_words:
        start = request.num_tokens - (len(word) - 1)
        if start >= request.num_prompt_tokens and request.token_ids[start:] == list(word[:-1]):
            banned.add(word[-1])
    return banned
