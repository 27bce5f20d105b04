"""A token from what a row's rules permit, mostly without finding out all that they permit.

A grammar tells in 1 µs whether one token may come next, and in up to 1 ms which tokens may. So a token is chosen as if
there were no rules, and they are asked about it; only after a few that they forbid all that is permitted is found out.

The likeliest: forbidden ones are passed over, best first. Drawn: by rejection. A token drawn from all is, where it is
one of those that rules and parameters leave, a draw from just those; where it is not, another is drawn with another
number; in the end one is drawn from what is left, which is the same distribution, so that how often was tried does not
matter. Each number is the request's own, so a row's token depends on nothing else, as everywhere.

Top-p is of what the rules permit, so what it leaves depends on all of that. Often some tokens settle it. In order of
weight, t the token that was drawn:

    |------------ before ------------|-- t --|-- known --|------- others -------|

Top-p leaves t where the permitted of those before it weigh less than top_p of all that are permitted. It surely does if
    before < top_p * (before + t + known)
whatever is permitted of `before` and of the others, where `known` are tokens that the rules permit, as they were asked.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Protocol

import numpy as np

from qserve.device.draw import Floats, Left, Tokens, Weights
from qserve.engine.request import SamplingParams

_NUM_TRIALS = 4
_MOST_WITNESSES = 256
_NUM_SORTED = 1024  # of the best, among which a token's place and its witnesses are looked for
_FAINTEST = 1e-20  # less than this share of the likeliest is weighed anew, among its like
_MARGIN = 1e-4  # far more than rounding and the order of additions can change, of any weight
_MARGIN_OF_ALL = 1e-5


class Permission(Protocol):
    """Rules, as masks.py has them."""

    def permit(self, token_ids: Sequence[int]) -> list[bool]: ...


class Greedy:
    """The likeliest token."""

    def __init__(self, logits: Floats) -> None:
        self._logits = logits

    def settle(self, rules: Permission) -> int | None:
        """The likeliest that is permitted, if it is among the likeliest of all."""
        left = self._logits.copy()
        for _ in range(_NUM_TRIALS):
            best = int(left.argmax())
            if np.isneginf(left[best]):
                break
            if rules.permit([best])[0]:
                return best
            left[best] = -np.inf
        return None

    def choose(self, permitted: Tokens) -> int | None:
        """The likeliest of the permitted tokens, which are given in order; None if none can be chosen."""
        values = self._logits[permitted]
        return int(permitted[values.argmax()]) if _can_choose(values) else None


class Drawn:
    """A token drawn with numbers in [0, 1): `choices` gives the first for 0, and others for others."""

    def __init__(self, logits: Floats, params: SamplingParams, choices: Callable[[int], float]) -> None:
        self._logits = logits
        self._params = params
        self._choices = choices
        self._weights = Weights.of(logits, temperature=params.temperature)
        self._proposed: list[int] = []

    def settle(self, rules: Permission) -> int | None:
        """What `choose` says of all that is permitted, if some questions settle it."""
        for token in self._propose():
            if rules.permit([token])[0]:
                return token if self._is_surely_left(token, rules) else None
        return None

    def choose(self, permitted: Tokens) -> int | None:
        """One of what the parameters leave of the permitted tokens, given in order; None if none can be chosen."""
        weights = self._weigh(permitted)
        if weights is None:
            return None
        left = Left(weights, self._params)
        for token in self._propose():
            place = int(permitted.searchsorted(token))
            if place < len(permitted) and permitted[place] == token and left.has(place):
                return token
        return int(permitted[left.draw(self._choices(_NUM_TRIALS))])

    def _propose(self) -> Iterator[int]:
        for number in range(_NUM_TRIALS):
            if number == len(self._proposed):
                self._proposed.append(self._weights.invert(self._choices(number)))
            yield self._proposed[number]

    def _weigh(self, tokens: Tokens) -> Weights | None:
        weights = Weights(self._weights.each[tokens])
        if weights.total > _FAINTEST:
            return weights
        values = self._logits[tokens]
        return Weights.of(values, temperature=self._params.temperature) if _can_choose(values) else None

    @cached_property
    def _best(self) -> Floats:
        return self._weights.find_best(_NUM_SORTED)

    def _is_surely_left(self, token: int, rules: Permission) -> bool:
        """Whether the parameters leave this permitted token, whatever else is permitted. False may mean unknown."""
        params, own = self._params, float(self._weights.each[token])
        most = params.top_k if 0 < params.top_k < len(self._logits) else len(self._logits)
        if params.typical_p < 1 or own < params.min_p * (1 + _MARGIN):
            return False
        if most == len(self._logits) and self._find_missing(own, self._weights.total - own) <= 0:
            return True
        num_before = int((-self._best).searchsorted(-own * (1 - _MARGIN), side="right"))  # and the token itself
        if num_before == len(self._best) or num_before > most:
            return False
        missing = self._find_missing(own, float(self._best[:num_before].sum()) - own)
        return missing <= 0 or self._has_witnesses(rules, num_before, most=most - num_before, missing=missing)

    def _find_missing(self, own: float, before: float) -> float:
        """What must be known to be permitted of those behind a token, where `before` is the most before it."""
        if self._params.top_p == 1:
            return 0
        share = self._params.top_p
        return (before * (1 - share) + _MARGIN_OF_ALL * self._weights.total) / share - own

    def _has_witnesses(self, rules: Permission, start: int, *, most: int, missing: float) -> bool:
        """Whether of the tokens from that place on, by weight, enough are permitted."""
        behind = self._best[start : start + min(most, _MOST_WITNESSES) + 1]
        ends = behind[:-1].cumsum()
        if not len(ends) or ends[-1] < missing:
            return False
        # Half as many again as would do if all of them were permitted.
        num_asked = min(3 * int(ends.searchsorted(missing)) // 2 + 2, len(ends))
        each = self._weights.each
        asked = np.flatnonzero((each > behind[num_asked]) & (each <= behind[0]))
        return float(each[asked][rules.permit(asked.tolist())].sum()) >= missing


def _can_choose(logits: Floats) -> bool:
    return bool(len(logits)) and not np.isneginf(logits.max())
