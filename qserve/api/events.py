r"""Answers as events with names, which newer protocols use in place of OpenAI's nameless chunks.

A frame is "event: NAME\ndata: JSON\n\n". The last event says how it ended; no [DONE] follows.
"""

from collections.abc import AsyncGenerator, Iterable, Sequence
from typing import Any, Protocol

from qserve.api.stream import to_json
from qserve.errors import QserveError
from qserve.generation import TextDelta
from qserve.llm import Generation

Event = dict[str, Any]  # its type is its name


class Answer(Protocol):
    """One answer in the words of its protocol."""

    def begin(self) -> Iterable[Event]: ...
    def take(self, delta: TextDelta) -> Iterable[Event]: ...
    def fail(self, error: QserveError) -> Iterable[Event]: ...
    def whole(self) -> dict[str, Any]: ...


class EventWriter:
    """Writes an answer of one generation, as events or whole."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer

    async def stream(self, generations: Sequence[Generation]) -> AsyncGenerator[bytes]:
        (generation,) = generations
        yield _frames(self._answer.begin())
        try:
            async for delta in generation:
                if frames := _frames(self._answer.take(delta)):
                    yield frames
        except QserveError as error:
            yield _frames(self._answer.fail(error))

    async def collect(self, generations: Sequence[Generation]) -> dict[str, Any]:
        (generation,) = generations
        async for delta in generation:
            for _ in self._answer.take(delta):
                pass  # what was told event by event stands in the whole
        return self._answer.whole()


def _frames(events: Iterable[Event]) -> bytes:
    return "".join(f"event: {event['type']}\ndata: {to_json(event)}\n\n" for event in events).encode()
