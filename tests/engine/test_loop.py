"""The engine thread and real event loops: streams, readers that go away, the ends of the thread."""

import asyncio
import gc
import logging
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager
from typing import Any

import pytest

from qserve.config import EngineConfig
from qserve.engine.engine import Engine
from qserve.engine.loop import EngineLoop, EventStream
from qserve.engine.request import Chunk, FinishReason, Request, Sampled, SamplingParams, TokenEvent
from qserve.engine.scheduler import Scheduler
from qserve.errors import ContextLengthExceeded, EngineDead, NotReady, QueueFull
from tests.engine.fake_device import FakeDevice, expected_tokens, make_request

NUM_BLOCKS, BLOCK_SIZE = 1024, 4
PATIENCE = 20.0  # seconds; nothing here waits so long unless it is broken
ENDLESS = 4000  # tokens: eight seconds, however late the reader comes that ends them


class PacedDevice(FakeDevice):
    """Takes as long for a step as a small model."""

    def run(self, chunks: list[Chunk]) -> list[Sampled]:
        time.sleep(0.002)
        return super().run(chunks)


class GatedDevice(FakeDevice):
    """Computes a step only when it is let."""

    def __init__(self) -> None:
        super().__init__(NUM_BLOCKS, BLOCK_SIZE)
        self.gate = threading.Semaphore(0)

    def run(self, chunks: list[Chunk]) -> list[Sampled]:
        assert self.gate.acquire(timeout=PATIENCE)
        return super().run(chunks)


class BreakingDevice(FakeDevice):
    """Breaks in its third step."""

    def run(self, chunks: list[Chunk]) -> list[Sampled]:
        if len(self.steps) == 2:
            raise ZeroDivisionError("the device broke")
        return super().run(chunks)


class CountingEventLoop(asyncio.SelectorEventLoop):
    """Counts how often another thread wakes it."""

    num_wake_ups = 0

    def call_soon_threadsafe(self, callback: Callable[..., object], *args: Any) -> asyncio.Handle:  # type: ignore[override]
        self.num_wake_ups += 1
        return super().call_soon_threadsafe(callback, *args)


@contextmanager
def running(device: FakeDevice | None = None, **options: Any) -> Iterator[EngineLoop]:
    config = EngineConfig(block_size=BLOCK_SIZE, **{"max_running": 8, "max_step_tokens": 32, **options})
    scheduler = Scheduler(config, NUM_BLOCKS)
    loop = EngineLoop(Engine(scheduler, device or PacedDevice(NUM_BLOCKS, BLOCK_SIZE))).start()
    try:
        yield loop
    finally:
        loop.stop()
        assert not loop.is_alive
        scheduler.check()


async def collect(stream: AsyncIterator[TokenEvent]) -> list[int]:
    return [event.token_id async for event in stream if event.token_id is not None]


async def until(is_reached: Callable[[], bool]) -> None:
    """What the other thread does soon; the tests, unlike the engine, may poll."""
    deadline = time.monotonic() + PATIENCE
    while not is_reached():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.001)


def is_empty(loop: EngineLoop) -> bool:
    stats = loop.stats
    return not (stats.num_running or stats.num_waiting or stats.num_held_blocks)


def prompt(index: int) -> list[int]:
    return [1, 2, 3, 4, 5, index % 5, index % 3]


def test_many_streams_at_once_each_get_the_text_of_the_request_alone() -> None:
    async def main(loop: EngineLoop) -> None:
        requests = [make_request(str(index), prompt(index), max_tokens=1 + index % 20) for index in range(60)]
        texts = await asyncio.gather(*(collect(loop.submit(request)) for request in requests))
        for index, request in enumerate(requests):
            assert texts[index] == expected_tokens(prompt(index), request.params)[0]
        assert is_empty(loop)
        assert loop.stats.num_finished == 60

    with running() as loop:
        asyncio.run(main(loop))


def test_half_hang_up_and_the_others_do_not_notice() -> None:
    async def hang_up(stream: EventStream, *, after: int) -> None:
        async with aclosing(stream):
            num_events = 0
            async for _ in stream:
                num_events += 1
                if num_events == after:
                    return

    async def main(loop: EngineLoop) -> None:
        for index in range(0, 32, 2):
            stay = make_request(f"stay {index}", prompt(index), max_tokens=30)
            leave = make_request(f"leave {index}", prompt(index), max_tokens=ENDLESS)
            leaving = asyncio.create_task(hang_up(loop.submit(leave), after=1 + index % 7))
            text = await collect(loop.submit(stay))
            assert text == expected_tokens(prompt(index), stay.params)[0]
            await leaving
        await until(lambda: is_empty(loop))
        assert loop.stats.num_aborted == 16

    with running() as loop:
        asyncio.run(main(loop))


async def by_closing(stream: EventStream) -> None:
    await anext(stream)
    await stream.aclose()
    with pytest.raises(StopAsyncIteration):
        await anext(stream)


async def by_cancelling(stream: EventStream) -> None:
    reader = asyncio.create_task(collect(stream))
    await asyncio.sleep(0.01)
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader


async def by_timeout(stream: EventStream) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await collect(stream)


@pytest.mark.parametrize("leave", [by_closing, by_cancelling, by_timeout])
def test_a_reader_that_goes_away_ends_its_request(leave: Callable[[EventStream], Awaitable[None]]) -> None:
    async def main() -> None:
        stream = loop.submit(make_request("a", [1, 2, 3], max_tokens=ENDLESS))
        await leave(stream)
        await until(lambda: loop.stats.num_aborted == 1)
        assert is_empty(loop)
        del stream  # not sooner: it was not the dropping that ended the request

    with running() as loop:
        asyncio.run(main())


@pytest.mark.parametrize("is_read", [True, False])
def test_a_stream_that_is_dropped_ends_its_request(is_read: bool) -> None:
    async def main() -> None:
        stream = loop.submit(make_request("a", [1, 2, 3], max_tokens=ENDLESS))
        if is_read:
            await anext(stream)
        del stream
        gc.collect()
        await until(lambda: loop.stats.num_aborted == 1)
        assert is_empty(loop)

    with running() as loop:
        asyncio.run(main())


def test_blocks_are_free_before_the_next_step() -> None:
    async def main() -> None:
        stay = loop.submit(make_request("stay", [1, 2, 3], max_tokens=4))
        leave = loop.submit(make_request("leave", [4] * 60, max_tokens=4))
        device.gate.release()
        await anext(stay)
        await leave.aclose()  # in the middle of its prompt, while the second step waits at the gate
        device.gate.release()
        await anext(stay)
        device.gate.release(2)
        await collect(stay)
        assert [[name for name, _, _ in step] for step in device.steps[2:]] == [["stay"]] * 2

    device = GatedDevice()
    with running(device) as loop:
        asyncio.run(main())


def test_abort_by_name_tells_the_reader() -> None:
    async def main() -> None:
        stream = loop.submit(make_request("a", [1, 2, 3], max_tokens=4))
        device.gate.release()
        await anext(stream)
        loop.abort("a")  # while the second step waits at the gate
        loop.abort("nobody")
        device.gate.release()
        events = [event async for event in stream]
        assert events[-1].finish_reason == FinishReason.ABORT

    device = GatedDevice()
    with running(device) as loop:
        asyncio.run(main())


def test_a_slow_reader_holds_nobody_up_and_misses_nothing() -> None:
    async def main() -> None:
        slow = make_request("slow", [1, 2, 3], max_tokens=50)
        stream = loop.submit(slow)
        await collect(loop.submit(make_request("quick", [4, 5, 6], max_tokens=60)))
        await until(lambda: is_empty(loop))
        assert await collect(stream) == expected_tokens([1, 2, 3], slow.params)[0]

    with running() as loop:
        asyncio.run(main())


def test_two_event_loops_share_an_engine() -> None:
    def serve(first: int) -> None:
        async def main() -> None:
            requests = [make_request(f"{first + i}", prompt(i), max_tokens=25) for i in range(12)]
            texts = await asyncio.gather(*(collect(loop.submit(request)) for request in requests))
            assert texts == [expected_tokens(prompt(i), requests[i].params)[0] for i in range(12)]
            done.append(first)

        asyncio.run(main())

    done: list[int] = []
    with running() as loop:
        threads = [threading.Thread(target=serve, args=(first,)) for first in (0, 100)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(done) == [0, 100]


def test_an_event_loop_that_closes_takes_its_requests_with_it() -> None:
    kept: list[EventStream] = []

    async def leave() -> None:
        for name in ("a", "b"):
            kept.append(loop.submit(make_request(name, [1, 2, 3], max_tokens=ENDLESS)))
        await anext(kept[0])

    async def stay() -> None:
        request = make_request("c", [1, 2, 3], max_tokens=20)
        assert await collect(loop.submit(request)) == expected_tokens([1, 2, 3], request.params)[0]
        await until(lambda: is_empty(loop))

    with running() as loop:
        asyncio.run(leave())
        asyncio.run(stay())
        assert loop.stats.num_aborted == 2


def test_a_dead_device_ends_every_stream_and_is_reported_once(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        streams = [loop.submit(make_request(str(index), prompt(index), max_tokens=20)) for index in range(12)]
        results = await asyncio.gather(*map(collect, streams), return_exceptions=True)
        assert [type(result) for result in results] == [EngineDead] * 12
        with pytest.raises(StopAsyncIteration):
            await anext(streams[0])
        assert not loop.is_alive
        with pytest.raises(EngineDead, match="ended with ZeroDivisionError"):
            loop.submit(make_request("late", [1]))

    with caplog.at_level(logging.ERROR), running(BreakingDevice(NUM_BLOCKS, BLOCK_SIZE)) as loop:
        asyncio.run(main())
        assert loop.drain(PATIENCE)
    assert len(caplog.records) == 1
    assert "the device broke" in caplog.text


def test_drain_finishes_what_runs_and_admits_nothing() -> None:
    async def main() -> None:
        request = make_request("a", [1, 2, 3], max_tokens=30)
        stream = loop.submit(request)
        draining = asyncio.create_task(asyncio.to_thread(loop.drain, PATIENCE))
        await until(lambda: loop.is_draining)
        with pytest.raises(NotReady, match="takes no new requests"):
            loop.submit(make_request("late", [1]))
        device.gate.release(30)
        assert await draining
        assert await collect(stream) == expected_tokens([1, 2, 3], request.params)[0]

    device = GatedDevice()
    with running(device) as loop:
        asyncio.run(main())


def test_drain_gives_up_and_stop_aborts_what_is_left() -> None:
    async def main() -> None:
        streams = [loop.submit(make_request(name, [1, 2, 3], max_tokens=ENDLESS)) for name in "ab"]
        assert not await asyncio.to_thread(loop.drain, 0.01)
        device.gate.release(ENDLESS)
        await asyncio.to_thread(loop.stop)
        for stream in streams:
            assert [event async for event in stream][-1].finish_reason == FinishReason.ABORT
        assert is_empty(loop)
        with pytest.raises(EngineDead, match="was stopped"):
            loop.submit(make_request("late", [1]))

    device = GatedDevice()
    with running(device) as loop:
        asyncio.run(main())


def test_what_cannot_run_is_refused_at_once() -> None:
    async def main() -> None:
        with pytest.raises(ContextLengthExceeded):
            loop.submit(make_request("long", [1] * (NUM_BLOCKS * BLOCK_SIZE)))
        streams = [loop.submit(make_request(str(index), [1] * 10)) for index in range(3)]
        with pytest.raises(QueueFull, match="3 requests are unfinished"):
            loop.submit(make_request("many", [1]))
        device.gate.release(99)
        await asyncio.gather(*map(collect, streams))
        assert loop.drain(0)

    device = GatedDevice()
    with running(device, max_running=2, max_queued=1) as loop:
        asyncio.run(main())


def test_the_queue_is_bounded_by_tokens_too() -> None:
    async def main() -> None:
        streams = [loop.submit(make_request("alone", [1] * 150))]  # more than the bound, but nobody else is there
        with pytest.raises(QueueFull, match="hold 150 prompt tokens and this one has 7, but 100 are taken"):
            loop.submit(make_request("more", [1] * 7))
        device.gate.release(99)
        await collect(streams[0])
        await collect(loop.submit(make_request("again", [1] * 7)))

    device = GatedDevice()
    with running(device, max_queued_tokens=100) as loop:
        asyncio.run(main())


def test_events_of_a_step_come_with_one_wake_up() -> None:
    async def main() -> None:
        streams = [loop.submit(make_request(str(index), prompt(index), max_tokens=5)) for index in range(4)]
        device.gate.release(99)
        await asyncio.gather(*map(collect, streams))

    device = GatedDevice()
    event_loop = CountingEventLoop()
    with running(device) as loop, asyncio.Runner(loop_factory=lambda: event_loop) as runner:
        runner.run(main())
    assert event_loop.num_wake_ups <= len(device.steps)


def test_an_engine_that_was_not_started_takes_nothing_and_stops_quietly() -> None:
    async def main() -> None:
        with pytest.raises(EngineDead, match="not started"):
            loop.submit(make_request("a", [1]))

    scheduler = Scheduler(EngineConfig(), NUM_BLOCKS)
    loop = EngineLoop(Engine(scheduler, FakeDevice(NUM_BLOCKS, 16)))
    asyncio.run(main())
    loop.stop()


def test_a_request_with_no_tokens_to_make_ends_its_stream() -> None:
    async def main() -> None:
        request = Request("a", [1, 2, 3], SamplingParams(max_tokens=0))
        events = [event async for event in loop.submit(request)]
        assert [(event.token_id, event.finish_reason) for event in events] == [(None, FinishReason.LENGTH)]

    with running() as loop:
        asyncio.run(main())
