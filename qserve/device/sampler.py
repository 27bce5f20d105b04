"""From logits to the next token of each row.

The order: rules; repetition penalty on the raw logits, then presence and frequency, bias; temperature; top-k, top-p (of
what top-k left), min-p; typical-p (of what they all left). The draw is one number in [0, 1) for each row, made from the
request's seed and the position alone, and put through the row's own cumulative distribution, so a row's token does not
depend on the rows beside it.

The kernels choose for all rows at once, of the raw logits. Rows for which that is not all are done again: under their
penalties; and for typical-p, which kernels do not know, by draw.py.

A grammar tells in 1 µs whether one token may come next, and in 4 µs to 1 ms which tokens may. So where nothing but a
temperature counts, it is asked about the token that was chosen as if there were no rules, and where it forbids that,
about a few more that were drawn with it. That is rejection sampling: the first that is permitted is a draw from what is
permitted, and so is, if all are forbidden, one that is drawn from just that with another number; how often is tried
does not matter. What top-p, top-k and min-p leave depends on all that is permitted, which the kernels are told then.
"""

import hashlib
import secrets
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qserve.device.draw import Floats, draw
from qserve.device.masks import Rules, forbid, has_rules
from qserve.engine.request import Request
from qserve.kernels.reference_sampling import sample as sample_plainly

Choose = Callable[[Tensor, Tensor, Sequence[bytes | None] | None], Tensor]  # `sample` of kernels/ops.py
Draw = tuple[float, ...]  # a row of its `draws`

_LIKELIEST = (0.0, 0.0, 1.0, 0.0, 0.0)
NUM_TRIALS = 7  # that with the one after them a digest has numbers for
_MOST = 2**31  # for top-k, which may be a number that no float can hold; no vocabulary has as many


class Sampler:
    """Chooses tokens. A request without a seed draws from the randomness of this object, and of no other."""

    def __init__(self, *, choose: Choose = sample_plainly, seed: int | None = None) -> None:
        self._choose = choose
        self._seed = secrets.randbits(64) if seed is None else seed

    def sample(self, logits: Tensor, requests: Sequence[Request]) -> list[int | None]:
        """The next token of each request, from one row of logits each: (requests, vocabulary).

        None where the rules of a request leave no token.
        """
        if all(each.takes_likeliest for each in requests):
            return _first(self._choose_by(logits, [_LIKELIEST] * len(requests), {}))
        rules = {row: Rules(each) for row, each in enumerate(requests) if has_rules(each)}
        changed = {row for row, each in enumerate(requests) if _is_changed(each)}
        tried = {row for row in rules if row not in changed and not _is_cut(requests[row])}
        bits = {row: rules[row].permitted(logits.shape[1]) for row in rules.keys() - changed - tried}
        draws = [self._describe(each, end=NUM_TRIALS if row in tried else 1) for row, each in enumerate(requests)]
        chosen = self._choose_by(logits, draws, bits)
        tokens = _first(chosen)
        for row in tried:
            tokens[row] = rules[row].find_permitted(chosen[row])
        left = dict.fromkeys(changed, 0) | {row: NUM_TRIALS for row in tried if tokens[row] is None}
        for row, token in self._choose_again(logits, left, requests, rules).items() if left else ():
            tokens[row] = token
        return tokens

    def _choose_by(self, logits: Tensor, draws: Sequence[Draw], bits: Mapping[int, bytes]) -> list[list[int]]:
        """The tokens of each row, each once, in the order in which they were drawn; none where nothing can be."""
        width = max(map(len, draws))
        # From tuples numpy makes an array in a tenth of torch's time.
        table = np.array([each + (0.0,) * (width - len(each)) for each in draws], dtype=np.float64)
        allowed = [bits.get(row) for row in range(len(draws))] if bits else None
        chosen = self._choose(logits, torch.from_numpy(table), allowed).tolist()
        return [[*dict.fromkeys(each)] if each[0] >= 0 else [] for each in chosen]

    def _describe(self, request: Request, *, start: int = 0, end: int) -> Draw:
        """A row of `draws`, see kernels/ops.py, with these of the request's numbers."""
        params = request.params
        if params.temperature == 0:
            return _LIKELIEST
        top_k = min(params.top_k, _MOST)
        return params.temperature, top_k, params.top_p, params.min_p, *self._numbers(request)[start:end]

    def _choose_again(
        self, logits: Tensor, left: Mapping[int, int], requests: Sequence[Request], rules: Mapping[int, Rules]
    ) -> dict[int, int | None]:
        """The tokens of these rows under all that counts, each drawn with that one of its numbers."""
        rows = np.stack([*_to_host(logits, [*left])])
        for values, row in zip(rows, left, strict=True):
            adjust(values, requests[row])
        bits = {place: rules[row].permitted(rows.shape[1]) for place, row in enumerate(left) if row in rules}
        draws = [self._describe(requests[row], start=number, end=number + 1) for row, number in left.items()]
        found = self._choose_by(torch.from_numpy(rows), draws, bits)
        tokens: dict[int, int | None] = {}
        for place, (row, chosen) in enumerate(zip(left, found, strict=True)):
            tokens[row] = chosen[0] if chosen else None
            if chosen and _is_typical(requests[row]):
                values = forbid(rows[place], bits[place]) if place in bits else rows[place]
                tokens[row] = draw(values, requests[row].params, self._numbers(requests[row])[0])
        return tokens

    def _numbers(self, request: Request) -> list[float]:
        seed = request.params.seed
        return uniforms(f"{self._seed}/{request.id}" if seed is None else f"{seed}", request.num_tokens)


def _first(chosen: Sequence[Sequence[int]]) -> list[int | None]:
    return [each[0] if each else None for each in chosen]


def _to_host(logits: Tensor, rows: Sequence[int]) -> Iterable[Floats]:
    """These rows, one after the other."""
    if logits.device.type != "cpu":
        logits, rows = logits[list(rows)].cpu(), range(len(rows))
    host = logits.numpy()
    return (host[row] for row in rows)


def uniforms(source: str, position: int) -> list[float]:
    """Eight numbers in [0, 1) of 53 bits that depend on these two and nothing else."""
    digest = hashlib.blake2b(f"{source}@{position}".encode()).digest()
    return [(each >> 11) * 2.0**-53 for each in struct.unpack(">8Q", digest)]


def adjust(logits: Floats, request: Request) -> None:
    """Puts a row under penalties and bias; only the tokens that occurred, or that have a bias, are touched."""
    params = request.params
    if params.repetition_penalty != 1.0:
        seen, _ = _count(request.token_ids)
        old, penalty = logits[seen], params.repetition_penalty
        logits[seen] = np.where(old > 0, old / penalty, old * penalty)
    if params.presence_penalty or params.frequency_penalty:
        said, counts = _count(request.token_ids[request.num_prompt_tokens :])
        logits[said] -= counts * params.frequency_penalty + params.presence_penalty
    for token_id, bias in params.logit_bias.items():
        if token_id < len(logits):
            logits[token_id] += bias


def _is_changed(request: Request) -> bool:
    """Whether the token is not chosen by kernels of the raw logits."""
    return request.params.changes_logits or _is_typical(request)


def _is_typical(request: Request) -> bool:
    return request.params.typical_p < 1 and request.params.temperature > 0


def _is_cut(request: Request) -> bool:
    """Whether what is left depends on more than one token."""
    params = request.params
    return params.temperature > 0 and bool(params.top_k or params.min_p or params.top_p < 1)


def _count(token_ids: Sequence[int]) -> tuple[NDArray[np.int64], Floats]:
    """The tokens that occur, and how often each does."""
    tokens, counts = np.unique(np.array(token_ids, dtype=np.int64), return_counts=True)
    return tokens, counts.astype(np.float32)
