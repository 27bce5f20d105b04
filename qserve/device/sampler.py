"""From logits to the next token of each row.

The order: rules; repetition penalty on the raw logits, then presence and frequency, bias; temperature; top-k, top-p (of
what top-k left), min-p; typical-p (of what they all left). The draw is one number in [0, 1) for each row, made from the
request's seed and the position alone, and put through the row's own cumulative distribution, so a row's token does not
depend on the rows beside it.

The kernels choose for all rows at once, of the raw logits. Rows for which that is not all are done again without what
their rules forbid, and under their penalties; for typical-p, which kernels do not know, by draw.py.

A grammar tells in 1 µs whether one token may come next, and in up to 1 ms which tokens may. So where nothing but a
temperature counts, it is asked about the token that was chosen as if there were no rules, and where it forbids that,
about a few more. The likeliest of these that it permits is the likeliest of all that are permitted. If they are drawn,
it is rejection sampling: the first that is permitted is a draw from what is permitted, and so is, if all are forbidden,
one that is drawn from just that with another number; how often is tried does not matter. Where only one text can
follow, the grammar knows all that it allows from the first question on, and no more are tried.
"""

import hashlib
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qserve.device.draw import Floats, draw
from qserve.device.masks import Rules, has_rules
from qserve.engine.request import Request
from qserve.kernels.reference_sampling import sample as sample_plainly

Choose = Callable[[Tensor, Tensor], Tensor]  # `sample` of kernels/ops.py

_LIKELIEST = (0.0, 0.0, 0.0, 1.0, 0.0)  # a row of `draws`
_NUM_TRIALS = 4
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
        chosen = self._choose_by(logits, [self._describe(each) if _is_raw(each) else _LIKELIEST for each in requests])
        tokens: list[int | None] = [*chosen]
        unsettled = [row for row, each in enumerate(requests) if not _is_settled(each, chosen=chosen[row])]
        left: dict[int, Floats] = {}
        for row, values in zip(unsettled, _to_host(logits, unsettled), strict=True):
            tokens[row] = None if np.isneginf(values[chosen[row]]) else self._try_again(values, requests[row])
            if tokens[row] is None:
                left[row] = values
        for row, token in self._choose_of_left(left, requests).items() if left else ():
            tokens[row] = token
        return tokens

    def _choose_by(self, logits: Tensor, draws: Sequence[tuple[float, ...]]) -> list[int]:
        # From tuples numpy makes an array in a tenth of torch's time.
        tokens: list[int] = self._choose(logits, torch.from_numpy(np.array(draws, dtype=np.float64))).tolist()
        return tokens

    def _describe(self, request: Request, *, number: int = 0) -> tuple[float, ...]:
        """A row of `draws`, see kernels/ops.py."""
        params = request.params
        if params.temperature == 0:
            return _LIKELIEST
        top_k = min(params.top_k, _MOST)
        return params.temperature, self._uniform(request, number), top_k, params.top_p, params.min_p

    def _try_again(self, logits: Floats, request: Request) -> int | None:
        """The first that the rules permit of some more, where they forbid what was chosen of the raw logits."""
        rules = Rules(request)
        if not _is_raw(request) or rules.are_known:
            return None
        if request.params.temperature == 0:
            others = _find_next(logits, _NUM_TRIALS - 1)
        else:
            rows = torch.from_numpy(logits).expand(_NUM_TRIALS - 1, -1)
            others = self._choose_by(rows, [self._describe(request, number=n) for n in range(1, _NUM_TRIALS)])
        permitted = rules.permit(others)
        return next((token for token, is_so in zip(others, permitted, strict=True) if is_so), None)

    def _choose_of_left(self, rows: Mapping[int, Floats], requests: Sequence[Request]) -> dict[int, int | None]:
        """The token of each of these rows, with nothing in them that the rules forbid."""
        own = [requests[row] for row in rows]
        left = np.empty((len(rows), len(next(iter(rows.values())))), dtype=np.float32)
        for values, each, out in zip(rows.values(), own, left, strict=True):
            Rules(each).mask(adjust(values, each), out=out)
        numbers = [_NUM_TRIALS if _is_raw(each) else 0 for each in own]  # the others of a raw row have been used
        draws = [self._describe(each, number=number) for each, number in zip(own, numbers, strict=True)]
        found = self._choose_by(torch.from_numpy(left), draws)
        tokens: dict[int, int | None] = {}
        for row, token, values in zip(rows, found, left, strict=True):
            params = requests[row].params
            if params.typical_p < 1 and params.temperature > 0 and values[token] > -np.inf:
                token = draw(values, params, self._uniform(requests[row], 0))
            tokens[row] = token if values[token] > -np.inf else None
        return tokens

    def _uniform(self, request: Request, number: int) -> float:
        seed = request.params.seed
        source = f"{self._seed}/{request.id}" if seed is None else f"{seed}"
        return uniform(source, request.num_tokens, number=number)


def _to_host(logits: Tensor, rows: Sequence[int]) -> Iterable[Floats]:
    """These rows, one after the other."""
    if logits.device.type != "cpu":
        logits, rows = logits[list(rows)].cpu(), range(len(rows))
    host = logits.numpy()
    return (host[row] for row in rows)


def uniform(source: str, position: int, *, number: int = 0) -> float:
    """A number in [0, 1) of 53 bits that depends on these three and nothing else."""
    name = f"{source}@{position}" if number == 0 else f"{source}@{position}@{number}"
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return (int.from_bytes(digest) >> 11) * 2.0**-53


def _find_next(logits: Floats, number: int) -> list[int]:
    """The likeliest but for the very likeliest, best first; sorting for so few takes longer."""
    left, found = logits.copy(), []
    for _ in range(number):
        left[left.argmax()] = -np.inf
        found.append(int(left.argmax()))
    return [token for token in found if logits[token] > -np.inf]


def adjust(logits: Floats, request: Request) -> Floats:
    """The row under penalties and bias, as a copy where they change it."""
    return _weigh(logits, request) if _is_weighed(request) else logits


def _is_settled(request: Request, *, chosen: int) -> bool:
    """Whether what kernels chose is the next token."""
    return _is_raw(request) and (not has_rules(request) or Rules(request).permit([chosen])[0])


def _is_raw(request: Request) -> bool:
    """Whether what is chosen of the raw logits is the next token, unless a rule forbids it.

    What top-k, top-p and min-p leave depends on all that is permitted.
    """
    params = request.params
    if params.temperature == 0 or _is_weighed(request):
        return not _is_weighed(request)
    is_cut = bool(params.top_k or params.min_p or params.top_p < 1)
    return params.typical_p == 1 and not (is_cut and has_rules(request))


def _is_weighed(request: Request) -> bool:
    params = request.params
    return bool(
        params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1.0 or params.logit_bias
    )


def _weigh(logits: Floats, request: Request) -> Floats:
    """A copy under penalties and bias; only the tokens that occurred, or that have a bias, are touched."""
    params, weighed = request.params, logits.copy()
    if params.repetition_penalty != 1.0:
        seen, _ = _count(request.token_ids)
        old, penalty = weighed[seen], params.repetition_penalty
        weighed[seen] = np.where(old > 0, old / penalty, old * penalty)
    if params.presence_penalty or params.frequency_penalty:
        said, counts = _count(request.token_ids[request.num_prompt_tokens :])
        weighed[said] -= counts * params.frequency_penalty + params.presence_penalty
    for token_id, bias in params.logit_bias.items():
        if token_id < len(weighed):
            weighed[token_id] += bias
    return weighed


def _count(token_ids: Sequence[int]) -> tuple[NDArray[np.int64], Floats]:
    """The tokens that occur, and how often each does."""
    tokens, counts = np.unique(np.array(token_ids, dtype=np.int64), return_counts=True)
    return tokens, counts.astype(np.float32)
