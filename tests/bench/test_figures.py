"""Figures against the definitions written out plainly."""

import math
import random
import statistics
from itertools import accumulate, pairwise

import pytest

from qserve.bench.answer import Answer
from qserve.bench.estimate import estimate, estimate_ratio
from qserve.bench.figures import make_figures
from qserve.bench.load import Load, make_arrivals, make_loads
from qserve.bench.serve import parse_goodput, parse_percentiles
from qserve.errors import UsageError


def random_answers(number: int) -> list[Answer]:
    draw = random.Random(number)
    answers = []
    for _ in range(number):
        gaps = [draw.expovariate(20) for _ in range(draw.randint(1, 30))]
        times = list(accumulate(gaps, initial=draw.uniform(0, 10)))
        answers.append(
            Answer(
                started_at=times[0],
                chunk_times=tuple(times[1:]),
                num_prompt_tokens=draw.randint(1, 99),
                num_output_tokens=draw.randint(1, 40),
            )
        )
    return answers


def plain_percentile(values: list[float], percent: float) -> float:
    """Linear between the two nearest."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low, high = math.floor(place), math.ceil(place)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def test_definitions() -> None:
    answers = random_answers(40)
    figures = make_figures(
        [*answers, Answer(started_at=0.0, failure="HTTP 500")], 12.5, percentiles=(50, 99, 99.9), goodput={"ttft": 60}
    )
    by_hand = {
        "ttft": [answer.chunk_times[0] - answer.started_at for answer in answers],
        "e2el": [answer.chunk_times[-1] - answer.started_at for answer in answers],
        "itl": [b - a for each in answers for a, b in pairwise(each.chunk_times)],
        "tpot": [
            (answer.chunk_times[-1] - answer.chunk_times[0]) / (answer.num_output_tokens - 1)
            for answer in answers
            if answer.num_output_tokens and answer.num_output_tokens > 1
        ],
    }
    for metric, seconds in by_hand.items():
        milliseconds = [1e3 * value for value in seconds]
        assert figures[f"mean_{metric}_ms"] == pytest.approx(statistics.fmean(milliseconds))
        assert figures[f"median_{metric}_ms"] == pytest.approx(statistics.median(milliseconds))
        assert figures[f"std_{metric}_ms"] == pytest.approx(statistics.pstdev(milliseconds))
        for percent in (50, 99, 99.9):
            assert figures[f"p{percent:g}_{metric}_ms"] == pytest.approx(plain_percentile(milliseconds, percent))
    assert (figures["completed"], figures["failed"]) == (40, 1)
    output = sum(answer.num_output_tokens or 0 for answer in answers)
    assert figures["output_throughput"] == pytest.approx(output / 12.5)
    assert figures["total_token_throughput"] == pytest.approx((output + figures["total_input_tokens"]) / 12.5)
    assert figures["request_goodput"] == pytest.approx(sum(value <= 0.060 for value in by_hand["ttft"]) / 12.5)
    moments = [answer.started_at for answer in answers]
    running = [sum(answer.started_at <= moment < answer.chunk_times[-1] for answer in answers) for moment in moments]
    assert figures["max_concurrent_requests"] == max(running)


def test_the_busiest_second() -> None:
    answers = [
        Answer(started_at=5.0, chunk_times=(5.5, 6.2), num_prompt_tokens=1, num_output_tokens=4),
        Answer(started_at=6.0, chunk_times=(6.1, 6.9, 7.1), num_prompt_tokens=1, num_output_tokens=3),
    ]
    assert make_figures(answers, 3.0)["max_output_tokens_per_s"] == pytest.approx(2 + 1 + 1)


def test_goodput_wants_every_limit_met() -> None:
    fast = Answer(started_at=0.0, chunk_times=(0.1, 0.2, 0.3), num_prompt_tokens=1, num_output_tokens=3)
    slow = Answer(started_at=0.0, chunk_times=(0.1, 0.2, 1.3), num_prompt_tokens=1, num_output_tokens=3)
    single = Answer(started_at=0.0, chunk_times=(0.1,), num_prompt_tokens=1, num_output_tokens=1)
    limits = parse_goodput(["ttft:150", "tpot:200", "e2el:1000"])
    assert make_figures([fast, slow, single], 1.0, goodput=limits)["request_goodput"] == 2.0


def test_tokens_that_are_not_told_are_not_guessed() -> None:
    told = Answer(started_at=0.0, chunk_times=(0.1,), num_prompt_tokens=1, num_output_tokens=3)
    figures = make_figures([told, Answer(started_at=0.0, chunk_times=(0.1, 0.2))], 1.0)
    assert figures["output_throughput"] is None
    assert figures["total_output_tokens"] is None
    assert (figures["completed"], figures["median_itl_ms"]) == (2, pytest.approx(100.0))


def test_nothing_came_back() -> None:
    figures = make_figures([Answer(started_at=0.0, failure="no")], 1.0)
    assert (figures["completed"], figures["failed"], figures["median_ttft_ms"]) == (0, 1, None)


def test_the_interval_of_a_mean() -> None:
    found = estimate([10.0, 12.0, 14.0])
    assert (found.mean, found.median, found.number) == (12.0, 12.0, 3)
    assert found.half_width == pytest.approx(4.303 * 2.0 / math.sqrt(3))
    assert estimate([3.0]).half_width is None
    many = [float(value % 2) for value in range(400)]
    assert estimate(many).half_width == pytest.approx(1.96 * statistics.stdev(many) / 20)


def test_an_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    draw = random.Random(0)
    runs = [estimate([draw.gauss(5, 1) for _ in range(4)]) for _ in range(2000)]
    hits = sum(abs(run.mean - 5) <= (run.half_width or 0) for run in runs)
    assert 0.93 < hits / len(runs) < 0.97


def test_a_ratio_is_made_repeat_by_repeat() -> None:
    # Both halve from one repeat to the next: the ratio is certain although neither figure is.
    found = estimate_ratio([40.0, 20.0, 10.0], [20.0, 10.0, 5.0])
    assert (found.mean, found.median) == (pytest.approx(2.0), pytest.approx(2.0))
    assert found.half_width == pytest.approx(0.0, abs=1e-9)
    assert estimate_ratio([4.0, 1.0], [1.0, 1.0]).mean == pytest.approx(2.0)  # the geometric mean


def test_arrivals() -> None:
    assert make_arrivals(Load(), 3, seed=0) == [0.0, 0.0, 0.0]
    for burstiness in (0.3, 1.0, 100.0):
        arrivals = make_arrivals(Load(request_rate=4.0, burstiness=burstiness), 400, seed=1)
        gaps = [b - a for a, b in pairwise(arrivals)]
        assert arrivals[0] == 0.0
        assert min(gaps) >= 0.0
        assert arrivals[-1] == pytest.approx(100.0, rel=0.05)
        # Of a gamma distribution of this shape the standard deviation is the mean over the shape's root.
        assert statistics.stdev(gaps) == pytest.approx(0.25 / math.sqrt(burstiness), rel=0.2)
    assert make_arrivals(Load(request_rate=4.0), 9, seed=1) == make_arrivals(Load(request_rate=4.0), 9, seed=1)


def test_sweeps() -> None:
    loads = make_loads(rates="2, inf", concurrency="1,8", burstiness=1.0)
    assert [load.label for load in loads] == ["2/s, 1 client", "2/s, 8 clients", "1 client", "8 clients"]
    assert make_loads(rates="", concurrency="", burstiness=1.0)[0].label == "all at once"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: make_loads(rates="fast", concurrency="", burstiness=1.0), "--request-rate is 'fast'"),
        (lambda: make_loads(rates="", concurrency="0", burstiness=1.0), "--concurrency is '0'"),
        (lambda: make_loads(rates="1", concurrency="", burstiness=0.0), "--burstiness is 0"),
        (lambda: parse_goodput(["ttft"]), "--goodput has 'ttft'"),
        (lambda: parse_goodput(["itl:5"]), "expected ttft, tpot or e2el"),
        (lambda: parse_percentiles("101"), "from 0 to 100"),
    ],
)
def test_options_that_cannot_be_in_force(make: object, message: str) -> None:
    assert callable(make)
    with pytest.raises(UsageError, match=message):
        make()
