"""Trials against the plain order: rules, temperature, top-k, top-p, min-p, then the cumulative distribution."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from qserve.device.draw import Floats, Left, Tokens, Weights, draw
from qserve.device.sampler import uniform
from qserve.device.trials import Drawn, Greedy
from qserve.engine.request import SamplingParams

_BORDER = 1e-5  # a share of the whole: nearer to a border than this, float32 and float64 may differ
CHI_SQUARE_999 = {4: 18.47, 9: 27.88, 19: 43.82, 39: 72.05}  # the 0.999 quantiles by degrees of freedom


class Permitted:
    """Rules that permit these tokens, and count what they are asked."""

    def __init__(self, tokens: Tokens) -> None:
        self._tokens = set(tokens.tolist())
        self.num_asked = 0

    def permit(self, token_ids: Sequence[int]) -> list[bool]:
        self.num_asked += len(token_ids)
        return [token_id in self._tokens for token_id in token_ids]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One row under rules."""

    logits: Floats
    permitted: Tokens
    params: SamplingParams
    choices: tuple[float, ...]

    @property
    def drawn(self) -> Drawn:
        return Drawn(self.logits, self.params, self.choices.__getitem__)


@st.composite
def rows(draw_: st.DrawFn) -> Floats:
    """Flat and steep, with equal values, with what cannot be drawn; small, and so large that not all is sorted."""
    random = np.random.default_rng(draw_(st.integers(0, 2**32)))
    size = draw_(st.sampled_from([1, 2, 7, 40, 40, 300, 1500, 6000]))
    logits = random.standard_normal(size) * draw_(st.sampled_from([0.0, 0.001, 0.3, 1.0, 3.0, 12.0, 60.0]))
    if draw_(st.booleans()):
        logits = np.round(logits)
    logits[random.random(size) < draw_(st.sampled_from([0.0, 0.0, 0.3, 0.95]))] = -np.inf
    return logits.astype(np.float32)


@st.composite
def cases(draw_: st.DrawFn) -> Case:
    logits = draw_(rows())
    assume(logits.max() > -np.inf)
    random = np.random.default_rng(draw_(st.integers(0, 2**32)))
    number = min(draw_(st.sampled_from([0, 1, 3, 30, 10_000])), len(logits))
    order = np.argsort(-logits, kind="stable")
    kind = draw_(st.sampled_from(["best", "worst", "any", "most"]))
    chosen = {"best": order[:number], "worst": order[len(order) - number :], "any": random.permutation(order)[:number]}
    permitted = np.sort(chosen.get(kind, random.permutation(order)[: -len(order) // 10 or None]))
    params = SamplingParams(
        max_tokens=1,
        temperature=draw_(st.sampled_from([1.0, 0.5, 2.0, 1e-4, 1e-30])),
        top_p=draw_(st.sampled_from([1.0, 0.999999, 0.99, 0.95, 0.9, 0.5, 0.1, 1e-6])),
        top_k=draw_(st.sampled_from([0, 0, 0, 1, 5, 50, 2000])),
        min_p=draw_(st.sampled_from([0.0, 0.0, 1e-6, 0.05, 0.5, 1.0])),
        typical_p=draw_(st.sampled_from([1.0, 1.0, 1.0, 0.9, 0.3])),
    )
    choice = st.floats(0, 1, exclude_max=True)
    return Case(logits=logits, permitted=permitted, params=params, choices=draw_(st.tuples(*[choice] * 5)))


@settings(max_examples=400, deadline=None)
@given(case=cases())
def test_what_some_questions_settle_is_what_is_chosen_from_all_that_is_permitted(case: Case) -> None:
    settled = case.drawn.settle(Permitted(case.permitted))
    chosen = case.drawn.choose(case.permitted)
    assert settled in (None, chosen)
    trial = case.drawn  # and it does not matter whether one was asked before the other
    trial.settle(Permitted(case.permitted))
    assert trial.choose(case.permitted) == chosen
    can_be_drawn = case.logits[case.permitted] > -np.inf
    assert (chosen is None) == (not can_be_drawn.any())
    assert chosen is None or (chosen in case.permitted and case.logits[chosen] > -np.inf)


def test_nothing_is_settled_that_what_was_not_asked_about_could_change() -> None:
    """The worst that rules can do: permit all that is likelier than the token drawn, and little that is less likely."""
    num_settled = 0
    for seed in range(3000):
        random = np.random.default_rng(seed)
        logits = (random.standard_normal(60) * random.choice([0.1, 1, 2])).astype(np.float32)
        params = SamplingParams(
            max_tokens=1,
            top_p=random.uniform(0.5, 0.99),
            top_k=int(random.choice([0, 20, 40])),
            min_p=random.choice([0, 0.1]),
        )
        choices = random.random(5)
        order = np.argsort(-logits, kind="stable")
        place = order.tolist().index(Weights.of(logits, temperature=1).invert(choices[0]))
        permitted = np.sort(order[: place + 1 + random.integers(20)])
        trial = Drawn(logits, params, choices.__getitem__)
        settled = trial.settle(Permitted(permitted))
        assert settled in (None, trial.choose(permitted)), seed
        num_settled += settled is not None
    assert num_settled > 1000


class AtTheBorder(Exception):
    """So near that float32 and float64 may differ."""


def _weigh(logits: Floats, tokens: Tokens, params: SamplingParams) -> dict[int, float]:
    values = logits[tokens].astype(np.float64)
    weights = np.exp((values - values.max()) / max(params.temperature, 1e-30))
    return dict(zip(tokens.tolist(), weights.tolist(), strict=True))


def _invert(weights: dict[int, float], choice: float) -> int:
    total, end = sum(weights.values()), 0.0
    target = choice * total
    for token, weight in weights.items():
        end += weight
        if abs(end - target) < _BORDER * total:
            raise AtTheBorder
        if end > target:
            return token
    raise AtTheBorder


def _leave(weights: dict[int, float], params: SamplingParams) -> dict[int, float]:
    """What top-k, top-p and min-p leave, in the order in which it is drawn from; one token after the other."""
    is_sorted = params.top_p < 1 or 0 < params.top_k < len(weights)
    order = sorted(weights, key=lambda token: (-weights[token], token)) if is_sorted else [*weights]
    left = order[: params.top_k] if 0 < params.top_k < len(weights) else order
    mass, before = params.top_p * sum(weights[token] for token in left), 0.0
    kept: list[int] = []
    for token in left:
        if is_sorted and params.top_p < 1 and before and abs(before - mass) < _BORDER * mass / params.top_p:
            raise AtTheBorder
        if before < mass or params.top_p == 1 or not kept:
            kept.append(token)
        before += weights[token]
    limit = params.min_p * max(weights.values())
    if any(limit and 0.999 < weights[token] / limit < 1.001 for token in kept if weights[token] < 1):
        raise AtTheBorder
    return {token: weights[token] for token in kept if weights[token] >= limit}


def _choose_plainly(case: Case) -> int:
    """As trials.py has it in words, in float64: four draws from all, and then one from what is left."""
    everything = _weigh(case.logits, np.arange(len(case.logits)), case.params)
    left = _leave(_weigh(case.logits, case.permitted, case.params), case.params)
    for choice in case.choices[:4]:
        token = _invert(everything, choice)
        if token in left:
            return token
    return _invert(left, case.choices[4])


@settings(max_examples=400, deadline=None)
@given(case=cases())
def test_what_is_chosen_is_what_plain_loops_choose(case: Case) -> None:
    assume(case.params.typical_p == 1 and (case.logits[case.permitted] > -np.inf).any())
    try:
        expected = _choose_plainly(case)
    except AtTheBorder:
        assume(False)
    assert case.drawn.choose(case.permitted) == expected


@settings(max_examples=300, deadline=None)
@given(case=cases())
def test_free_rows_are_drawn_as_plain_loops_draw_them(case: Case) -> None:
    assume(case.params.typical_p == 1)
    try:
        left = _leave(_weigh(case.logits, np.arange(len(case.logits)), case.params), case.params)
        expected = _invert(left, case.choices[0])
    except AtTheBorder:
        assume(False)
    assert draw(case.logits, case.params, case.choices[0]) == expected


@settings(max_examples=200, deadline=None)
@given(case=cases())
def test_what_can_be_drawn_is_told_as_it_is_drawn(case: Case) -> None:
    """`has` against the tokens that many choices draw; the sums behind it against the order behind `draw`."""
    weights = Weights.of(case.logits, temperature=case.params.temperature)
    left = Left(weights, case.params)
    assert all(left.has(left.draw(choice)) for choice in case.choices)
    has = np.array([left.has(token) for token in range(min(len(case.logits), 300))])
    sorted_ = Left(weights, case.params)
    assert not has[weights.each[: len(has)] == 0].any()
    if len(case.logits) <= 300 and case.params.top_p < 0.99:
        drawn = {sorted_.draw(choice) for choice in np.linspace(0, 1, 500, endpoint=False)}
        assert drawn <= set(np.flatnonzero(has).tolist())


@settings(max_examples=200, deadline=None)
@given(case=cases())
def test_the_likeliest_is_the_likeliest_of_what_is_permitted(case: Case) -> None:
    expected = max(case.permitted.tolist(), key=lambda token: (case.logits[token], -token), default=None)
    if expected is not None and np.isneginf(case.logits[expected]):
        expected = None
    assert Greedy(case.logits).choose(case.permitted) == expected
    settled = Greedy(case.logits).settle(Permitted(case.permitted))
    assert settled in (None, expected)


def _uniform(seed: str, number: int) -> float:
    return uniform(seed, 1, number=number)


def test_what_cannot_be_drawn_is_not_the_likeliest() -> None:
    logits = np.array([1.0, -np.inf, -np.inf], dtype=np.float32)
    assert Greedy(logits).settle(Permitted(np.array([1, 2]))) is None
    assert Greedy(logits).choose(np.array([1, 2])) is None


PARAMS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.6},
    {"top_p": 0.9},
    {"top_p": 0.6},
    {"top_k": 6},
    {"top_k": 8, "top_p": 0.8},
    {"min_p": 0.1},
    {"top_p": 0.9, "min_p": 0.05},
    {"typical_p": 0.7},
]


@pytest.mark.parametrize("options", PARAMS)
@pytest.mark.parametrize("permitted", [range(0, 40, 2), range(30), range(36, 40)])
def test_the_distribution(options: dict[str, Any], permitted: range) -> None:
    """Of draws with many seeds, against the distribution that masks first; whichever way they were settled."""
    logits = (np.random.default_rng(5).standard_normal(40) * 1.5).astype(np.float32)
    tokens = np.array(permitted)
    params = SamplingParams(max_tokens=1, **options)
    masked = np.full_like(logits, -np.inf)
    masked[tokens] = logits[tokens]
    probabilities = _probabilities(masked, params)
    counts = np.zeros(40)
    for seed in range(4000):
        trial = Drawn(logits, params, partial(_uniform, str(seed)))
        token = trial.settle(Permitted(tokens))
        counts[trial.choose(tokens) if token is None else token] += 1
    assert counts[probabilities == 0].sum() == 0
    expected = probabilities * counts.sum()
    common = expected > 5
    freedom = int(common.sum()) - 1
    limit = next(value for degrees, value in CHI_SQUARE_999.items() if degrees >= freedom)
    assert ((counts - expected)[common] ** 2 / expected[common]).sum() < limit


def _probabilities(logits: Floats, params: SamplingParams) -> NDArray[np.float64]:
    """What many draws of the free row give: draws are tested on their own."""
    left = Left(Weights.of(logits, temperature=params.temperature), params)
    weights = np.exp(logits.astype(np.float64) / params.temperature)
    weights[[token for token in range(len(logits)) if not left.has(token)]] = 0
    probabilities: NDArray[np.float64] = weights / weights.sum()
    return probabilities


@pytest.mark.parametrize("options", [{}, {"temperature": 0.6}, {"top_p": 0.95}, {"top_k": 400}, {"min_p": 1e-3}])
def test_few_questions_settle_a_steep_row_of_which_most_is_permitted(options: dict[str, Any]) -> None:
    random = np.random.default_rng(2)
    logits = (random.standard_normal(20_000) * 3).astype(np.float32)
    tokens = np.flatnonzero(random.random(20_000) < 0.95)
    params = SamplingParams(max_tokens=1, **options)
    rules, num_settled = Permitted(tokens), 0
    for seed in range(200):
        num_settled += Drawn(logits, params, partial(_uniform, str(seed))).settle(rules) is not None
    assert num_settled > (140 if options else 190)
    assert rules.num_asked < 200 * 60
