"""Sampling: distributions by chi-square on fixed seeds, penalties by plain formulas, rows that mind only themselves."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from qserve.device.logprobs import logprobs_of
from qserve.device.sampler import Sampler, adjust, uniforms
from qserve.engine.request import Request, SamplingParams

VOCABULARY = 40
# The 0.999 quantiles of chi-square by degrees of freedom, from any table.
CHI_SQUARE_999 = {2: 13.82, 3: 16.27, 4: 18.47, 9: 27.88, 19: 43.82, 39: 72.05}


def _request(*, prompt: tuple[int, ...] = (1, 2, 3), output: tuple[int, ...] = (), **params: Any) -> Request:
    request = Request("r", list(prompt), SamplingParams(max_tokens=1000, **params))
    request.token_ids += output
    return request


def _logits(rows: int = 1, vocabulary: int = VOCABULARY) -> Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(5)) * 2


def _draw_many(logits: Tensor, num_draws: int = 4000, **params: Any) -> Tensor:
    """How often each token came, over as many seeds."""
    requests = [_request(seed=seed, **params) for seed in range(num_draws)]
    tokens = Sampler(seed=0).sample(logits.expand(num_draws, -1), requests)
    return torch.bincount(torch.tensor(tokens), minlength=logits.shape[-1])


def _allowed(
    logits: Tensor, *, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0, typical_p: float = 1.0
) -> Tensor:
    """The probabilities that should be drawn from, one token after the other."""
    probabilities = torch.softmax(logits[0].double(), dim=-1)
    order = probabilities.argsort(descending=True).tolist()
    kept = order[:top_k] if top_k else order
    total = sum(float(probabilities[token]) for token in kept)
    nucleus, mass = [], 0.0
    for token in kept:
        if mass < top_p * total:
            nucleus.append(token)
        mass += float(probabilities[token])
    limit = min_p * float(probabilities.max())
    mask = torch.zeros_like(probabilities)
    mask[[token for token in nucleus if probabilities[token] >= limit]] = 1
    left = probabilities * mask / (probabilities * mask).sum()
    return left if typical_p == 1 else _typical(left, typical_p)


def _typical(probabilities: Tensor, mass: float) -> Tensor:
    """Those whose surprise is nearest to the entropy, one by one until their probabilities reach the mass."""
    left = {token: p for token, p in enumerate(probabilities.tolist()) if p > 0}
    entropy = -sum(p * math.log(p) for p in left.values())
    order = sorted(left, key=lambda token: abs(-math.log(left[token]) - entropy))
    kept: list[int] = []
    while not kept or sum(left[token] for token in kept) < mass:
        kept.append(order[len(kept)])
    mask = torch.zeros_like(probabilities)
    mask[kept] = 1
    return probabilities * mask / (probabilities * mask).sum()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"top_k": 5},
        {"top_p": 0.7},
        {"min_p": 0.1},
        {"top_k": 10, "top_p": 0.8},
        {"top_k": 10, "top_p": 0.9, "min_p": 0.05},
        {"top_p": 1e-9},
        {"top_k": 1},
        {"top_k": 1000},
        {"typical_p": 0.5},
        {"typical_p": 0.95},
        {"typical_p": 1e-9},
        {"typical_p": 0.6, "top_k": 12},
        {"typical_p": 0.6, "top_p": 0.9, "min_p": 0.02},
    ],
)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_the_distribution(options: dict[str, Any], temperature: float) -> None:
    logits = _logits()
    counts = _draw_many(logits, temperature=temperature, **options)
    expected = _allowed(logits / temperature, **options) * counts.sum()
    assert counts[expected == 0].sum() == 0
    common = expected > 5
    statistic = ((counts - expected)[common].square() / expected[common]).sum()
    freedom = int(common.sum()) - 1
    limit = next(value for degrees, value in CHI_SQUARE_999.items() if degrees >= freedom)
    assert statistic < limit, (float(statistic), freedom)


def test_top_p_where_the_best_few_hundred_do_not_reach() -> None:
    """A flat distribution over more tokens than are tried first: everything must be sorted."""
    logits = torch.randn(1, 2000, generator=torch.Generator().manual_seed(1)) * 0.1
    counts = _draw_many(logits, num_draws=3000, temperature=1.0, top_p=0.5)
    allowed = _allowed(logits, top_p=0.5) > 0
    assert counts[~allowed].sum() == 0
    assert (counts[allowed] > 0).float().mean() > 0.9


def test_greedy_and_nearly_greedy() -> None:
    logits = _logits(6)
    best = logits.argmax(-1).tolist()
    assert Sampler().sample(logits, [_request(temperature=0.0)] * 6) == best
    assert Sampler().sample(logits, [_request(temperature=1e-30)] * 6) == best


@pytest.mark.parametrize(
    "options",
    [
        {"presence_penalty": 2.0},
        {"frequency_penalty": 2.0},
        {"repetition_penalty": 4.0},
        {"logit_bias": {8: -2.0}},
        {"allowed_token_ids": frozenset({3, 5})},
        {"bad_words": ((8,),)},
        {"min_tokens": 9, "stop_token_ids": frozenset({8})},
    ],
)
def test_greedy_takes_the_likeliest_only_where_nothing_else_counts(options: dict[str, Any]) -> None:
    logits = torch.zeros(1, VOCABULARY)
    logits[0, 8], logits[0, 5] = 1.0, 0.5
    assert Sampler().sample(logits, [_request(output=(8,), temperature=0.0)]) == [8]
    assert Sampler().sample(logits, [_request(output=(8,), temperature=0.0, **options)]) == [5]


def test_greedy_finds_nothing_where_nothing_is_a_number() -> None:
    assert Sampler().sample(torch.full((2, VOCABULARY), math.nan), [_request(temperature=0.0)] * 2) == [None, None]


def test_a_row_minds_only_itself() -> None:
    logits = _logits(9)
    requests = [
        _request(temperature=1.0, seed=1),
        _request(temperature=0.0),
        _request(temperature=0.7, seed=2, top_k=7),
        _request(temperature=1.3, seed=3, top_p=0.8),
        _request(temperature=1.0, seed=4, min_p=0.2),
        _request(temperature=0.9, seed=5, repetition_penalty=1.4),
        _request(temperature=0.9, seed=6, presence_penalty=1.0, output=(4, 4)),
        _request(temperature=1.1, seed=7, logit_bias={5: 4.0}),
        _request(temperature=1.2, seed=8, typical_p=0.5),
    ]
    together = Sampler(seed=1).sample(logits, requests)
    alone = [Sampler(seed=2).sample(logits[row : row + 1], [request])[0] for row, request in enumerate(requests)]
    backwards = Sampler(seed=3).sample(logits.flip(0), requests[::-1])[::-1]
    assert together == alone == backwards


@pytest.mark.parametrize("options", [{}, {"logit_bias": {3: 1.0}}, {"typical_p": 0.9}])
def test_a_top_k_beyond_all_numbers_leaves_all(options: dict[str, Any]) -> None:
    logits = _logits().expand(50, -1)
    most = [_request(seed=seed, top_k=10**400, **options) for seed in range(50)]
    assert Sampler().sample(logits, most) == Sampler().sample(logits, [_request(seed=s, **options) for s in range(50)])


def test_seeds() -> None:
    logits = _logits().expand(64, -1)
    with_seed = [_request(temperature=1.0, seed=9)] * 64
    assert len(set(Sampler().sample(logits, with_seed))) == 1
    positions = [_request(temperature=1.0, seed=9, output=(1,) * place) for place in range(64)]
    assert len(set(Sampler().sample(logits, positions))) > 4
    unseeded = [Request(str(place), [1], SamplingParams(max_tokens=1)) for place in range(64)]
    first, second = Sampler().sample(logits, unseeded), Sampler().sample(logits, unseeded)
    assert len(set(first)) > 4
    assert first != second


def test_uniform_numbers_fill_the_unit_interval() -> None:
    numbers = torch.tensor([uniforms("s", position) for position in range(1250)]).flatten()
    counts = torch.histc(numbers, bins=10, min=0, max=1)
    assert 0 <= float(numbers.min()) < float(numbers.max()) < 1
    assert ((counts - 1000).square() / 1000).sum() < CHI_SQUARE_999[9]


def test_penalties() -> None:
    logits = _logits()
    request = _request(
        prompt=(1, 2, 3),
        output=(3, 7, 7, 7),
        repetition_penalty=1.5,
        presence_penalty=0.4,
        frequency_penalty=0.3,
        logit_bias={2: 1.25, 39: -3.0},
    )
    expected = logits[0].clone()
    for token in (1, 2, 3, 7):
        expected[token] = expected[token] / 1.5 if expected[token] > 0 else expected[token] * 1.5
    expected[3] -= 0.4 + 0.3
    expected[7] -= 0.4 + 3 * 0.3
    expected[2] += 1.25
    expected[39] -= 3.0
    adjusted = logits[0].clone()
    adjust(adjusted.numpy(), request)
    torch.testing.assert_close(adjusted, expected)
    before = logits.clone()
    Sampler().sample(logits, [request])
    assert torch.equal(logits, before)


def test_stop_tokens_are_banned_until_there_are_enough() -> None:
    logits = torch.zeros(1, VOCABULARY)
    logits[0, 8] = 50.0
    params: dict[str, Any] = {"stop_token_ids": frozenset({8}), "min_tokens": 2, "temperature": 0.0}
    assert Sampler().sample(logits, [_request(output=(4,), **params)]) != [8]
    assert Sampler().sample(logits, [_request(output=(4, 4), **params)]) == [8]
    drawn = [_request(output=(4,), **{**params, "temperature": 1.0, "seed": seed}) for seed in range(50)]
    assert 8 not in Sampler().sample(logits.expand(50, -1), drawn)


def test_logprobs() -> None:
    logits = _logits(2)
    expected = torch.log_softmax(logits, dim=-1)
    order = logits.argsort(dim=-1, descending=True)
    found = logprobs_of(logits, [4, int(order[1, 0])], num_top=3)
    for row, chosen in ((0, 4), (1, int(order[1, 0]))):
        assert found[row][0].token_id == chosen
        assert found[row][0].rank == order[row].tolist().index(chosen) + 1
        assert [each.token_id for each in found[row][1:]] == order[row, :3].tolist()
        assert [each.rank for each in found[row][1:]] == [1, 2, 3]
        values = torch.tensor([each.logprob for each in found[row]])
        torch.testing.assert_close(values, expected[row, [each.token_id for each in found[row]]])
    assert [len(row) for row in logprobs_of(logits, [0, 1], num_top=0)] == [1, 1]


def test_logprobs_of_a_row_are_the_same_alone_and_among_others() -> None:
    """With a vocabulary so large that torch splits a single row between threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        logits = _logits(40, vocabulary=40_000)
        tokens = list(range(40))
        together = logprobs_of(logits, tokens, num_top=2)
        alone = [logprobs_of(logits[row : row + 1], tokens[row : row + 1], num_top=2)[0] for row in range(40)]
    finally:
        torch.set_num_threads(threads)
    assert together == alone
