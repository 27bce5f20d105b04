"""From logits to the next token of each row.

The order: rules; repetition penalty on the raw logits, then presence and frequency, bias; temperature; top-k, top-p (of
what top-k left), min-p; typical-p (of what they all left). The draw is one number in [0, 1) for each row, made from the
request's seed and the position alone, and put through the row's own cumulative distribution, so a row's token does not
depend on the rows beside it. Under rules it may take several numbers, of which the first is that one.

The kernels choose for all rows at once. What they do not know, rules, penalties and typical-p, is done here row by row.
"""

import hashlib
import secrets
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qserve.device.draw import Floats, draw
from qserve.device.masks import Rules, has_rules
from qserve.device.trials import Drawn, Greedy
from qserve.engine.request import Request
from qserve.kernels.reference_sampling import sample as sample_plainly

Choose = Callable[[Tensor, Tensor], Tensor]  # `sample` of kernels/ops.py


class Sampler:
    """Chooses tokens. A request without a seed draws from the randomness of this object, and of no other."""

    def __init__(self, *, choose: Choose = sample_plainly, seed: int | None = None) -> None:
        self._choose_freely = choose
        self._seed = secrets.randbits(64) if seed is None else seed

    def sample(self, logits: Tensor, requests: Sequence[Request]) -> list[int | None]:
        """The next token of each request, from one row of logits each: (requests, vocabulary).

        None where the rules of a request leave no token.
        """
        draws = torch.tensor([self._describe_draw(request) for request in requests], dtype=torch.float64)
        chosen: list[int] = self._choose_freely(logits, draws).tolist()
        tokens: list[int | None] = [*chosen]
        unsettled = [row for row, each in enumerate(requests) if not _is_settled(each, chosen=chosen[row])]
        for row, values in zip(unsettled, _to_host(logits, unsettled), strict=True):
            can_choose = not np.isneginf(values[chosen[row]])
            tokens[row] = self._choose(adjust(values, requests[row]), requests[row]) if can_choose else None
        return tokens

    def _describe_draw(self, request: Request) -> tuple[float, ...]:
        """A row of `draws`, see kernels/ops.py: of the likeliest where kernels do not know all that counts."""
        params = request.params
        if not _is_drawn_freely(request):
            return 0.0, 0.0, 0.0, 1.0, 0.0
        return params.temperature, self._choice(request, 0), params.top_k, params.top_p, params.min_p

    def _choose(self, logits: Floats, request: Request) -> int | None:
        params = request.params
        if has_rules(request):
            rules, trial = Rules(request), self._try(logits, request)
            token = trial.settle(rules)
            return trial.choose(rules.find_permitted(vocabulary=len(logits))) if token is None else token
        return draw(logits, params, self._choice(request, 0)) if params.temperature else int(logits.argmax())

    def _try(self, logits: Floats, request: Request) -> Greedy | Drawn:
        params = request.params
        return Drawn(logits, params, partial(self._choice, request)) if params.temperature else Greedy(logits)

    def _choice(self, request: Request, number: int) -> float:
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


def adjust(logits: Floats, request: Request) -> Floats:
    """The row under penalties and bias, as a copy where they change it."""
    return _weigh(logits, request) if _is_weighed(request) else logits


def _is_settled(request: Request, *, chosen: int) -> bool:
    """Whether what kernels chose is the next token.

    The likeliest of the raw logits is where nothing is drawn and no rule forbids it: then it is the likeliest of all
    that are allowed, and nobody needs to know which others are.
    """
    if request.params.temperature > 0:
        return _is_drawn_freely(request)
    return not _is_weighed(request) and (not has_rules(request) or Rules(request).permit([chosen])[0])


def _is_drawn_freely(request: Request) -> bool:
    is_bound = request.params.typical_p < 1 or _is_weighed(request) or has_rules(request)
    return request.params.temperature > 0 and not is_bound


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
