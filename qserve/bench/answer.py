"""What came back for one request: when each chunk came, how many tokens it was, and what was wrong with it.

Reads the bytes of an exchange as OpenAI's stream. A chunk counts when it has a choice; tokens are those that `usage`
tells, for a chunk may hold none or several.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from clients.exchange import Exchange

_MAX_ECHO = 200  # characters of a server's message
_DONE = b"[DONE]"

NO_DONE = "streams end without [DONE]"
NO_USAGE = "no usage, so tokens are not known"
NO_FINISH_REASON = "no finish_reason"


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """Times in seconds; `started_at` and `chunk_times` of `time.perf_counter`."""

    started_at: float
    chunk_times: tuple[float, ...] = ()  # of chunks with a choice
    num_prompt_tokens: int | None = None
    num_output_tokens: int | None = None
    num_cached_tokens: int = 0
    failure: str = ""  # why it does not count
    defects: tuple[str, ...] = ()  # it counts, and yet a strict client would complain

    @property
    def ttft(self) -> float:
        """To the first chunk with a choice."""
        return self.chunk_times[0] - self.started_at

    @property
    def e2el(self) -> float:
        """To the last chunk with a choice, which is not yet [DONE]."""
        return self.chunk_times[-1] - self.started_at

    @property
    def itls(self) -> list[float]:
        """The gaps between chunks: one a chunk, not one a token."""
        return [later - earlier for earlier, later in pairwise(self.chunk_times)]

    @property
    def tpot(self) -> float | None:
        """The time of a token after the first; None where there is no second, or the number is not known."""
        if not self.num_output_tokens or self.num_output_tokens < 2:
            return None
        return (self.e2el - self.ttft) / (self.num_output_tokens - 1)


@dataclass(slots=True)
class _Reading:
    """What the frames have told so far."""

    chunk_times: list[float] = field(default_factory=list)
    usage: Mapping[str, Any] = field(default_factory=dict)
    is_done: bool = False
    is_finished: bool = False
    failure: str = ""


def read_answer(exchange: Exchange) -> Answer:
    """Never raises: whatever is wrong is told by `failure` and `defects`."""
    reading = _Reading()
    if exchange.status and not 200 <= exchange.status < 300:
        reading.failure = f"HTTP {exchange.status}: {_find_message(exchange.body)}"
    else:
        for arrival, data in split_frames(exchange.pieces):
            _read_frame(reading, arrival, data)
    return Answer(
        started_at=exchange.started_at,
        chunk_times=tuple(reading.chunk_times),
        num_prompt_tokens=reading.usage.get("prompt_tokens"),
        num_output_tokens=reading.usage.get("completion_tokens"),
        num_cached_tokens=(reading.usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0,
        failure=_find_failure(reading, exchange),
        defects=_find_defects(reading),
    )


def split_frames(pieces: list[tuple[float, bytes]]) -> Iterator[tuple[float, bytes]]:
    """The data of each server-sent event and the time its last byte came; lines end in LF or CRLF."""
    rest = b""
    for arrival, piece in pieces:
        *frames, rest = (rest + piece).replace(b"\r\n", b"\n").split(b"\n\n")
        for frame in frames:
            lines = [line[5:].removeprefix(b" ") for line in frame.split(b"\n") if line.startswith(b"data:")]
            if lines:
                yield arrival, b"\n".join(lines)


def _read_frame(reading: _Reading, arrival: float, data: bytes) -> None:
    if data == _DONE:
        reading.is_done = True
        return
    try:
        frame = json.loads(data)
    except ValueError:
        reading.failure = reading.failure or f"a frame is not JSON: {_shorten(data)}"
        return
    if not isinstance(frame, dict):
        reading.failure = reading.failure or f"a frame is not an object: {_shorten(data)}"
        return
    if frame.get("error"):
        reading.failure = reading.failure or f"error in the stream: {_find_message(data)}"
    if choices := frame.get("choices"):
        reading.chunk_times.append(arrival)
        reading.is_finished |= any(choice.get("finish_reason") for choice in choices)
    reading.usage = frame.get("usage") or reading.usage


def _find_failure(reading: _Reading, exchange: Exchange) -> str:
    if reading.failure:
        return reading.failure
    if exchange.failure and not reading.is_done:
        return exchange.failure
    if not reading.chunk_times:
        return "no chunk with a choice; " + (f"the body is {_shorten(exchange.body)}" if exchange.pieces else "no body")
    if not reading.is_done and not reading.is_finished:
        return "cut short: neither a finish_reason nor [DONE]"
    return ""


def _find_defects(reading: _Reading) -> tuple[str, ...]:
    if not reading.chunk_times:
        return ()
    checks = {
        NO_DONE: reading.is_done,
        NO_USAGE: isinstance(reading.usage.get("completion_tokens"), int),
        NO_FINISH_REASON: reading.is_finished,
    }
    return tuple(defect for defect, is_right in checks.items() if not is_right)


def _find_message(body: bytes) -> str:
    """OpenAI's error message where there is one, else the body itself."""
    try:
        error = json.loads(body)["error"]
        message = error["message"] if isinstance(error, dict) else error
    except (ValueError, KeyError, TypeError):
        return _shorten(body)
    return _shorten(str(message).encode())


def _shorten(data: bytes) -> str:
    text = data.decode(errors="replace")
    return repr(text if len(text) <= _MAX_ECHO else text[:_MAX_ECHO] + "...")
