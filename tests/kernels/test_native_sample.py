"""Compiled sampling, and its plain twin, against the distribution written out in double precision."""

import math
from collections.abc import Iterable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qserve.kernels.ops import Ops
from qserve.kernels.reference import ReferenceOps
from tests.kernels.native import VARIANTS, open_variant

SIZES = (1, 7, 16, 255, 256, 257, 5000)
REFERENCE = ReferenceOps(device=torch.device("cpu"))


def open_ops(name: str) -> Ops:
    return REFERENCE if name == "reference" else open_variant(name)


every_kernel = pytest.mark.parametrize("name", [*VARIANTS, "reference"])


def make_logits(rows: int, size: int, *, seed: int = 0, spread: float = 4.0) -> Tensor:
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(seed)) * spread


def make_draw(
    temperature: float, number: float, *, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> tuple[float, ...]:
    return temperature, top_k, top_p, min_p, number


def sample(ops: Ops, logits: Tensor, temperature: float, number: float, **cuts: float) -> list[int]:
    draws = torch.tensor([make_draw(temperature, number, **cuts)] * len(logits), dtype=torch.float64)  # type: ignore[arg-type]
    return [int(token) for [token] in ops.sample(logits, draws)]


def make_bits(tokens: Iterable[int], size: int) -> bytes:
    return sum(1 << token for token in tokens).to_bytes((size + 7) // 8, "little")


def shares(logits: Tensor, temperature: float) -> Tensor:
    """Where the share of each token begins and ends, (vocabulary + 1,)."""
    return bounds_of(torch.softmax(logits.double() / temperature, dim=-1))


def bounds_of(probabilities: Tensor) -> Tensor:
    ends = probabilities.cumsum(dim=-1)
    return torch.cat([torch.zeros(1, dtype=torch.float64), ends / ends[-1]])


def cut(logits: Tensor, temperature: float, *, top_k: int, top_p: float, min_p: float) -> tuple[list[int], Tensor]:
    """What is left, in order, and where the share of each begins and ends; found one token after the other."""
    likely = torch.softmax(logits.double() / temperature, dim=-1)
    order = sorted(range(len(logits)), key=lambda token: (-logits[token].item(), token))[: top_k or None]
    total, before, left = float(likely[order].sum()), 0.0, []
    for token in order:
        if left and (before >= top_p * total or likely[token] < min_p * likely.max()):
            break
        left.append(token)
        before += float(likely[token])
    return sorted(left), bounds_of(likely[sorted(left)])


@every_kernel
@pytest.mark.parametrize("size", SIZES)
def test_without_temperature_it_is_the_likeliest_and_of_equals_the_first(name: str, size: int) -> None:
    logits = make_logits(5, size).round()
    assert sample(open_ops(name), logits, 0.0, 0.5) == logits.argmax(dim=-1).tolist()


@every_kernel
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("temperature", [0.3, 1.0, 30.0])
def test_a_number_falls_into_the_share_of_the_token_that_it_draws(name: str, size: int, temperature: float) -> None:
    logits = make_logits(1, size, seed=size)
    bounds = shares(logits[0], temperature)
    for number in torch.linspace(0, 1 - 2**-53, 41, dtype=torch.float64).tolist():
        (token,) = sample(open_ops(name), logits, temperature, number)
        assert 0 <= token < size
        assert bounds[token] - 1e-5 <= number <= bounds[token + 1] + 1e-5


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), size=st.integers(1, 1200), number=st.floats(0, 1, exclude_max=True), data=st.data())
def test_what_has_no_probability_is_never_drawn(seed: int, size: int, number: float, data: st.DataObject) -> None:
    possible = sorted(data.draw(st.sets(st.integers(0, size - 1), min_size=1, max_size=4)))
    logits = torch.full((1, size), -math.inf)
    logits[0, possible] = make_logits(1, len(possible), seed=seed)[0]
    bounds = shares(logits[0], 1.0)
    for name in (VARIANTS[0], VARIANTS[-1], "reference"):
        (token,) = sample(open_ops(name), logits, 1.0, number)
        assert token in possible
        assert bounds[token] - 1e-6 <= number <= bounds[token + 1] + 1e-6


@every_kernel
@pytest.mark.parametrize("spread", [0.3, 2.0, 9.0])
@pytest.mark.parametrize(
    "cuts",
    [
        {"top_k": 1},
        {"top_k": 7},
        {"top_k": 300},
        {"top_k": 5000},
        {"top_p": 0.02},
        {"top_p": 0.5},
        {"top_p": 0.999},
        {"min_p": 0.3},
        {"min_p": 1.0},
        {"top_k": 40, "top_p": 0.9, "min_p": 0.05},
        {"top_k": 4, "top_p": 0.4},
        {"top_p": 0.97, "min_p": 0.001},
    ],
)
def test_cuts_leave_the_best_and_a_number_falls_into_the_share_of_the_token_that_it_draws(
    name: str, spread: float, cuts: dict[str, float]
) -> None:
    logits = make_logits(1, 3000, seed=2, spread=spread)
    left, bounds = cut(logits[0], 0.8, **{"top_k": 0, "top_p": 1.0, "min_p": 0.0, **cuts})  # type: ignore[arg-type]
    for number in torch.linspace(0, 1 - 2**-53, 101, dtype=torch.float64).tolist():
        (token,) = sample(open_ops(name), logits, 0.8, number, **cuts)
        place = left.index(token)
        assert bounds[place] - 1e-4 <= number <= bounds[place + 1] + 1e-4


@every_kernel
def test_of_equals_the_first_are_left(name: str) -> None:
    logits = torch.zeros(1, 900)
    logits[0, 500] = 1.0
    numbers = [place / 64 for place in range(64)]
    assert {sample(open_ops(name), logits, 1.0, number, top_k=3)[0] for number in numbers} == {500, 0, 1}
    share = (math.e + 5.5) / (math.e + 899)
    assert {sample(open_ops(name), logits, 1.0, number, top_p=share)[0] for number in numbers} == {500, *range(6)}


@every_kernel
def test_top_k_of_more_than_can_be_drawn_leaves_only_those(name: str) -> None:
    logits = torch.full((1, 700), -math.inf)
    logits[0, [3, 600]] = torch.tensor([1.0, 2.0])
    assert {sample(open_ops(name), logits, 1.0, number / 10, top_k=50)[0] for number in range(10)} == {3, 600}


@every_kernel
def test_the_ends_of_the_range_draw_the_first_and_the_last_that_can_be_drawn(name: str) -> None:
    logits = torch.full((1, 1000), -math.inf)
    logits[0, 300:700] = 0.0
    assert sample(open_ops(name), logits, 1.0, 0.0) == [300]
    assert sample(open_ops(name), logits, 1.0, 1 - 2**-53) == [699]


@every_kernel
def test_what_is_not_a_number_is_never_chosen(name: str) -> None:
    logits = make_logits(1, 600)
    logits[0, ::2] = math.nan
    for number in (0.0, 0.1, 0.5, 0.999):
        assert sample(open_ops(name), logits, 1.0, number)[0] % 2 == 1
    assert sample(open_ops(name), logits, 0.0, 0.0)[0] % 2 == 1
    for temperature in (0.0, 1.0):
        assert sample(open_ops(name), torch.full((1, 40), math.nan), temperature, 0.5) == [-1]


@every_kernel
def test_an_infinite_logit_is_the_choice(name: str) -> None:
    logits = make_logits(1, 600)
    logits[0, [411, 500]] = math.inf
    assert sample(open_ops(name), logits, 1.0, 0.9) == [411]


@every_kernel
@pytest.mark.parametrize("temperature", [1e-38, 1e-6])
def test_a_tiny_temperature_draws_the_likeliest(name: str, temperature: float) -> None:
    logits = make_logits(6, 700)
    assert sample(open_ops(name), logits, temperature, 0.7) == logits.argmax(dim=-1).tolist()


@pytest.mark.parametrize("name", VARIANTS)
def test_rows_do_not_feel_each_other_nor_the_threads(name: str) -> None:
    logits = make_logits(9, 5000)
    numbers = torch.rand(9, generator=torch.Generator().manual_seed(1)).tolist()
    ways = ({"top_k": 30}, {"top_p": 0.9}, {"min_p": 0.1}) * 3
    draws = torch.tensor(
        [make_draw(0.5 * (i // 3), numbers[i], **way) for i, way in enumerate(ways)],  # type: ignore[arg-type]
        dtype=torch.float64,
    )
    allowed = [None, make_bits(range(0, 5000, 3), 5000), make_bits([], 5000)] * 3
    together = open_variant(name).sample(logits, draws, allowed)
    one = open_variant(name, 1)
    alone = [int(one.sample(logits[i : i + 1], draws[i : i + 1], allowed[i : i + 1])) for i in range(len(logits))]
    assert together[:, 0].tolist() == alone


@pytest.mark.parametrize("name", VARIANTS)
def test_rows_may_stand_apart(name: str) -> None:
    wide = make_logits(4, 800)
    narrow = wide[:, :500]
    assert sample(open_variant(name), narrow, 0.0, 0.0) == narrow.argmax(dim=-1).tolist()


@every_kernel
@pytest.mark.parametrize("size", [1, 7, 16, 17, 255, 256, 263, 3000])
@pytest.mark.parametrize("cuts", [{}, {"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.1}, {"top_k": 9, "top_p": 0.7}])
def test_what_is_not_allowed_is_gone_before_all_else(name: str, size: int, cuts: dict[str, float]) -> None:
    logits = make_logits(8, size, seed=size)
    numbers = torch.linspace(0, 0.999, 8).tolist()
    tokens = [sorted({row % size, size - 1, *range(0, size, row + 1)}) for row in range(7)]
    bits = [*(make_bits(each, size) for each in tokens), None]
    masked = logits.clone()
    for row, each in enumerate(tokens):
        masked[row] = -math.inf
        masked[row, each] = logits[row, each]
    for temperature in (0.0, 0.9):
        draws = torch.tensor(
            [make_draw(temperature, number, **cuts) for number in numbers],  # type: ignore[arg-type]
            dtype=torch.float64,
        )
        ops = open_ops(name)
        assert ops.sample(logits, draws, bits).tolist() == ops.sample(masked, draws).tolist()


@every_kernel
def test_where_nothing_is_allowed_nothing_is_chosen(name: str) -> None:
    draws = torch.tensor([make_draw(0.0, 0.5), make_draw(1.0, 0.5)], dtype=torch.float64)
    assert open_ops(name).sample(make_logits(2, 300), draws, [bytes(38)] * 2).tolist() == [[-1], [-1]]


@every_kernel
@pytest.mark.parametrize("cuts", [{}, {"top_p": 0.8}])
def test_each_number_draws_as_if_it_were_alone(name: str, cuts: dict[str, float]) -> None:
    logits, numbers = make_logits(3, 3000), (0.0, 0.3, 0.31, 0.9, 0.2)
    draws = torch.tensor([make_draw(0.7, 0.0, **cuts)[:-1] + numbers] * 3, dtype=torch.float64)  # type: ignore[arg-type]
    together = open_ops(name).sample(logits, draws)
    alone = [sample(open_ops(name), logits, 0.7, number, **cuts) for number in numbers]
    assert together.T.tolist() == alone
