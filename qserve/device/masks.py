"""What a row may not choose: outside its grammar or its list of tokens, the end of a bad word, an end too early.

Every rule makes logits minus infinity; a row whose rules leave nothing has no finite logit. A row is a numpy array and
is looked at alone. Knows no grammars: a constraint tells its tokens as bits.
"""

import math

import numpy as np
from numpy.typing import NDArray

from qserve.engine.request import Constraint, Request

Row = NDArray[np.float32]

# For each byte the biases of its bits, the lowest first: (256, 8).
_BITS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, np.newaxis], axis=1, bitorder="little")
_BIASES = np.where(_BITS, 0, -math.inf).astype(np.float32)


def is_masked(request: Request) -> bool:
    """Whether any rule may forbid this request's next token something."""
    params = request.params
    return (
        request.constraint is not None
        or params.allowed_token_ids is not None
        or bool(params.bad_words)
        or request.num_output_tokens < params.min_tokens
    )


def permits(request: Request, token_id: int) -> bool:
    """Whether no rule forbids that token next; far less work than to find what all rules leave."""
    params = request.params
    if params.allowed_token_ids is not None and token_id not in params.allowed_token_ids:
        return False
    if token_id in find_banned_ids(request):
        return False
    return request.constraint is None or request.constraint.allows(token_id)


def mask(logits: Row, request: Request) -> Row:
    """A copy with minus infinity where a token is forbidden."""
    allowed = request.params.allowed_token_ids
    masked = logits.copy() if request.constraint is None else _follow(request.constraint, logits)
    if allowed is not None:
        kept = list(allowed)
        masked[:], masked[kept] = -math.inf, masked[kept]
    masked[[token_id for token_id in find_banned_ids(request) if token_id < len(masked)]] = -math.inf
    return masked


def _follow(constraint: Constraint, logits: Row) -> Row:
    """Eight tokens at once from a table: 19 µs for 49,152 of them, where np.where takes up to 180."""
    bits = np.frombuffer(constraint.allowed(), dtype=np.uint8)
    return logits + _BIASES.take(bits, axis=0).reshape(-1)[: len(logits)]


def find_banned_ids(request: Request) -> set[int]:
    """What would complete a bad word, and what would end the request before it has as many tokens as it must have."""
    params = request.params
    banned = set(params.stop_token_ids) if request.num_output_tokens < params.min_tokens else set()
    for word in params.bad_words:
        start = request.num_tokens - (len(word) - 1)
        if start >= request.num_prompt_tokens and request.token_ids[start:] == list(word[:-1]):
            banned.add(word[-1])
    return banned
