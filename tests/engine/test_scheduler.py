"""Who computes what in which step, case by case."""

import pytest

from qserve.config import EngineConfig
from qserve.engine.engine import Engine
from qserve.engine.request import FinishReason, Request, SamplingParams, TokenEvent
from qserve.engine.scheduler import Scheduler
from qserve.errors import ContextLengthExceeded, InvalidRequest, UsageError
from tests.engine.fake_device import FakeDevice, expected_pool, expected_tokens, make_request


class Bench:
    """An engine on the fake device, with a short way to see a step's chunks."""

    def __init__(self, *, num_blocks: int = 64, block_size: int = 4, max_running: int = 4, max_step_tokens: int = 16):
        self.device = FakeDevice(num_blocks, block_size)
        config = EngineConfig(max_running=max_running, max_step_tokens=max_step_tokens, block_size=block_size)
        self.scheduler = Scheduler(config, num_blocks)
        self.engine = Engine(self.scheduler, self.device)
        self.events: list[TokenEvent] = []

    def add(self, *requests: Request) -> None:
        for request in requests:
            self.scheduler.add(request)

    def step(self) -> list[tuple[str, int, int]]:
        self.events = self.engine.step()
        self.scheduler.check()
        return self.device.steps[-1]

    def finish(self) -> None:
        while self.scheduler.has_work:
            self.step()


def ids(first: int, length: int) -> list[int]:
    """A prompt that shares no beginning with those of another `first`."""
    return [first] * length


def test_a_long_prompt_is_computed_in_pieces_beside_those_who_decode() -> None:
    bench = Bench(max_step_tokens=8)
    bench.add(make_request("a", ids(1, 3)))
    assert bench.step() == [("a", 0, 3)]
    bench.add(make_request("b", ids(2, 20)))
    assert bench.step() == [("a", 3, 4), ("b", 0, 7)]
    assert [event.request_id for event in bench.events] == ["a"]
    assert bench.step() == [("a", 4, 5), ("b", 7, 14)]
    assert bench.step() == [("a", 5, 6), ("b", 14, 20)]
    assert [(event.request_id, event.finish_reason) for event in bench.events] == [("a", "length"), ("b", None)]


def test_an_older_prompt_leaves_a_token_for_each_who_runs_behind_it() -> None:
    bench = Bench(max_step_tokens=8)
    bench.add(make_request("late", ids(2, 4), priority=1))
    bench.step()
    bench.add(make_request("early", ids(1, 20), priority=0))
    assert bench.step() == [("late", 4, 5), ("early", 0, 7)]
    assert bench.step() == [("early", 7, 14), ("late", 5, 6)]


def test_who_waits_is_admitted_by_priority_and_then_by_arrival() -> None:
    bench = Bench(max_running=2)
    bench.add(make_request("slow", ids(1, 2), priority=1), make_request("first", ids(2, 2)))
    bench.add(make_request("second", ids(3, 2)), make_request("urgent", ids(4, 2), priority=-1))
    assert [name for name, _, _ in bench.step()] == ["urgent", "first"]
    bench.finish()
    order = list(dict.fromkeys(name for step in bench.device.steps for name, _, _ in step))
    assert order == ["urgent", "first", "second", "slow"]


def test_nobody_overtakes_a_request_that_waits_for_room() -> None:
    bench = Bench(num_blocks=4)
    bench.add(make_request("a", ids(1, 8)), make_request("big", ids(2, 12)), make_request("small", ids(3, 1)))
    assert bench.step() == [("a", 0, 8)]
    assert bench.step() == [("a", 8, 9)]


def test_a_newcomer_leaves_a_block_for_the_growth_of_each_who_runs() -> None:
    bench = Bench(num_blocks=4)
    bench.add(make_request("a", ids(1, 8)), make_request("b", ids(2, 8)))
    assert bench.step() == [("a", 0, 8)]
    bench.finish()
    assert bench.scheduler.stats.num_preemptions == 0


def test_requests_that_arrive_together_share_their_prompt_in_the_same_step() -> None:
    bench = Bench()
    requests = [make_request(name, ids(1, 10)) for name in "abc"]
    bench.add(*requests)
    assert bench.step() == [("a", 0, 10), ("b", 8, 10), ("c", 8, 10)]
    assert [request.num_cached_tokens for request in requests] == [0, 8, 8]
    assert bench.scheduler.stats.num_held_blocks == 2 + 3
    bench.finish()
    assert {tuple(request.token_ids) for request in requests} == {tuple(requests[0].token_ids)}


def test_the_last_in_order_is_preempted_and_goes_on_where_it_was() -> None:
    bench = Bench(num_blocks=4, max_step_tokens=32)
    first, last = make_request("a", ids(1, 4), max_tokens=9), make_request("b", ids(2, 4), max_tokens=9)
    bench.add(first)
    bench.step()
    bench.add(last)
    bench.finish()
    assert (first.num_preemptions, last.num_preemptions) == (0, 1)
    assert bench.scheduler.stats.num_preemptions == 1
    for request in (first, last):
        prompt = request.token_ids[:4]
        assert request.token_ids[4:] == expected_tokens(prompt, request.params)[0]


def test_a_request_that_is_last_itself_makes_room_itself() -> None:
    bench = Bench(num_blocks=5, max_step_tokens=32)
    bench.add(make_request("low", ids(1, 7), max_tokens=8, priority=5))
    bench.step()
    bench.add(make_request("high", ids(2, 4), max_tokens=13))
    bench.finish()
    preempted = [step for step in bench.device.steps if all(name != "low" for name, _, _ in step)]
    assert preempted
    assert bench.scheduler.stats.num_preemptions == 1


def test_a_stop_token_ends_the_request_and_is_told() -> None:
    prompt = ids(1, 5)
    free = SamplingParams(max_tokens=20)
    text, _ = expected_tokens(prompt, free)
    stop = text[3]
    params = SamplingParams(max_tokens=20, stop_token_ids=frozenset({stop}))
    bench = Bench()
    bench.add(Request("a", prompt, params))
    bench.finish()
    assert bench.events[-1].token_id == stop
    assert bench.events[-1].finish_reason == FinishReason.STOP
    assert bench.scheduler.stats.num_held_blocks == 0


def test_min_tokens_outlives_a_stop_token() -> None:
    prompt = ids(1, 5)
    text, _ = expected_tokens(prompt, SamplingParams(max_tokens=20))
    request = Request("a", prompt, SamplingParams(max_tokens=6, min_tokens=6, stop_token_ids=frozenset(text[:5])))
    Bench().engine.generate([request])
    assert request.num_output_tokens == 6


def test_no_token_is_generated_where_none_is_asked() -> None:
    bench = Bench(max_step_tokens=4)
    bench.add(Request("a", [1, 2, 3, 4, 5, 6], SamplingParams(max_tokens=0, prompt_logprobs=0)))
    bench.step()
    assert [event.finish_reason for event in bench.events] == [None]
    assert [logprobs[0].token_id for logprobs in bench.events[0].prompt_logprobs] == [2, 3, 4, 5]
    bench.step()
    assert [(event.token_id, event.finish_reason) for event in bench.events] == [(None, FinishReason.LENGTH)]
    assert [logprobs[0].token_id for logprobs in bench.events[0].prompt_logprobs] == [6]
    assert not bench.scheduler.has_work


def test_an_aborted_request_frees_its_blocks_at_once() -> None:
    bench = Bench(max_running=1)
    bench.add(make_request("runs", ids(1, 9)), make_request("waits", ids(2, 9)))
    bench.step()
    for name in ("runs", "waits"):
        event = bench.scheduler.abort(name)
        assert event is not None
        assert event.finish_reason == FinishReason.ABORT
        assert bench.scheduler.abort(name) is None
        bench.scheduler.check()
    assert bench.scheduler.stats.num_held_blocks == 0
    assert not bench.scheduler.has_work


def test_what_can_never_fit_is_refused() -> None:
    bench = Bench(num_blocks=2, block_size=4)
    with pytest.raises(ContextLengthExceeded, match=r"6 tokens and max_tokens is 4, but .* holds 8 tokens"):
        bench.add(make_request("a", ids(1, 6), max_tokens=4))
    with pytest.raises(InvalidRequest, match="no tokens"):
        bench.add(make_request("a", []))
    fitting = make_request("a", ids(1, 6), max_tokens=3)  # the last token is never fed back
    bench.add(fitting, make_request("b", ids(1, 8), max_tokens=0))
    bench.finish()
    assert fitting.num_output_tokens == 3


def test_a_budget_below_the_running_requests_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="max_step_tokens is 3, less than max_running, 4"):
        Scheduler(EngineConfig(max_running=4, max_step_tokens=3), 8)


def test_the_numbers_add_up() -> None:
    bench = Bench()
    requests = [make_request(name, ids(1, 10), max_tokens=3) for name in "ab"]
    bench.engine.generate(requests)
    stats = bench.scheduler.stats
    assert (stats.num_prompt_tokens, stats.num_cached_tokens, stats.num_generated_tokens) == (20, 8, 6)
    assert stats.num_computed_tokens == 20 - 8 + 2 * 2
    assert (stats.num_finished, stats.num_aborted, stats.num_steps) == (2, 0, 3)
    for request in requests:
        assert request.created_at <= request.admitted_at <= request.first_token_at <= request.finished_at


@pytest.mark.parametrize("first", [0, 5, 22])
def test_hidden_states_are_summed_over_chunks_and_again_after_a_preemption(first: int) -> None:
    bench = Bench(num_blocks=8, max_step_tokens=4)
    prompt = [7 + place % 5 for place in range(23)]
    bench.add(make_request("before", prompt[:9], max_tokens=1))
    bench.finish()  # leaves blocks that the next one may reuse as far as they are not pooled
    bench.add(make_request("urgent", ids(3, 3), max_tokens=16))
    bench.step()
    pooled = Request("pooled", prompt, SamplingParams(max_tokens=0, pooled_from=first), priority=1)
    bench.add(pooled)
    found: list[TokenEvent] = []
    while bench.scheduler.has_work:
        bench.step()
        found += [event for event in bench.events if event.request_id == "pooled"]
    assert [event.pooled for event in found] == [expected_pool(prompt, first)]
    assert pooled.num_cached_tokens == min(first, 8) // 4 * 4
    assert bool(pooled.num_preemptions) is (first < 22)  # the last one has less to compute, and is done in time
