"""Whatever arrives, whenever, in however small a cache: every request gets the text that it gets alone."""

from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from qserve.config import EngineConfig
from qserve.engine.engine import Engine
from qserve.engine.request import FinishReason, Request, SamplingParams, TokenEvent
from qserve.engine.scheduler import Scheduler
from qserve.errors import ContextLengthExceeded
from tests.engine.fake_device import VOCABULARY_SIZE, FakeDevice, expected_tokens, prompt_logprob

MAX_STEPS = 3000


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    prompt_ids: list[int]
    params: SamplingParams
    priority: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    pass


@dataclass(frozen=True, slots=True, kw_only=True)
class Abort:
    index: int


token_ids = st.integers(0, VOCABULARY_SIZE - 1)
# Few distinct pieces, so that prefixes are shared often, end at every length, and go on in different ways.
pieces = st.sampled_from([[7] * 4, [7] * 5, [7, 7, 8, 8], [8, 7, 7, 8], [7], [8], [9, 9]])
prompts = st.lists(pieces, min_size=1, max_size=5).map(lambda chosen: [token for piece in chosen for token in piece])
sampling_params = st.builds(
    SamplingParams,
    max_tokens=st.integers(0, 12),
    min_tokens=st.integers(0, 4),
    stop_token_ids=st.frozensets(token_ids, max_size=2),
    prompt_logprobs=st.sampled_from([None, None, None, 0]),
)
arrivals = st.builds(Arrival, prompt_ids=prompts, params=sampling_params, priority=st.integers(-1, 1))
others = st.sampled_from([[Step()], [Step()], [Step(), Step()], [Step()] * 5, [], []])
aborts = st.integers(0, 60).map(lambda index: [Abort(index=index)] if index < 15 else [])
turns = st.tuples(arrivals, others, aborts).map(lambda turn: [turn[0], *turn[1], *turn[2]])
scripts = st.lists(turns, min_size=4, max_size=16).map(lambda chosen: [command for turn in chosen for command in turn])
max_running = st.integers(1, 6)
cache_sizes = st.integers(16, 48)  # in positions: from one request at a time to room for several


@st.composite
def configs(draw: st.DrawFn) -> EngineConfig:
    running = draw(max_running)
    return EngineConfig(
        max_running=running,
        max_step_tokens=running + draw(st.integers(0, 8)),
        block_size=draw(st.integers(1, 4)),
        prefix_caching=draw(st.sampled_from([True, True, False])),
        speculative_tokens=draw(st.sampled_from([0, 1, 2, 4, 15])),
    )


@dataclass
class World:
    """An engine, all it was told, and all it said."""

    engine: Engine
    device: FakeDevice
    num_slots: int
    told: dict[str, Arrival] = field(default_factory=dict)
    requests: dict[str, Request] = field(default_factory=dict)
    heard: dict[str, list[TokenEvent]] = field(default_factory=dict)

    def obey(self, command: Arrival | Step | Abort) -> None:
        match command:
            case Arrival():
                self.add(command)
            case Abort():
                self.hear([self.engine.scheduler.abort(str(command.index))])
            case Step():
                if self.engine.scheduler.has_work:
                    self.hear(list(self.engine.step()))
        self.engine.scheduler.check()

    def add(self, arrival: Arrival) -> None:
        request_id = str(len(self.told))
        request = Request(request_id, arrival.prompt_ids, arrival.params, priority=arrival.priority)
        num_stored = len(arrival.prompt_ids) + max(arrival.params.max_tokens - 1, 0)
        try:
            self.engine.scheduler.add(request)
        except ContextLengthExceeded:
            assert num_stored > self.num_slots
            return
        assert num_stored <= self.num_slots
        self.told[request_id] = arrival
        self.requests[request_id] = request
        self.heard[request_id] = []

    def hear(self, events: list[TokenEvent | None]) -> None:
        for event in events:
            if event is not None:
                heard = self.heard[event.request_id]
                assert not heard or heard[-1].finish_reason is None, "news of a request that had ended"
                heard.append(event)

    def finish(self) -> None:
        for _ in range(MAX_STEPS):
            if not self.engine.scheduler.has_work:
                return
            self.obey(Step())
        raise AssertionError("the engine does not come to an end")

    def check_heard(self, request_id: str) -> None:
        arrival, events = self.told[request_id], self.heard[request_id]
        tokens, reason = expected_tokens(arrival.prompt_ids, arrival.params)
        heard_tokens = [event.token_id for event in events if event.token_id is not None]
        scores = [score for event in events for score in event.prompt_logprobs]
        expected_scores = [prompt_logprob(arrival.prompt_ids, p) for p in range(1, len(arrival.prompt_ids))]
        if arrival.params.prompt_logprobs is None:
            expected_scores = []
        if events[-1].finish_reason == FinishReason.ABORT:
            assert heard_tokens == tokens[: len(heard_tokens)]
            assert scores == expected_scores[: len(scores)]
            return
        assert (heard_tokens, events[-1].finish_reason) == (tokens, reason)
        assert self.requests[request_id].token_ids == arrival.prompt_ids + tokens
        assert scores == expected_scores


def make_world(config: EngineConfig, num_slots: int, *, is_batched: bool) -> World:
    num_blocks = num_slots // config.block_size
    device = FakeDevice(num_blocks, config.block_size, is_batched=is_batched)
    engine = Engine(Scheduler(config, num_blocks), device)
    return World(engine=engine, device=device, num_slots=num_blocks * config.block_size)


def play(config: EngineConfig, num_slots: int, script: list[Arrival | Step | Abort], *, is_batched: bool) -> World:
    world = make_world(config, num_slots, is_batched=is_batched)
    for command in script:
        world.obey(command)
    world.finish()
    return world


@settings(max_examples=400, deadline=None, derandomize=True)
@given(configs(), cache_sizes, scripts, st.booleans())
def test_every_schedule_gives_the_text_of_the_request_alone(
    config: EngineConfig, num_slots: int, script: list[Arrival | Step | Abort], is_batched: bool
) -> None:
    world = play(config, num_slots, script, is_batched=is_batched)
    for request_id in world.told:
        world.check_heard(request_id)
    stats = world.engine.scheduler.stats
    assert (stats.num_running, stats.num_waiting, stats.num_held_blocks) == (0, 0, 0)
    assert stats.num_finished + stats.num_aborted == len(world.told)
    assert stats.num_steps == len(world.device.steps)
    for step in world.device.steps:
        assert 0 < sum(end - start for _, start, end in step) <= config.max_step_tokens
        assert 0 < len(step) <= config.max_running
        assert all(start < end for _, start, end in step)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(configs(), cache_sizes, scripts)
def test_the_same_calls_give_the_same_chunks(
    config: EngineConfig, num_slots: int, script: list[Arrival | Step | Abort]
) -> None:
    first = play(config, num_slots, script, is_batched=True)
    second = play(config, num_slots, script, is_batched=True)
    assert first.device.steps == second.device.steps


@settings(max_examples=100, deadline=None, derandomize=True)
@given(configs(), cache_sizes, st.lists(arrivals, min_size=1, max_size=12))
def test_who_decodes_takes_part_in_every_step_unless_preempted(
    config: EngineConfig, num_slots: int, script: list[Arrival | Step | Abort]
) -> None:
    world = make_world(config, num_slots, is_batched=True)
    for command in script:
        world.obey(command)
    while world.engine.scheduler.has_work:
        decoding = {
            name: request.num_preemptions
            for name, request in world.requests.items()
            if request.block_ids and request.num_output_tokens
        }
        world.obey(Step())
        taking_part = {name for name, _, _ in world.device.steps[-1]}
        for name, num_preemptions in decoding.items():
            assert name in taking_part or world.requests[name].num_preemptions > num_preemptions
