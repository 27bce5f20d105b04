"""One token drawn from one row of logits: temperature, top-k, top-p, min-p and typical-p.

For rows under typical-p, which the kernels do not know. By numpy and a row at a time, on one thread: a row's token can
depend on nothing but the row. Knows no requests.
"""

import math

import numpy as np
from numpy.typing import NDArray

from qserve.engine.request import SamplingParams
from qserve.kernels.ops import LEAST_TEMPERATURE

Floats = NDArray[np.float32]
Weights = NDArray[np.floating]
Tokens = NDArray[np.int64]

_NUM_CANDIDATES = 256  # tried before more of the vocabulary is sorted for top-p
_MORE_CANDIDATES = 16  # times as many, then
_RUN = 256  # weights that are summed at once
_LOWEST = np.finfo(np.float32).min  # below it there is only minus infinity: what cannot be drawn


def draw(logits: Floats, params: SamplingParams, choice: float) -> int:
    """`choice`, in [0, 1), is put through the cumulative distribution of what the parameters leave."""
    temperature = np.float32(max(params.temperature, LEAST_TEMPERATURE))
    # The largest becomes zero first, so that a tiny temperature makes the others -inf and nothing NaN.
    with np.errstate(over="ignore"):
        scaled = (logits - logits.max()) / temperature
    tokens, weights = _keep_likely(scaled, params) if _is_sorted(params, len(scaled)) else _keep_all(scaled, params)
    if params.typical_p < 1:
        tokens, weights = _keep_typical(tokens, weights, params.typical_p)
    return int(tokens[_invert(weights, choice)])


def _is_sorted(params: SamplingParams, vocabulary: int) -> bool:
    return params.top_p < 1 or 0 < params.top_k < vocabulary


def _weigh(scaled: Floats, params: SamplingParams) -> Floats:
    """Probabilities, but for their sum; the likeliest token's is 1."""
    weights = np.exp(scaled)
    if params.min_p:
        weights[scaled < math.log(params.min_p)] = 0
    return weights


def _keep_all(scaled: Floats, params: SamplingParams) -> tuple[Tokens, Weights]:
    weights = _weigh(scaled, params)
    tokens = np.flatnonzero(weights)
    return tokens, weights[tokens].astype(np.float64)


def _keep_likely(scaled: Floats, params: SamplingParams) -> tuple[Tokens, Weights]:
    """What top-k, top-p (of what top-k left) and min-p leave, best first."""
    vocabulary = len(scaled)
    is_cut = 0 < params.top_k < vocabulary
    # Where top-k cuts, top-p is a share of what it leaves; elsewhere of everything, even if not all of it is sorted.
    total = 0.0 if is_cut else float(np.exp(scaled).sum())
    number = params.top_k if is_cut else min(_NUM_CANDIDATES, vocabulary)
    while True:
        tokens = find_best(scaled, number)
        weights = np.exp(scaled[tokens]).astype(np.float64)
        ends = weights.cumsum()
        mass = params.top_p * (ends[-1] if is_cut else total)
        if is_cut or ends[-1] >= mass or number == vocabulary:
            break
        number = min(number * _MORE_CANDIDATES, vocabulary)
    num_kept = max(int(np.searchsorted(ends - weights, mass)), 1)
    if params.min_p:
        num_kept = min(num_kept, int(np.count_nonzero(scaled[tokens] >= math.log(params.min_p))))
    return tokens[:num_kept], weights[:num_kept]


def find_best(scaled: Floats, number: int) -> Tokens:
    """The best so many, or fewer where no more can be drawn; best first, and of equals the first."""
    limit = _LOWEST if number >= len(scaled) else max(np.partition(scaled, -number)[-number], _LOWEST)
    found = np.flatnonzero(scaled >= limit)
    return found[np.argsort(-scaled[found], kind="stable")[:number]]


def _keep_typical(tokens: Tokens, weights: Weights, typical_p: float) -> tuple[Tokens, Weights]:
    """Locally typical sampling (arXiv 2202.00666, section 4): tokens whose surprise is nearest to what was expected.

    Kept are the fewest, nearest first, that have the probability typical_p together.
    """
    tokens, weights = tokens[weights > 0], weights[weights > 0]
    probabilities = weights / weights.sum()
    surprise = -np.log(probabilities)
    entropy = (probabilities * surprise).sum()
    order = np.argsort(np.abs(surprise - entropy), kind="stable")
    ends = probabilities[order].cumsum()
    num_kept = max(int(np.searchsorted(ends - probabilities[order], typical_p)), 1)
    return tokens[order[:num_kept]], weights[order[:num_kept]]


def _invert(weights: Weights, choice: float) -> int:
    """The first place at which the cumulative weight exceeds that share of the whole."""
    # First by whole runs: summing one weight after the other takes ten times as long.
    num_whole = len(weights) // _RUN * _RUN
    sums = weights[:num_whole].reshape(-1, _RUN).sum(axis=1)
    ends = np.append(sums, weights[num_whole:].sum()).cumsum(dtype=np.float64)
    target = choice * ends[-1]
    run = _find_end(ends, target)
    start = run * _RUN
    before = float(ends[run - 1]) if run else 0.0
    return start + _find_end(weights[start : start + _RUN].cumsum(dtype=np.float64), target - before)


def _find_end(ends: NDArray[np.float64], target: float) -> int:
    """The first that exceeds the target. Rounding may put a target on the very end; then the last that adds to it."""
    return int(min(np.searchsorted(ends, target, side="right"), np.searchsorted(ends, ends[-1])))
