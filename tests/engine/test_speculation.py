"""Guesses: the same text in fewer steps, whatever ends it, and nobody else pays for them."""

from collections.abc import Sequence
from dataclasses import replace

import pytest

from qserve.config import EngineConfig
from qserve.engine.engine import Engine
from qserve.engine.request import Chunk, FinishReason, Request, Sampled, SamplingParams, TokenEvent, TokenLogprob
from qserve.engine.scheduler import Scheduler
from tests.engine.test_constraint import Recorder


class Circle:
    """Says 0, 1, 2, 3, 4, 0, 1 ... after whatever stands there; a token's rank tells its position."""

    def __init__(self) -> None:
        self.drafts: list[tuple[int, ...]] = []

    def run(self, chunks: list[Chunk]) -> list[Sampled]:
        self.drafts += [chunk.draft_ids for chunk in chunks]
        return [self._answer(chunk) for chunk in chunks]

    def _answer(self, chunk: Chunk) -> Sampled:
        if not chunk.is_last:
            return Sampled()
        token_ids = [(chunk.request.token_ids[-1] + 1) % 5]
        for guess in chunk.draft_ids:
            if token_ids[-1] != guess:
                break
            token_ids.append((guess + 1) % 5)
        ranks = range(chunk.end, chunk.end + len(token_ids))
        reports = tuple((TokenLogprob(token, -1.0, rank),) for token, rank in zip(token_ids, ranks, strict=True))
        return Sampled(token_ids=tuple(token_ids), logprobs=reports)


CONFIG = EngineConfig(max_running=4, max_step_tokens=32, block_size=4)
PARAMS = SamplingParams(max_tokens=50)


def run(
    *requests: Request, num_blocks: int = 64, config: EngineConfig = CONFIG
) -> tuple[dict[str, list[TokenEvent]], Scheduler, Circle]:
    scheduler, device = Scheduler(config, num_blocks), Circle()
    engine = Engine(scheduler, device)
    events: dict[str, list[TokenEvent]] = {request.id: [] for request in requests}
    for request in requests:
        scheduler.add(request)
    while scheduler.has_work:
        for event in engine.step():
            events[event.request_id].append(event)
        scheduler.check()
    assert scheduler.stats.num_held_blocks == 0
    return events, scheduler, device


def test_fewer_steps_for_the_same_text() -> None:
    events, scheduler, _ = run(Request("a", [0], PARAMS))
    plain, plain_scheduler, device = run(Request("a", [0], PARAMS), config=replace(CONFIG, speculative_tokens=0))
    assert [replace(event, has_more=False) for event in events["a"]] == plain["a"]
    assert sum(not event.has_more for event in events["a"]) == scheduler.stats.num_steps
    assert [event.token_id for event in plain["a"]] == [number % 5 for number in range(1, 51)]
    assert [event.logprobs[0].rank for event in plain["a"]] == [*range(1, 51)]
    assert not any(device.drafts)
    assert (scheduler.stats.num_steps, plain_scheduler.stats.num_steps) == (13, 50)
    assert scheduler.stats.num_generated_tokens == plain_scheduler.stats.num_generated_tokens == 50
    assert scheduler.stats.num_accepted_tokens == 50 - 13
    assert scheduler.stats.num_draft_tokens == scheduler.stats.num_accepted_tokens


@pytest.mark.parametrize("length", range(14, 24))
def test_whatever_ends_a_text_ends_it_amid_guesses(length: int) -> None:
    events, _, device = run(Request("a", [0], SamplingParams(max_tokens=length)))
    assert [len(events["a"]), events["a"][-1].finish_reason] == [length, FinishReason.LENGTH]
    assert sum(map(len, device.drafts)) < length, "what can never be said is guessed"
    stopping = SamplingParams(max_tokens=50, min_tokens=length, stop_token_ids=frozenset({3}))
    events, _, _ = run(Request("a", [0], stopping))
    assert events["a"][-1].finish_reason == FinishReason.STOP
    assert len(events["a"]) == length + (3 - length) % 5
    assert all(event.finish_reason is None for event in events["a"][:-1])


@pytest.mark.parametrize(("config", "most"), [({"speculative_tokens": 3}, 3), ({"max_step_tokens": 5}, 4)])
def test_a_step_has_room_for_so_many_guesses_and_no_more(config: dict[str, int], most: int) -> None:
    _, _, device = run(Request("a", [0], PARAMS), config=replace(CONFIG, **config))
    assert max(map(len, device.drafts)) == most


@pytest.mark.parametrize("guesses", [0, 15])
@pytest.mark.parametrize(("length", "stop"), [(25, 0), (25, 4), (24, 0)])
def test_nobody_is_preempted_for_a_guess(length: int, stop: int, guesses: int) -> None:
    """The first could guess into the last block, which the second needs in the same step; it stops before it does."""
    round_, stops = [0, 1, 2, 3, 4], SamplingParams(max_tokens=18, min_tokens=6, stop_token_ids=frozenset({stop}))
    requests = [
        Request("a", round_ * 4 + [0] * (length - 20), stops),
        Request("b", [1, 2, 3, 4, 0] * 3 + [1], SamplingParams(max_tokens=13)),
    ]
    _, scheduler, _ = run(*requests, num_blocks=15, config=replace(CONFIG, speculative_tokens=guesses))
    assert scheduler.stats.num_preemptions == 0
    assert (scheduler.stats.num_accepted_tokens > 0) == (guesses > 0)


class Knowing(Recorder):
    """Knows what must come for as long as it is not more than 3."""

    def correct(self, guess: Sequence[int]) -> Sequence[int]:
        last = self.heard[-1]
        return range(last + 1, 4) if last < 3 else guess


@pytest.mark.parametrize("make", [Recorder, Knowing])
def test_a_constraint_hears_what_was_right_and_corrects_guesses(make: type[Recorder]) -> None:
    recorder = make(40)
    _, scheduler, device = run(Request("a", [0], PARAMS, constraint=recorder))
    assert recorder.heard == [number % 5 for number in range(1, 41)]
    assert scheduler.stats.num_accepted_tokens > 0
    assert ((2, 3) in device.drafts) == (make is Knowing)
