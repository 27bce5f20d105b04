"""From logits to the next token of each row, and the log-probabilities that were asked for.

The order: masks; repetition penalty on the raw logits, then presence and frequency, bias; temperature; top-k, top-p (of
what top-k left), min-p; typical-p (of what they all left). Log-probabilities are those of the raw distribution. The
draw is one number in [0, 1) for each row, made from the request's seed and the position alone, and put through the
row's own cumulative distribution, so a row's token does not depend on the rows beside it.
"""

import hashlib
import secrets
from collections.abc import Callable, Sequence
from itertools import chain

import torch
from torch import Tensor

from qserve.device.masks import Masks, is_masked
from qserve.engine.request import Request, SamplingParams, TokenLogprob

_NUM_CANDIDATES = 256  # tried before the whole vocabulary is sorted for top-p


class Sampler:
    """Chooses tokens. A request without a seed draws from the randomness of this object, and of no other."""

    def __init__(self, *, seed: int | None = None) -> None:
        self._seed = secrets.randbits(64) if seed is None else seed

    def sample(self, logits: Tensor, requests: Sequence[Request]) -> list[int | None]:
        """The next token of each request, from one row of logits each: (requests, vocabulary).

        None where the rules of a request leave no token.
        """
        params = [request.params for request in requests]
        if any(_changes_logits(request) for request in requests):
            logits = adjust(logits, requests)
        best = logits.argmax(dim=-1, keepdim=True)
        is_dead = logits.gather(1, best).isneginf().squeeze(1).tolist()
        tokens = [None if dead else int(token) for token, dead in zip(best.squeeze(1).tolist(), is_dead, strict=True)]
        drawn = [row for row, each in enumerate(params) if each.temperature > 0 and not is_dead[row]]
        if drawn:
            uniforms = [self._uniform(requests[row]) for row in drawn]
            picked = draw(logits[drawn], [params[row] for row in drawn], uniforms)
            for row, token in zip(drawn, picked, strict=True):
                tokens[row] = token
        return tokens

    def _uniform(self, request: Request) -> float:
        seed = request.params.seed
        source = f"{self._seed}/{request.id}" if seed is None else f"{seed}"
        return uniform(source, request.num_tokens)


def uniform(source: str, position: int) -> float:
    """A number in [0, 1) of 53 bits that depends on these two and nothing else."""
    digest = hashlib.blake2b(f"{source}@{position}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest) >> 11) * 2.0**-53


def adjust(logits: Tensor, requests: Sequence[Request]) -> Tensor:
    """A copy with masks, penalties and bias: (requests, vocabulary). What is forbidden stays so under all of them."""
    logits = Masks(requests).apply(logits)
    _penalize_repetition(logits, requests)
    _penalize_presence(logits, requests)
    _add_biases(logits, requests)
    return logits


def draw(logits: Tensor, params: Sequence[SamplingParams], uniforms: Sequence[float]) -> list[int]:
    """One token a row, all of them with a temperature above zero. Rows without top-k and top-p need no sorting."""
    device = logits.device
    temperatures = torch.tensor([each.temperature for each in params], device=device).clamp(min=1e-30).unsqueeze(1)
    # The largest becomes zero first, so that a tiny temperature makes the others -inf and nothing NaN.
    scaled = (logits - logits.amax(dim=-1, keepdim=True)) / temperatures
    choices = torch.tensor(uniforms, dtype=torch.float64, device=device)
    vocabulary = logits.shape[-1]
    ways = [_way_to_draw(each, vocabulary) for each in params]
    tokens = [0] * len(params)
    for pick in (_draw_plain, _draw_sorted, _draw_typical):
        rows = [row for row, way in enumerate(ways) if way is pick]
        if rows:
            picked = pick(scaled[rows], [params[row] for row in rows], choices[rows])
            for row, token in zip(rows, picked.tolist(), strict=True):
                tokens[row] = token
    return tokens


def logprobs_of(logits: Tensor, token_ids: Tensor, *, num_top: int) -> list[tuple[TokenLogprob, ...]]:
    """For each row of logits the token that is given, then the `num_top` most likely."""
    # Not logsumexp: it sums a lone row by several threads, and so rounds it otherwise than among other rows.
    logprobs = torch.log_softmax(logits, dim=-1)
    chosen = token_ids.unsqueeze(1)  # (rows, 1)
    ranks = (logits > logits.gather(1, chosen)).sum(dim=-1) + 1
    top_ids = logits.topk(min(num_top, logits.shape[-1]), dim=-1).indices
    columns = (token_ids, logprobs.gather(1, chosen).squeeze(1), ranks, top_ids, logprobs.gather(1, top_ids))
    rows = zip(*(column.tolist() for column in columns), strict=True)
    return [
        (
            TokenLogprob(token_id, logprob, rank),
            *(TokenLogprob(top, value, place + 1) for place, (top, value) in enumerate(zip(tops, values, strict=True))),
        )
        for token_id, logprob, rank, tops, values in rows
    ]


def logprobs_at(logits: Tensor, token_ids: Sequence[int]) -> tuple[TokenLogprob, ...]:
    """The tokens that are named, from one row of logits: (vocabulary,)."""
    if not token_ids:
        return ()
    values = logits[list(token_ids)]
    num_not_above = torch.searchsorted(logits.sort().values, values, right=True)
    ranks = logits.shape[-1] - num_not_above + 1
    logprobs = torch.log_softmax(logits, dim=-1)[list(token_ids)]
    return tuple(map(TokenLogprob, token_ids, logprobs.tolist(), ranks.tolist()))


def _changes_logits(request: Request) -> bool:
    params = request.params
    return bool(
        params.presence_penalty
        or params.frequency_penalty
        or params.repetition_penalty != 1.0
        or params.logit_bias
        or is_masked(request)
    )


def _counts(logits: Tensor, token_lists: Sequence[Sequence[int]]) -> Tensor:
    """How often each token occurs in each list: (lists, vocabulary)."""
    lengths = torch.tensor([len(tokens) for tokens in token_lists])
    rows = torch.repeat_interleave(torch.arange(len(token_lists)), lengths).to(logits.device)
    columns = torch.tensor(list(chain.from_iterable(token_lists)), dtype=torch.int64, device=logits.device)
    counts = torch.zeros(len(token_lists), logits.shape[-1], device=logits.device)
    return counts.index_put_((rows, columns), torch.ones((), device=logits.device), accumulate=True)


def _penalize_repetition(logits: Tensor, requests: Sequence[Request]) -> None:
    rows = [row for row, request in enumerate(requests) if request.params.repetition_penalty != 1.0]
    if not rows:
        return
    penalties = torch.tensor([requests[row].params.repetition_penalty for row in rows], device=logits.device)
    penalties = penalties.unsqueeze(1)
    old = logits[rows]
    is_seen = _counts(logits, [requests[row].token_ids for row in rows]) > 0
    logits[rows] = torch.where(is_seen, torch.where(old > 0, old / penalties, old * penalties), old)


def _penalize_presence(logits: Tensor, requests: Sequence[Request]) -> None:
    rows = [
        row
        for row, request in enumerate(requests)
        if request.params.presence_penalty or request.params.frequency_penalty
    ]
    if not rows:
        return
    params = [requests[row].params for row in rows]
    presence = torch.tensor([each.presence_penalty for each in params], device=logits.device).unsqueeze(1)
    frequency = torch.tensor([each.frequency_penalty for each in params], device=logits.device).unsqueeze(1)
    counts = _counts(logits, [requests[row].token_ids[requests[row].num_prompt_tokens :] for row in rows])
    logits[rows] -= counts * frequency + (counts > 0) * presence


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


def _invert(probabilities: Tensor, choices: Tensor) -> Tensor:
    """The first column at which the cumulative probability exceeds the choice: (rows,). float64, for the long tail."""
    cumulative = probabilities.to(torch.float64).cumsum(dim=-1)
    targets = choices.unsqueeze(1) * cumulative[:, -1:]
    picked = torch.searchsorted(cumulative, targets, right=True).squeeze(1)
    # Rounding may put a target on the very end of the sum; the last token that can be drawn at all is meant then.
    last = (cumulative < cumulative[:, -1:]).sum(dim=-1)
    return torch.minimum(picked, last)


def _passes_min_p(scaled: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Which tokens are at least min_p as likely as the likeliest, whose scaled logit is zero."""
    limits = torch.tensor([each.min_p for each in params], device=scaled.device).log().unsqueeze(1)  # log(0) = -inf
    return scaled >= limits


def _draw_plain(scaled: Tensor, params: Sequence[SamplingParams], choices: Tensor) -> Tensor:
    probabilities = torch.softmax(scaled, dim=-1)
    if any(each.min_p for each in params):
        probabilities = probabilities * _passes_min_p(scaled, params)
    return _invert(probabilities, choices)


def _way_to_draw(params: SamplingParams, vocabulary: int) -> Callable[..., Tensor]:
    if params.typical_p < 1:
        return _draw_typical
    return _draw_sorted if params.top_p < 1 or 0 < params.top_k < vocabulary else _draw_plain


def _draw_sorted(scaled: Tensor, params: Sequence[SamplingParams], choices: Tensor) -> Tensor:
    tokens, probabilities = _keep_likely(scaled, params, num_candidates=_NUM_CANDIDATES)
    return tokens.gather(1, _invert(probabilities, choices).unsqueeze(1)).squeeze(1)


def _draw_typical(scaled: Tensor, params: Sequence[SamplingParams], choices: Tensor) -> Tensor:
    """Locally typical sampling (arXiv 2202.00666, section 4): tokens whose surprise is nearest to what was expected.

    Kept are the fewest, nearest first, that have the probability typical_p together. Everything is sorted, always: the
    sums below would be rounded otherwise for other candidates.
    """
    tokens, probabilities = _keep_likely(scaled, params, num_candidates=scaled.shape[-1])
    probabilities = probabilities / probabilities.cumsum(dim=-1)[:, -1:]
    surprise = -probabilities.clamp(min=torch.finfo(torch.float64).tiny).log()
    entropy = (probabilities * surprise).cumsum(dim=-1)[:, -1:]
    # What cannot be drawn comes last; equals stay in their order, the likelier first.
    distance = (surprise - entropy).abs().masked_fill(probabilities == 0, torch.inf)
    order = distance.argsort(dim=-1, stable=True)
    tokens, probabilities = tokens.gather(1, order), probabilities.gather(1, order)
    limits = torch.tensor([each.typical_p for each in params], dtype=torch.float64, device=scaled.device).unsqueeze(1)
    before = probabilities.cumsum(dim=-1) - probabilities
    probabilities[:, 1:] *= before[:, 1:] < limits
    return tokens.gather(1, _invert(probabilities, choices).unsqueeze(1)).squeeze(1)


def _keep_likely(scaled: Tensor, params: Sequence[SamplingParams], *, num_candidates: int) -> tuple[Tensor, Tensor]:
    """Tokens, best first, and their probabilities, 0 for those that top-k, top-p or min-p drops: (rows, candidates).

    At first so many candidates are looked at, and all tokens where they turn out too few.
    """
    vocabulary = scaled.shape[-1]
    limits = [each.top_k if 0 < each.top_k < vocabulary else vocabulary for each in params]
    top_k = torch.tensor(limits, device=scaled.device).unsqueeze(1)
    top_p = torch.tensor([each.top_p for each in params], dtype=torch.float64, device=scaled.device).unsqueeze(1)
    num_candidates = min(vocabulary, max([num_candidates, *(limit for limit in limits if limit < vocabulary)]))
    likelihoods = torch.softmax(scaled, dim=-1)
    values, tokens = _find_best(scaled, num_candidates)
    probabilities = likelihoods.gather(1, tokens).to(torch.float64)
    needs_all = (probabilities.sum(dim=-1, keepdim=True) < top_p) & (top_k > num_candidates)
    if num_candidates < vocabulary and bool(needs_all.any()):
        values, tokens = _find_best(scaled, vocabulary)
        probabilities = likelihoods.gather(1, tokens).to(torch.float64)
    places = torch.arange(values.shape[-1], device=scaled.device)
    probabilities = probabilities * (places < top_k)
    # Where top-k cut, top-p is a share of what it left; elsewhere of everything, even if not all of it was sorted.
    total = torch.where(top_k < vocabulary, probabilities.cumsum(dim=-1)[:, -1:], 1.0)
    before = probabilities.cumsum(dim=-1) - probabilities
    probabilities = probabilities * ((before < top_p * total) | (places == 0))
    return tokens, probabilities * _passes_min_p(values, params)


def _find_best(scaled: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """Values and tokens, best first: (rows, number)."""
    if number < scaled.shape[-1]:
        values, tokens = scaled.topk(number, dim=-1)
    else:
        values, tokens = scaled.sort(dim=-1, descending=True, stable=True)
    return values, tokens
