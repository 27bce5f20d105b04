"""The log-probabilities of tokens, and their ranks, under a row of logits as the model gave it.

By numpy and a row at a time, as draw.py is: what is told of a row can depend on nothing but the row, and 341 rows of
49,152 take 40 ms where torch takes 90 on two threads.
"""

import math
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from qserve.device.draw import Floats, find_best
from qserve.engine.request import TokenLogprob


def logprobs_of(logits: Tensor, token_ids: Sequence[int], *, num_top: int) -> list[tuple[TokenLogprob, ...]]:
    """For each row of logits the token that is given, then the `num_top` most likely."""
    rows = logits.cpu().numpy()
    return [_report(row, token_id, num_top=num_top) for row, token_id in zip(rows, token_ids, strict=True)]


def logprobs_at(logits: Tensor, token_ids: Sequence[int]) -> tuple[TokenLogprob, ...]:
    """The tokens that are named, from one row of logits: (vocabulary,)."""
    if not token_ids:
        return ()
    row = logits.cpu().numpy()
    total = _log_sum(row)
    return tuple(_score(row, token_id, total) for token_id in token_ids)


def _report(row: Floats, token_id: int, *, num_top: int) -> tuple[TokenLogprob, ...]:
    total = _log_sum(row)
    best = find_best(row, num_top).tolist() if num_top else []
    top = [TokenLogprob(token, float(row[token]) - total, place) for place, token in enumerate(best, start=1)]
    return (_score(row, token_id, total), *top)


def _score(row: Floats, token_id: int, total: float) -> TokenLogprob:
    value = row[token_id]
    return TokenLogprob(token_id, float(value) - total, int(np.count_nonzero(row > value)) + 1)


def _log_sum(row: Floats) -> float:
    """The logarithm of the sum of all exponentials."""
    largest = row.max()
    return float(largest) + math.log(float(np.exp(row - largest).sum()))
