"""From logits to the next token of each row.

The order: masks; repetition penalty on the raw logits, then presence and frequency, bias; temperature; top-k, top-p (of
what top-k left), min-p; typical-p (of what they all left). The draw is one number in [0, 1) for each row, made from the
request's seed and the position alone, and put through the row's own cumulative distribution, so a row's token does not
depend on the rows beside it.
"""

import hashlib
import secrets
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qserve.device.draw import draw
from qserve.device.masks import Masks, is_masked
from qserve.engine.request import Request


class Sampler:
    """Chooses tokens. A request without a seed draws from the randomness of this object, and of no other."""

    def __init__(self, *, seed: int | None = None) -> None:
        self._seed = secrets.randbits(64) if seed is None else seed

    def sample(self, logits: Tensor, requests: Sequence[Request]) -> list[int | None]:
        """The next token of each request, from one row of logits each: (requests, vocabulary).

        None where the rules of a request leave no token.
        """
        is_adjusted = any(map(_changes_logits, requests))
        if is_adjusted:
            logits = adjust(logits, requests)
        tokens: list[int | None] = [*_find_best(logits)]
        if is_adjusted:
            best = torch.tensor(tokens, device=logits.device).unsqueeze(1)
            is_dead = logits.gather(1, best).squeeze(1).isneginf().tolist()
            tokens = [None if dead else token for token, dead in zip(tokens, is_dead, strict=True)]
        drawn = [row for row, each in enumerate(requests) if each.params.temperature > 0 and tokens[row] is not None]
        for row, values in zip(drawn, _to_host(logits, drawn), strict=True):
            tokens[row] = draw(values, requests[row].params, self._uniform(requests[row]))
        return tokens

    def _uniform(self, request: Request) -> float:
        seed = request.params.seed
        source = f"{self._seed}/{request.id}" if seed is None else f"{seed}"
        return uniform(source, request.num_tokens)


def _find_best(logits: Tensor) -> list[int]:
    """The likeliest token of each row. On the CPU by numpy: a row of 49,152 takes it 4 µs, and torch 70."""
    found = logits.numpy().argmax(axis=-1) if logits.device.type == "cpu" else logits.argmax(dim=-1)
    tokens: list[int] = found.tolist()
    return tokens


def _to_host(logits: Tensor, rows: Sequence[int]) -> Iterable[NDArray[np.float32]]:
    """These rows, one after the other."""
    if logits.device.type != "cpu":
        logits, rows = logits[list(rows)].cpu(), range(len(rows))
    host = logits.numpy()
    return (host[row] for row in rows)


def uniform(source: str, position: int) -> float:
    """A number in [0, 1) of 53 bits that depends on these two and nothing else."""
    digest = hashlib.blake2b(f"{source}@{position}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest) >> 11) * 2.0**-53


def adjust(logits: Tensor, requests: Sequence[Request]) -> Tensor:
    """A copy with masks, penalties and bias: (requests, vocabulary). What is forbidden stays so under all of them."""
    logits = Masks(requests).apply(logits)
    _penalize(logits, requests)
    _add_biases(logits, requests)
    return logits


def _changes_logits(request: Request) -> bool:
    params = request.params
    return bool(
        params.presence_penalty
        or params.frequency_penalty
        or params.repetition_penalty != 1.0
        or params.logit_bias
        or is_masked(request)
    )


def _penalize(logits: Tensor, requests: Sequence[Request]) -> None:
    """Of each row only the tokens that occurred are touched."""
    for row, request in enumerate(requests):
        params = request.params
        if params.repetition_penalty != 1.0:
            seen, _ = _count(request.token_ids, logits)
            old, penalty = logits[row, seen], params.repetition_penalty
            logits[row, seen] = torch.where(old > 0, old / penalty, old * penalty)
        if params.presence_penalty or params.frequency_penalty:
            said, counts = _count(request.token_ids[request.num_prompt_tokens :], logits)
            logits[row, said] -= counts * params.frequency_penalty + params.presence_penalty


def _count(token_ids: Sequence[int], like: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens that occur, and how often each does."""
    tokens, counts = np.unique(np.array(token_ids, dtype=np.int64), return_counts=True)
    return torch.from_numpy(tokens).to(like.device), torch.from_numpy(counts).to(like.device)


def _add_biases(logits: Tensor, requests: Sequence[Request]) -> None:
    entries = [
        (row, token, bias)
        for row, request in enumerate(requests)
        for token, bias in request.params.logit_bias.items()
        if token < logits.shape[-1]
    ]
    if entries:
        rows, tokens, biases = (list(column) for column in zip(*entries, strict=True))
        values = torch.tensor(biases, dtype=logits.dtype, device=logits.device)
        logits.index_put_((_indices(rows, logits), _indices(tokens, logits)), values, accumulate=True)


def _indices(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device=like.device)
