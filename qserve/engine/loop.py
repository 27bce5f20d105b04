"""The engine in its own thread, and the bridge to any number of asyncio event loops.

    asyncio thread(s)                                      engine thread
    submit, abort, stop  ----- _inbox (blocks if idle) -----> obey, step, obey, step, ...
    EventStream <----- one call_soon_threadsafe a step ------ deliver

The scheduler belongs to the engine thread; nobody else changes it. Knows no text and no HTTP.
"""

import asyncio
import logging
import queue
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Self, TypeAlias

from qserve.engine.engine import Engine
from qserve.engine.request import Request, TokenEvent
from qserve.engine.stats import Stats
from qserve.errors import EngineDead, EngineError, NotReady, QueueFull

logger = logging.getLogger(__name__)

Command: TypeAlias = Request | str | None  # run this request; abort the request of this id; stop
Item: TypeAlias = TokenEvent | EngineError


class _Mailbox:
    """Where one request's events go. Bounded by nature: a request has at most one event a token and a chunk.

    An asyncio.Queue with one reader and no limit; it takes a third of a queue's time, and that is spent every token.
    """

    __slots__ = ("_items", "_reader", "event_loop", "num_prompt_tokens", "request_id")

    def __init__(self, request: Request, event_loop: asyncio.AbstractEventLoop) -> None:
        self.request_id = request.id
        self.num_prompt_tokens = request.num_prompt_tokens
        self.event_loop = event_loop
        self._items: deque[Item] = deque()
        self._reader: asyncio.Future[None] | None = None

    def put(self, item: Item) -> None:
        self._items.append(item)
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    async def get(self) -> Item:
        while not self._items:
            self._reader = self.event_loop.create_future()
            await self._reader
        return self._items.popleft()


class EventStream(AsyncIterator[TokenEvent]):
    """The events of one request; the last one has a finish reason. Read it in the event loop that submitted.

    Whoever stops reading early ends the request: by `aclose` (`contextlib.aclosing` calls it), by being cancelled
    while it waits, or by dropping the stream.
    """

    def __init__(self, mailbox: _Mailbox, *, abort: Callable[[str], None]) -> None:
        self._request_id = mailbox.request_id
        self._mailbox = mailbox
        self._abort = abort
        self._is_finished = False

    async def __anext__(self) -> TokenEvent:
        if self._is_finished:
            raise StopAsyncIteration
        try:
            item = await self._mailbox.get()
        except asyncio.CancelledError:
            self._close()
            raise
        if isinstance(item, EngineError):
            self._is_finished = True
            raise item
        self._is_finished = item.finish_reason is not None
        return item

    async def aclose(self) -> None:
        """End the request if it has not ended: its blocks are free before the next step."""
        self._close()

    def __del__(self) -> None:
        # May run in any thread at any moment, so it must not take a lock; an inbox's put is made for that.
        self._close()

    def _close(self) -> None:
        if not self._is_finished:
            self._is_finished = True
            self._abort(self._request_id)


class EngineLoop:
    """Steps an engine in a thread of its own for as long as there is work; costs nothing when there is none."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._inbox: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._mailboxes: dict[str, _Mailbox] = {}  # of unfinished requests
        self._changed = threading.Condition()  # guards the mailboxes and the two states below
        self._is_draining = False
        self._ending: str | None = None  # why the thread has ended
        self._thread = threading.Thread(target=self._main, name="qserve-engine", daemon=True)

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive() and self._ending is None

    @property
    def is_draining(self) -> bool:
        return self._is_draining

    @property
    def stats(self) -> Stats:
        return self._engine.scheduler.stats

    def start(self) -> Self:
        self._thread.start()
        return self

    def stop(self) -> None:
        """End the thread after the step under way; requests that still run end with ABORT."""
        if self._thread.is_alive():
            self._inbox.put(None)
            self._thread.join()

    def drain(self, timeout: float) -> bool:
        """Admit nothing more and wait, blocking, until what runs is finished; False if the time was too short.

        In a coroutine: `await asyncio.to_thread(loop.drain, timeout)`.
        """
        with self._changed:
            self._is_draining = True
            return self._changed.wait_for(lambda: not self._mailboxes, timeout)

    def submit(self, request: Request) -> EventStream:
        """Start a request; call it where an event loop runs. Raises at once what can be known at once:

        ContextLengthExceeded or InvalidRequest for a request that can never run, QueueFull, NotReady while draining,
        EngineDead.
        """
        self._engine.scheduler.check_fits(request)
        mailbox = _Mailbox(request, asyncio.get_running_loop())
        with self._changed:
            self._check_open()
            self.check_room()
            self._check_room_for_tokens(request)
            assert request.id not in self._mailboxes, f"two live requests are named {request.id}"
            self._mailboxes[request.id] = mailbox
        self._inbox.put(request)
        return EventStream(mailbox, abort=self.abort)

    def check_room(self) -> None:
        """Raise QueueFull if not even one more request is taken; any thread may ask, before it prepares a request."""
        config = self._engine.scheduler.config
        max_requests = config.max_running + config.max_queued
        if len(self._mailboxes) >= max_requests:
            message = f"{max_requests} requests are unfinished, as many as are taken: try again later"
            raise QueueFull(message, reason="requests")

    def abort(self, request_id: str) -> None:
        """End a request before the next step; its stream, if anyone reads it, ends with ABORT. Any thread may call."""
        self._inbox.put(request_id)

    def _check_open(self) -> None:
        if not self.is_alive:
            raise EngineDead(self._ending or "the engine was not started")
        if self._is_draining:
            raise NotReady(
                "the server is about to end and takes no new requests: send it elsewhere, or try again later"
            )

    def _check_room_for_tokens(self, request: Request) -> None:
        config = self._engine.scheduler.config
        num_tokens = sum(mailbox.num_prompt_tokens for mailbox in self._mailboxes.values())
        if num_tokens and num_tokens + request.num_prompt_tokens > config.max_queued_tokens:
            raise QueueFull(
                f"unfinished requests hold {num_tokens} prompt tokens and this one has {request.num_prompt_tokens}, "
                f"but {config.max_queued_tokens} are taken: try again later",
                reason="tokens",
            )

    def _main(self) -> None:
        ending = "the engine was stopped"
        try:
            while self._obey():
                self._deliver(self._engine.step())
            self._deliver(self._engine.scheduler.abort_all())
        except Exception as error:
            logger.exception("the engine thread has ended")
            ending = f"the engine thread has ended with {type(error).__name__}; the server's log tells more"
        finally:
            self._end(ending)

    def _obey(self) -> bool:
        """Do what the inbox says, waiting for it while there is no work. False when told to stop."""
        scheduler = self._engine.scheduler
        while True:
            try:
                command = self._inbox.get(block=not scheduler.has_work)
            except queue.Empty:
                return True
            match command:
                case Request():
                    scheduler.add(command)
                case str():
                    event = scheduler.abort(command)
                    self._deliver([event] if event else [])
                case None:
                    return False

    def _deliver(self, events: list[TokenEvent]) -> None:
        """Send events to their streams, with one wake-up of each event loop."""
        posts: dict[asyncio.AbstractEventLoop, list[tuple[_Mailbox, Item]]] = {}
        for event in events:
            mailbox = self._mailboxes[event.request_id]
            posts.setdefault(mailbox.event_loop, []).append((mailbox, event))
        # First the place, then the news: who hears that a request has ended may submit the next at once.
        self._forget([event.request_id for event in events if event.finish_reason])
        for event_loop, batch in posts.items():
            self._post(event_loop, batch)

    def _post(self, event_loop: asyncio.AbstractEventLoop, batch: list[tuple[_Mailbox, Item]]) -> None:
        try:
            event_loop.call_soon_threadsafe(_put, batch)
        except RuntimeError:  # the event loop was closed, and its readers with it
            for mailbox, _ in batch:
                self.abort(mailbox.request_id)

    def _forget(self, request_ids: list[str]) -> None:
        if not request_ids:
            return
        with self._changed:
            for request_id in request_ids:
                del self._mailboxes[request_id]
            self._changed.notify_all()

    def _end(self, ending: str) -> None:
        """The thread's last act: whoever still waits is told, and nobody new can come in."""
        with self._changed:
            self._ending = ending
            left, self._mailboxes = self._mailboxes, {}
            self._changed.notify_all()
        for mailbox in left.values():
            self._post(mailbox.event_loop, [(mailbox, EngineDead(ending))])


def _put(batch: list[tuple[_Mailbox, Item]]) -> None:
    for mailbox, item in batch:
        mailbox.put(item)
