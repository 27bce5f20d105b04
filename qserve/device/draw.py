"""One token drawn from one row of logits: temperature, top-k, top-p, min-p and typical-p.

By numpy and a row at a time, on one thread: 32 rows of 49,152 take 2.7 ms, and torch takes 16 for them on two threads
that wait for each other; and a row's token can depend on nothing but the row. Knows no requests.
"""

from functools import cached_property
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray

from qserve.engine.request import SamplingParams
from qserve.kernels.ops import LEAST_TEMPERATURE

Floats = NDArray[np.float32]
Tokens = NDArray[np.int64]
Ends = NDArray[np.float64]
Side = Literal["left", "right"]

_NUM_SORTED = 4096  # of the best, before all of the vocabulary is sorted for top-p: 60 µs instead of 110
_RUN = 256  # weights that are summed at once
_LOWEST = np.finfo(np.float32).min  # below it there is only minus infinity: what cannot be drawn


class Weights:
    """A row's probabilities, but for their sum."""

    def __init__(self, each: Floats) -> None:
        self.each = each
        self._ends = sum_runs(each)

    @classmethod
    def of(cls, logits: Floats, *, temperature: float) -> Self:
        """Those under a temperature; the likeliest token's is 1."""
        # The largest becomes zero first, so that a tiny temperature makes the others -inf and nothing NaN.
        scaled: Floats = logits - logits.max()
        with np.errstate(over="ignore"):
            scaled /= np.float32(max(temperature, LEAST_TEMPERATURE))
        np.exp(scaled, out=scaled)
        return cls(scaled)

    @property
    def total(self) -> float:
        return float(self._ends[-1])

    def invert(self, choice: float) -> int:
        """The token at which the cumulative weight, by token id, exceeds that share of the whole."""
        return find(self.each, self._ends, choice * self.total)

    def find_best(self, number: int) -> Floats:
        """The weights of the best so many, best first."""
        # Where most weigh nothing numpy sorts all of 49,152 in 30 µs and takes 750 to find the best; else 110 and 40.
        is_sparse = 2 * np.count_nonzero(self.each > 0) < len(self.each)
        best = self.each if is_sparse or number >= len(self.each) else np.partition(self.each, -number)[-number:]
        return np.sort(best)[::-1][:number]


class Left:
    """What the parameters leave of a row, and in which order it is drawn from.

    By token id where temperature and min-p are all; else best first or, under typical-p, nearest to what was expected.
    Then only weights are put in order, for finding the order of tokens takes ten times as long; of tokens of one weight
    the first are meant.
    """

    def __init__(self, weights: Weights, params: SamplingParams) -> None:
        self._weights = weights
        self._params = params
        self._is_cut = 0 < params.top_k < len(weights.each)

    def draw(self, choice: float) -> int:
        each, kept = self._weights.each, self._kept
        if kept is each:
            return self._weights.invert(choice)
        ends = sum_runs(kept)
        place = find(kept, ends, choice * float(ends[-1]))
        return int(np.flatnonzero(each == kept[place])[np.count_nonzero(kept[:place] == kept[place])])

    def has(self, token: int) -> bool:
        """Whether it can be drawn. Without top-k and typical-p that takes a few sums; nothing must be put in order."""
        each, params = self._weights.each, self._params
        own = each[token]
        if own == 0 or self._is_cut or params.typical_p < 1:
            return bool(own) and bool(np.count_nonzero(each[:token] == own) < np.count_nonzero(self._kept == own))
        if params.min_p and own < params.min_p * each.max():
            return False
        return params.top_p == 1 or self._weigh_before(token) < params.top_p * self._weights.total

    def _weigh_before(self, token: int) -> float:
        each = self._weights.each
        num_equal = np.count_nonzero(each[:token] == each[token])
        return float(np.where(each > each[token], each, 0).sum()) + num_equal * float(each[token])

    @cached_property
    def _kept(self) -> Floats:
        params, kept = self._params, self._weights.each
        if self._is_cut or params.top_p < 1:
            kept = _keep_likely(self._weights, params, is_cut=self._is_cut)
        if params.min_p:
            kept = kept[kept >= params.min_p * kept.max()]
        return _keep_typical(kept, params.typical_p) if params.typical_p < 1 else kept


def draw(logits: Floats, params: SamplingParams, choice: float) -> int:
    """`choice`, in [0, 1), is put through the cumulative distribution of what the parameters leave."""
    return Left(Weights.of(logits, temperature=params.temperature), params).draw(choice)


def _keep_likely(weights: Weights, params: SamplingParams, *, is_cut: bool) -> Floats:
    """The weights that top-k leaves, and top-p of those, which are the fewest that have its share; best first."""
    best = weights.find_best(params.top_k if is_cut else _NUM_SORTED)
    if params.top_p == 1:
        return best
    ends = sum_runs(best)
    # Where top-k cuts, top-p is a share of what it leaves; elsewhere of everything, even if not all of it is sorted.
    mass = params.top_p * (float(ends[-1]) if is_cut else weights.total)
    if not is_cut and ends[-1] < mass:
        best = weights.find_best(len(weights.each))
        ends = sum_runs(best)
    return best[: find(best, ends, mass, side="left") + 1]


def _keep_typical(weights: Floats, typical_p: float) -> Floats:
    """Locally typical sampling (arXiv 2202.00666, section 4): tokens whose surprise is nearest to what was expected.

    Kept are the fewest, nearest first, that have the probability typical_p together.
    """
    weights = weights[weights > 0]
    probabilities = weights / weights.sum(dtype=np.float64)
    surprise = -np.log(probabilities)
    entropy = (probabilities * surprise).sum()
    order = np.argsort(np.abs(surprise - entropy), kind="stable")
    ends = probabilities[order].cumsum()
    num_kept = max(int(np.searchsorted(ends - probabilities[order], typical_p)), 1)
    return weights[order[:num_kept]]


def find_best(scaled: Floats, number: int) -> Tokens:
    """The best so many, or fewer where no more can be drawn; best first, and of equals the first."""
    limit = _LOWEST if number >= len(scaled) else max(np.partition(scaled, -number)[-number], _LOWEST)
    found = np.flatnonzero(scaled >= limit)
    return found[np.argsort(-scaled[found], kind="stable")[:number]]


def sum_runs(weights: Floats) -> Ends:
    """The cumulative weight at the end of each run, the last of which may be shorter.

    Summing one weight after the other takes ten times as long.
    """
    num_whole = len(weights) // _RUN * _RUN
    sums = weights[:num_whole].reshape(-1, _RUN).sum(axis=1)
    return np.append(sums, weights[num_whole:].sum()).cumsum(dtype=np.float64)


def find(weights: Floats, ends: Ends, target: float, *, side: Side = "right") -> int:
    """The first place at which the cumulative weight exceeds the target, or (left) reaches it; `ends` are its runs'."""
    run = _find_end(ends, target, side=side)
    start = run * _RUN
    before = float(ends[run - 1]) if run else 0.0
    return start + _find_end(weights[start : start + _RUN].cumsum(dtype=np.float64), target - before, side=side)


def _find_end(ends: Ends, target: float, *, side: Side) -> int:
    """The first of the ends. Rounding may put a target on the very last or behind it; then the last that adds to it."""
    return int(min(ends.searchsorted(target, side=side), ends.searchsorted(ends[-1])))
