r"""Server-sent events as OpenAI's clients read them.

Frames end in "\n\n" (some clients split on exactly that), hold ASCII alone, and no comment stands between them
unless the operator asks for pings. What is the same in every frame of a choice is written once; a frame then costs the
text's own quoting and a join.
"""

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, aclosing, contextmanager, suppress
from dataclasses import dataclass

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from qserve.api.errors import error_frame
from qserve.api.reply import unless_gone
from qserve.api.tools import Reply
from qserve.errors import QserveError
from qserve.generation import ScoredToken, TextDelta
from qserve.llm import Generation, merge
from qserve.text.reasoning import ReasoningCounter

_PING = b": ping\n\n"
_DONE = b"data: [DONE]\n\n"
_HEADERS = {"cache-control": "no-store", "connection": "keep-alive", "x-accel-buffering": "no"}
# Compact, and ASCII: a raw U+2028 would break the line readers of some clients. Made once, for it is used every token.
to_json = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode


class EventStream(Response):
    """A response of frames that are already encoded. However it ends, what it holds is let go.

    Between two frames nothing is made, watched or cancelled: among 32 streams a frame costs 20 µs, half of them the
    system's, and 33 by way of sse-starlette's response.
    """

    media_type = "text/event-stream"

    def __init__(
        self, frames: AsyncGenerator[bytes], held: ExitStack, headers: Mapping[str, str], *, ping_seconds: float
    ) -> None:
        super().__init__(headers={**_HEADERS, **headers})
        del self.headers["content-length"]
        self._frames = frames
        self._held = held
        self._ping_seconds = ping_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._held, suppress(ClientDisconnect):
            await unless_gone(receive, self._send(send))

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        with self._pinging(send):
            async with aclosing(self._frames) as frames:
                async for frame in frames:
                    await send({"type": "http.response.body", "body": frame, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    @contextmanager
    def _pinging(self, send: Send) -> Iterator[None]:
        pinging = asyncio.ensure_future(self._ping(send)) if self._ping_seconds else None
        try:
            yield
        finally:
            if pinging is not None:
                pinging.cancel()

    async def _ping(self, send: Send) -> None:
        while True:
            await asyncio.sleep(self._ping_seconds)
            await send({"type": "http.response.body", "body": _PING, "more_body": True})


@dataclass(frozen=True, slots=True, kw_only=True)
class Envelope:
    """What all frames and the whole answer have in common."""

    id: str
    kind: str  # OpenAI calls it object
    created: int
    model: str


class UsageCounter:
    """Tokens so far over all choices of an answer; a prompt counts once, however many choices it has."""

    def __init__(self, prompt_lengths: Sequence[int], reasoning: Sequence[ReasoningCounter | None]) -> None:
        """`reasoning` has an entry for each choice, None where reasoning is not told apart."""
        self._reasoning = reasoning
        self._num_prompt_tokens = sum(prompt_lengths)
        self._num_output_tokens = [0] * len(reasoning)
        self._num_cached_tokens = [0] * len(prompt_lengths)
        self._choices_per_prompt = len(reasoning) // len(prompt_lengths)

    def take(self, index: int, delta: TextDelta) -> None:
        self._num_output_tokens[index] = delta.num_output_tokens
        if (counter := self._reasoning[index]) is not None:
            counter.take(delta.token_ids)
        if index % self._choices_per_prompt == 0:
            self._num_cached_tokens[index // self._choices_per_prompt] = delta.num_cached_tokens

    def report(self) -> dict[str, object]:
        completion = sum(self._num_output_tokens)
        usage: dict[str, object] = {
            "prompt_tokens": self._num_prompt_tokens,
            "completion_tokens": completion,
            "total_tokens": self._num_prompt_tokens + completion,
            "prompt_tokens_details": {"cached_tokens": sum(self._num_cached_tokens)},
        }
        counted = [counter.num_reasoning_tokens for counter in self._reasoning if counter is not None]
        return {**usage, "completion_tokens_details": {"reasoning_tokens": sum(counted)}} if counted else usage


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamForm:
    """How one answer is streamed: completions or chat, and what each frame tells."""

    envelope: Envelope
    replies: Sequence[Reply] | None  # of a chat, one a choice
    write_logprobs: Callable[[Sequence[ScoredToken]], object]  # None where none were asked for
    with_usage: bool
    with_running_usage: bool
    with_token_ids: bool


async def write_frames(
    generations: Sequence[Generation], form: StreamForm, usage: UsageCounter
) -> AsyncGenerator[bytes]:
    """Every frame of an answer, the closing one always among them."""
    writer = _FrameWriter(form, num_choices=len(generations))
    try:
        async with aclosing(merge(generations)) as deltas:
            async for index, delta in deltas:
                usage.take(index, delta)
                if frame := writer.choice(index, delta, usage):
                    yield frame
        if form.with_usage:
            yield writer.usage(usage)
    except QserveError as error:
        yield error_frame(error)
    yield _DONE


class _FrameWriter:
    def __init__(self, form: StreamForm, *, num_choices: int) -> None:
        envelope = form.envelope
        head = {"id": envelope.id, "object": envelope.kind, "created": envelope.created, "model": envelope.model}
        self._form = form
        self._head = "data: " + to_json(head)[:-1] + ',"choices":['
        self._is_first = [True] * num_choices

    def choice(self, index: int, delta: TextDelta, usage: UsageCounter) -> bytes:
        """The frame of a delta; empty where it brings nothing that the client could be told yet."""
        form = self._form
        # An echoed prompt is scored with the first text.
        logprobs = to_json(form.write_logprobs(delta.prompt_logprobs + delta.logprobs))
        finish_reason, text = self._text(index, delta)
        is_empty = not text and finish_reason is None and logprobs == "null"
        if is_empty and not (form.with_token_ids or form.with_running_usage):
            return b""
        parts = [self._head, f'{{"index":{index},', text or '"delta":{}', f',"logprobs":{logprobs},"finish_reason":']
        parts.append("null" if finish_reason is None else f'"{finish_reason}"')
        if finish_reason is not None:
            parts.append(f',"stop_reason":{to_json(delta.stop_reason)}')
        if form.with_token_ids:
            parts.append(f',"token_ids":{to_json(delta.token_ids)}')
        parts.append("}]")
        if form.with_running_usage:
            parts.append(f',"usage":{to_json(usage.report())}')
        elif form.with_usage:
            parts.append(',"usage":null')
        parts.append("}\n\n")
        return "".join(parts).encode()

    def usage(self, usage: UsageCounter) -> bytes:
        """The last frame before the end: no choices, only what was used."""
        return f'{self._head}],"usage":{to_json(usage.report())}}}\n\n'.encode()

    def _text(self, index: int, delta: TextDelta) -> tuple[str | None, str]:
        """The finish reason, and what the choice says; the latter is empty for a chat that says nothing new."""
        if self._form.replies is None:
            return delta.finish_reason, f'"text":{to_json(delta.text)}'
        reply = self._form.replies[index]
        said = reply.delta(delta.text, is_end=delta.finish_reason is not None)
        finish_reason = reply.finish_reason(delta.finish_reason)
        if self._is_first[index] and (said or finish_reason is not None):
            # The role comes once, with the first text.
            self._is_first[index] = False
            said = {"role": "assistant", "content": None if "tool_calls" in said else "", **said}
        return finish_reason, f'"delta":{to_json(said)}' if said else ""
