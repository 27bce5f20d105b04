"""What a row may choose, token by token and all at once; and rows that mind only themselves."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from qserve.device.masks import Rules, forbid, has_rules
from qserve.device.runner import ModelRunner
from qserve.device.sampler import Sampler
from qserve.engine.request import Chunk, Request, SamplingParams
from tests import tiny
from tests.device import driving

VOCABULARY = 43  # not a multiple of eight


class Bits:
    """A constraint that allows these tokens, always."""

    is_finished = False

    def __init__(self, *token_ids: int, size: int = VOCABULARY) -> None:
        self._bits = sum(1 << token_id for token_id in token_ids).to_bytes((size + 7) // 8, "little")

    def accept(self, token_id: int) -> None:
        raise AssertionError("the device only reads")

    def allowed(self) -> bytes:
        return self._bits

    def find_allowed(self, token_ids: Sequence[int]) -> int | None:
        return next((each for each in token_ids if self._bits[each // 8] >> each % 8 & 1), None)

    def correct(self, guess: Sequence[int]) -> Sequence[int]:
        raise AssertionError("the device only reads")

    def supposing(self, token_ids: Sequence[int]) -> "Bits":
        return self


def _request(*, output: tuple[int, ...] = (), constraint: Bits | None = None, **params: Any) -> Request:
    request = Request("r", [1, 2, 3], SamplingParams(max_tokens=1000, **params), constraint=constraint)
    request.token_ids += output
    return request


def _logits(rows: int) -> Tensor:
    return torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(3)) * 2


ALL = set(range(VOCABULARY))
CASES: list[tuple[Request, set[int]]] = [
    (_request(), set()),
    (_request(constraint=Bits(0, 7, 8, 42)), ALL - {0, 7, 8, 42}),
    (_request(allowed_token_ids=frozenset({5, 42})), ALL - {5, 42}),
    (_request(constraint=Bits(5, 6), allowed_token_ids=frozenset({6, 9})), ALL - {6}),
    (_request(bad_words=((9,), (4, 5))), {9}),
    (_request(bad_words=((9,), (4, 5)), output=(1, 4)), {9, 5}),
    (_request(bad_words=((3, 5),)), set()),  # its beginning stands in the prompt, which was not generated
    (_request(bad_words=((4, 4, 4),), output=(4,)), set()),
    (_request(bad_words=((4, 4, 4),), output=(4, 4)), {4}),
    (_request(min_tokens=2, stop_token_ids=frozenset({8, 60}), output=(1,)), {8}),
    (_request(min_tokens=2, stop_token_ids=frozenset({8}), output=(1, 1)), set()),
    (_request(constraint=Bits(8, 9), min_tokens=2, stop_token_ids=frozenset({8})), ALL - {9}),
    (_request(constraint=Bits()), ALL),
]


@pytest.mark.parametrize(("request_", "forbidden"), CASES)
def test_each_rule(request_: Request, forbidden: set[int]) -> None:
    rules = Rules(request_)
    before = _logits(1)[0].numpy()
    after = forbid(before, rules.permitted(VOCABULARY))
    assert set(np.flatnonzero(np.isneginf(after)).tolist()) == forbidden
    kept = sorted(ALL - forbidden)
    assert np.array_equal(after[kept], before[kept])
    assert {token_id for token_id in ALL if rules.find_permitted([token_id]) is None} == forbidden
    assert rules.find_permitted([*ALL]) == next(iter(kept), None)
    assert has_rules(request_) or not forbidden


@pytest.mark.parametrize("is_weighed", [False, True])
def test_the_likeliest_of_what_is_allowed_is_chosen(is_weighed: bool) -> None:
    """Whether the likeliest of all is allowed, and then nothing is masked, or not."""
    params: dict[str, Any] = {"temperature": 0.0, "logit_bias": {0: 1e-9} if is_weighed else {}}
    for row in _logits(200).unbind():
        order = row.argsort(descending=True).tolist()
        for held in (order[:9], order[1:9], order[-2:]):
            assert Sampler().sample(row[None], [_request(constraint=Bits(*held), **params)]) == [held[0]]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("options", [{}, {"top_p": 0.5}, {"typical_p": 0.4}, {"top_k": 3}, {"min_p": 0.3}])
def test_what_is_chosen_is_allowed_and_depends_on_no_other_row(temperature: float, options: dict[str, Any]) -> None:
    requests = []
    for seed in range(3):
        for request, _ in CASES:
            params = {name: getattr(request.params, name) for name in SamplingParams.__slots__}
            params |= {"temperature": temperature, "seed": seed, **options}
            again = Request("r", [1, 2, 3], SamplingParams(**params), constraint=request.constraint)
            again.token_ids[3:] = request.token_ids[3:]
            requests.append(again)
    logits = _logits(len(requests))
    together = Sampler(seed=1).sample(logits, requests)
    alone = [Sampler(seed=1).sample(logits[row : row + 1], [request])[0] for row, request in enumerate(requests)]
    assert together == alone
    for token_id, (_, forbidden) in zip(together, CASES * 3, strict=True):
        assert (token_id is None) == (forbidden == ALL)
        assert token_id not in forbidden


@pytest.mark.parametrize("options", [{}, {"top_p": 0.5}, {"top_k": 3}, {"min_p": 0.3}, {"typical_p": 0.4}])
def test_rules_that_forbid_nothing_change_nothing(options: dict[str, Any]) -> None:
    logits = _logits(1).expand(200, -1)
    free = [_request(seed=seed, **options) for seed in range(200)]
    bound = [_request(seed=seed, constraint=Bits(*ALL), **options) for seed in range(200)]
    assert Sampler().sample(logits, free) == Sampler().sample(logits, bound)


def test_a_bias_does_not_lift_what_is_forbidden() -> None:
    request = _request(constraint=Bits(4), logit_bias={5: 100.0, 4: -100.0}, temperature=0.0)
    assert Sampler().sample(_logits(1), [request]) == [4]


@pytest.fixture(scope="module")
def runner() -> ModelRunner:
    theirs = tiny.make_model()
    return driving.runner_for(driving.load(driving.config_of(theirs), driving.weights_of(theirs)))


def test_scores_are_those_of_the_raw_distribution_and_a_dead_end_has_none(runner: ModelRunner) -> None:
    def run(constraint: Bits | None, **params: Any) -> Any:
        request = Request("r", [5, 6, 7], SamplingParams(max_tokens=4, temperature=0.0, logprobs=3, **params))
        request.constraint = constraint
        [sampled] = runner.run([Chunk(request=request, start=0, end=3, block_ids=(0,))])
        return sampled

    free = run(None)
    best = [entry.token_id for entry in free.logprobs[0][1:]]
    held = run(Bits(best[2], size=512))
    assert held.token_ids == (best[2],)
    assert held.logprobs[0][1:] == free.logprobs[0][1:]
    assert held.logprobs[0][0] == free.logprobs[0][3]
    assert run(None, allowed_token_ids=frozenset({best[1]})).token_ids == (best[1],)
    dead = run(Bits(size=512))
    assert (dead.token_ids, dead.logprobs) == ((), ())
