"""A constraint hears every token once and in order, whatever is preempted, and ends its request."""

from collections.abc import Sequence

import pytest

from qserve.config import EngineConfig
from qserve.engine.engine import Engine
from qserve.engine.request import Chunk, FinishReason, Request, Sampled, SamplingParams
from qserve.engine.scheduler import Scheduler
from tests.engine.fake_device import FakeDevice, expected_tokens


class Recorder:
    """Allows everything, and is finished after so many tokens."""

    def __init__(self, length: int) -> None:
        self.heard: list[int] = []
        self._length = length

    @property
    def is_finished(self) -> bool:
        return len(self.heard) >= self._length

    def accept(self, token_id: int) -> None:
        self.heard.append(token_id)

    def allowed(self) -> bytes:
        return b"\xff\xff"

    def find_allowed(self, token_ids: Sequence[int]) -> int | None:
        return token_ids[0]

    def correct(self, guess: Sequence[int]) -> Sequence[int]:
        return guess

    def supposing(self, token_ids: Sequence[int]) -> "Recorder":
        supposed = Recorder(self._length)
        supposed.heard = [*self.heard, *token_ids]
        return supposed


def test_every_token_is_heard_once_though_requests_are_preempted() -> None:
    config = EngineConfig(max_running=4, max_step_tokens=16, block_size=4)
    scheduler = Scheduler(config, 8)
    engine = Engine(scheduler, FakeDevice(8, 4))
    recorders = [Recorder(12) for _ in range(4)]
    params = SamplingParams(max_tokens=20)
    requests = [
        Request(str(number), [number] * 5, params, constraint=recorder) for number, recorder in enumerate(recorders)
    ]
    engine.generate(requests)
    assert scheduler.stats.num_preemptions
    for number, recorder in enumerate(recorders):
        assert recorder.heard == expected_tokens([number] * 5, params)[0][:12]
        assert requests[number].num_output_tokens == 12


@pytest.mark.parametrize("length", [3, 4, 5])
def test_the_end_of_the_grammar_goes_before_the_end_of_the_tokens(length: int) -> None:
    scheduler = Scheduler(EngineConfig(max_running=4, max_step_tokens=16, block_size=4), 8)
    request = Request("a", [1], SamplingParams(max_tokens=4), constraint=Recorder(length))
    engine = Engine(scheduler, FakeDevice(8, 4))
    scheduler.add(request)
    events = [event for _ in range(min(length, 4)) for event in engine.step()]
    assert events[-1].finish_reason == (FinishReason.STOP if length <= 4 else FinishReason.LENGTH)
    assert not scheduler.has_work


class Mute:
    """A device that finds nothing that it may say."""

    def run(self, chunks: list[Chunk]) -> list[Sampled]:
        return [Sampled() for _ in chunks]


@pytest.mark.parametrize(("max_tokens", "reason"), [(3, FinishReason.ERROR), (0, FinishReason.LENGTH)])
def test_a_request_that_can_say_nothing_ends_with_an_error(max_tokens: int, reason: FinishReason) -> None:
    scheduler = Scheduler(EngineConfig(max_running=4, max_step_tokens=16, block_size=4), 8)
    scheduler.add(Request("a", [1], SamplingParams(max_tokens=max_tokens)))
    [event] = Engine(scheduler, Mute()).step()
    assert (event.token_id, event.finish_reason) == (None, reason)
    assert scheduler.stats.num_held_blocks == 0
