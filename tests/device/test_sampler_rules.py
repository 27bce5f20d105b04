"""What is chosen under rules, against plain loops: what is forbidden goes first, then all else is as for free rows."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from qserve.device.draw import Floats
from qserve.device.sampler import NUM_TRIALS, Sampler, uniforms
from qserve.engine.request import Request, SamplingParams
from qserve.kernels.reference_sampling import sample as sample_plainly
from tests.kernels.native import VARIANTS, open_variant

_BORDER = 1e-5  # a share of the whole: nearer to a border than this, float32 and float64 may differ
CHI_SQUARE_999 = {4: 18.47, 9: 27.88, 19: 43.82, 39: 72.05}  # the 0.999 quantiles by degrees of freedom
CHOOSERS = ("plain", "native")


class Permitted:
    """A constraint that allows these tokens, and counts what it is asked."""

    is_finished = False

    def __init__(self, tokens: NDArray[np.int64], *, vocabulary: int) -> None:
        self._flags = np.zeros(vocabulary, dtype=bool)
        self._flags[tokens] = True
        self.num_asked = 0
        self.num_masks = 0

    def accept(self, token_id: int) -> None:
        raise AssertionError("the device only reads")

    def allowed(self) -> bytes:
        self.num_masks += 1
        return np.packbits(self._flags, bitorder="little").tobytes()

    def find_allowed(self, token_ids: Sequence[int]) -> int | None:
        self.num_asked += len(token_ids)
        return next((token_id for token_id in token_ids if self._flags[token_id]), None)

    def correct(self, guess: Sequence[int]) -> Sequence[int]:
        raise AssertionError("the device only reads")

    def supposing(self, token_ids: Sequence[int]) -> "Permitted":
        return self


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One row under rules."""

    logits: Floats
    permitted: NDArray[np.int64]
    params: SamplingParams

    def sample(self, chooser: str) -> int | None:
        constraint = Permitted(self.permitted, vocabulary=len(self.logits))
        request = Request("r", [1], self.params, constraint=constraint)
        choose = sample_plainly if chooser == "plain" else open_variant(VARIANTS[0]).sample
        return Sampler(choose=choose).sample(torch.from_numpy(self.logits)[None], [request])[0]


@st.composite
def rows(draw_: st.DrawFn) -> Floats:
    """Flat and steep, with equal values, with what cannot be drawn."""
    random = np.random.default_rng(draw_(st.integers(0, 2**32)))
    size = draw_(st.sampled_from([1, 2, 7, 40, 40, 300, 1500]))
    logits = random.standard_normal(size) * draw_(st.sampled_from([0.0, 0.001, 0.3, 1.0, 3.0, 12.0, 60.0]))
    if draw_(st.booleans()):
        logits = np.round(logits)
    logits[random.random(size) < draw_(st.sampled_from([0.0, 0.0, 0.3, 0.95]))] = -np.inf
    return logits.astype(np.float32)


@st.composite
def cases(draw_: st.DrawFn) -> Case:
    """The likeliest are permitted, or the least likely, or any, or most; of parameters often none cuts."""
    logits = draw_(rows())
    assume(logits.max() > -np.inf)
    random = np.random.default_rng(draw_(st.integers(0, 2**32)))
    number = min(draw_(st.sampled_from([0, 1, 3, 30, 10_000])), len(logits))
    order = np.argsort(-logits, kind="stable")
    kind = draw_(st.sampled_from(["best", "worst", "any", "most"]))
    chosen = {"best": order[:number], "worst": order[len(order) - number :], "any": random.permutation(order)[:number]}
    cuts: dict[str, Any] = {
        "top_p": draw_(st.sampled_from([1.0, 0.999999, 0.95, 0.9, 0.5, 0.1, 1e-6])),
        "top_k": draw_(st.sampled_from([0, 0, 0, 1, 5, 50, 2000])),
        "min_p": draw_(st.sampled_from([0.0, 0.0, 1e-6, 0.05, 0.5, 1.0])),
    }
    params = SamplingParams(
        max_tokens=1,
        temperature=draw_(st.sampled_from([0.0, 1.0, 0.5, 2.0, 1e-4, 1e-30])),
        seed=draw_(st.integers(0, 10_000)),
        **(cuts if draw_(st.booleans()) else {}),
    )
    permitted = np.sort(chosen.get(kind, random.permutation(order)[: -len(order) // 10 or None]))
    return Case(logits=logits, permitted=permitted, params=params)


class AtTheBorder(Exception):
    """So near that float32 and float64 may differ."""


def _weigh(logits: Floats, tokens: NDArray[np.int64], params: SamplingParams) -> dict[int, float]:
    values = logits[tokens].astype(np.float64)
    weights = np.exp((values - values.max()) / max(params.temperature, 1e-30))
    return dict(zip(tokens.tolist(), weights.tolist(), strict=True))


def _invert(weights: dict[int, float], choice: float) -> int:
    total, end = sum(weights.values()), 0.0
    for token, weight in sorted(weights.items()):
        end += weight
        if weight and abs(end - choice * total) < _BORDER * total:
            raise AtTheBorder
        if end > choice * total:
            return token
    raise AtTheBorder


def _cut(weights: dict[int, float], params: SamplingParams) -> dict[int, float]:
    """What top-k, top-p and min-p leave, one token after the other."""
    order = sorted(weights, key=lambda token: (-weights[token], token))
    order = order[: params.top_k] if params.top_k else order
    total, before = sum(weights[token] for token in order), 0.0
    left: dict[int, float] = {}
    for token in order:
        is_near_top_p = params.top_p < 1 and before and abs(before / total - params.top_p) < _BORDER
        is_near_min_p = params.min_p and weights[token] < 1 and abs(weights[token] / params.min_p - 1) < _BORDER
        if is_near_top_p or is_near_min_p:
            raise AtTheBorder
        if not left or ((params.top_p == 1 or before < params.top_p * total) and weights[token] >= params.min_p):
            left[token] = weights[token]
        before += weights[token]
    return left


def _choose_plainly(case: Case) -> int | None:
    """In float64. Where nothing cuts, seven are drawn from all, and then one from what is permitted."""
    params, permitted = case.params, case.permitted[case.logits[case.permitted] > -np.inf]
    if not len(permitted):
        return None
    if params.temperature == 0:
        tokens: list[int] = permitted.tolist()
        return max(tokens, key=lambda token: (case.logits[token], -token))
    choices = uniforms(str(params.seed), 1)
    left = _weigh(case.logits, permitted, params)
    if params.top_k or params.top_p < 1 or params.min_p:
        return _invert(_cut(left, params), choices[0])
    everything = _weigh(case.logits, np.arange(len(case.logits)), params)
    for choice in choices[:NUM_TRIALS]:
        token = _invert(everything, choice)
        if token in left:
            return token
    return _invert(left, choices[NUM_TRIALS])


@pytest.mark.parametrize("chooser", CHOOSERS)
@settings(max_examples=400, deadline=None)
@given(case=cases())
def test_what_is_chosen_is_what_plain_loops_choose(chooser: str, case: Case) -> None:
    try:
        expected = _choose_plainly(case)
    except AtTheBorder:
        assume(False)
    assert case.sample(chooser) == expected


PARAMS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.6},
    {"top_p": 0.7},
    {"top_k": 8, "top_p": 0.8},
    {"top_p": 0.9, "min_p": 0.05},
    {"logit_bias": {2: 1.0}},
]


@pytest.mark.parametrize("options", PARAMS)
@pytest.mark.parametrize("permitted", [range(0, 40, 2), range(30), range(36, 40)])
def test_the_distribution(options: dict[str, Any], permitted: range) -> None:
    """Of draws with many seeds, against the distribution that masks first."""
    logits = (np.random.default_rng(5).standard_normal(40) * 1.5).astype(np.float32)
    tokens = np.array(permitted)
    params = [SamplingParams(max_tokens=1, seed=seed, **options) for seed in range(4000)]
    requests = [Request("r", [1], each, constraint=Permitted(tokens, vocabulary=40)) for each in params]
    drawn = Sampler().sample(torch.from_numpy(logits).expand(len(requests), -1), requests)
    counts = np.bincount(np.array(drawn), minlength=40)
    biased = logits.copy()
    biased[2] += options.get("logit_bias", {}).get(2, 0)
    left = _cut(_weigh(biased, tokens, params[0]), params[0])
    expected = np.zeros(40)
    expected[[*left]] = np.array([*left.values()]) / sum(left.values()) * len(requests)
    assert counts[expected == 0].sum() == 0
    common = expected > 5
    limit = next(value for degrees, value in CHI_SQUARE_999.items() if degrees >= common.sum() - 1)
    assert ((counts - expected)[common] ** 2 / expected[common]).sum() < limit


@pytest.mark.parametrize(("temperature", "most"), [(0.0, 0.3), (1.0, 0.02)])
def test_a_grammar_that_permits_most_is_seldom_asked_for_all(temperature: float, most: float) -> None:
    random = np.random.default_rng(2)
    logits = (random.standard_normal((200, 2000)) * 3).astype(np.float32)
    constraints = [Permitted(np.flatnonzero(random.random(2000) < 0.8), vocabulary=2000) for _ in range(200)]
    requests = [
        Request("r", [1], SamplingParams(max_tokens=1, temperature=temperature, seed=seed), constraint=constraint)
        for seed, constraint in enumerate(constraints)
    ]
    Sampler().sample(torch.from_numpy(logits), requests)
    assert sum(constraint.num_masks for constraint in constraints) < most * len(constraints)
    assert sum(constraint.num_asked for constraint in constraints) <= 200 * NUM_TRIALS


def test_what_cannot_be_drawn_is_not_the_likeliest() -> None:
    for likeliest in range(3):
        logits = np.full(3, -np.inf, dtype=np.float32)
        logits[likeliest] = 1.0
        for temperature in (0.0, 1.0):
            params = SamplingParams(max_tokens=1, temperature=temperature)
            others = np.delete(np.arange(3), likeliest)
            assert Case(logits=logits, permitted=others, params=params).sample("plain") is None
