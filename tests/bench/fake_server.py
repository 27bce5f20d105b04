"""A server of forty lines whose models each have their own way of answering, most of them wrong."""

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

NUM_TOKENS = 7  # what usage tells, whatever the number of chunks


def chunk(text: str, *, finish: str | None = None) -> bytes:
    return json.dumps({"choices": [{"index": 0, "text": text, "finish_reason": finish}]}).encode()


USAGE = json.dumps(
    {
        "choices": [],
        "usage": {
            "prompt_tokens": 5,
            "completion_tokens": NUM_TOKENS,
            "prompt_tokens_details": {"cached_tokens": 2},
        },
    }
).encode()
WORDS = (chunk("one"), chunk(" two"), chunk(" three", finish="length"))


@dataclass(frozen=True)
class Reply:
    """How one model answers."""

    status: str = "200 OK"
    frames: tuple[bytes, ...] = (*WORDS, USAGE, b"[DONE]")
    line_end: bytes = b"\n"
    piece: int | None = None  # bytes sent at once
    is_framed: bool = True
    is_cut: bool = False  # the connection ends before the answer does
    is_chunked: bool = True
    seconds: float = 0.0  # before every frame

    def pieces(self) -> list[bytes]:
        end = 2 * self.line_end
        frames = [b"data: " + frame + end if self.is_framed else frame for frame in self.frames]
        if self.piece is None:
            return frames
        body = b"".join(frames)
        return [body[start : start + self.piece] for start in range(0, len(body), self.piece)]


REPLIES = {
    "good": Reply(),
    "slow": Reply(seconds=0.03),
    "crlf": Reply(line_end=b"\r\n", piece=1),
    "pieces": Reply(piece=3),
    "until-close": Reply(is_chunked=False),
    "busy": Reply(status="503 Service Unavailable", frames=(b'{"error": {"message": "loading"}}',), is_framed=False),
    "page": Reply(frames=(b"<html>hello</html>",), is_framed=False),
    "cut": Reply(frames=WORDS[:2], is_cut=True),
    "short": Reply(frames=WORDS[:2]),
    "no-done": Reply(frames=(*WORDS, USAGE)),
    "no-usage": Reply(frames=(*WORDS, b"[DONE]")),
    "no-choices": Reply(frames=(USAGE, b"[DONE]")),
    "broken": Reply(frames=(WORDS[0], b'{"choices": [', b"[DONE]")),
    "error": Reply(frames=(WORDS[0], b'{"error": {"message": "out of blocks"}}', b"[DONE]")),
    "hanging": Reply(seconds=60),
}


async def _answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
            length = int(head.partition("content-length: ")[2].partition("\r\n")[0] or 0)
            body = json.loads(await reader.readexactly(length) or b"{}")
            if not await _reply(writer, head.split()[1], body):
                return
    except (asyncio.IncompleteReadError, asyncio.CancelledError, ConnectionError):
        pass  # the client has gone, or the test is over
    finally:
        writer.close()


async def _reply(writer: asyncio.StreamWriter, path: str, body: dict[str, Any]) -> bool:
    """Whether the connection goes on."""
    if not body:
        listed = {"/v1/models": {"data": [{"id": name, "meta": {"n_vocab": 300}} for name in REPLIES]}}.get(path)
        reply = Reply(frames=(json.dumps(listed).encode(),), is_framed=False) if listed else Reply("404 Not Found", ())
    else:
        reply = REPLIES[body["model"]]
    coding = b"Transfer-Encoding: chunked\r\n" if reply.is_chunked else b""
    writer.write(f"HTTP/1.1 {reply.status}\r\n".encode() + coding + b"\r\n")
    for piece in reply.pieces():
        await asyncio.sleep(reply.seconds)
        writer.write(b"%x\r\n%b\r\n" % (len(piece), piece) if reply.is_chunked else piece)
        await writer.drain()
    if reply.is_cut or not reply.is_chunked:
        return False
    writer.write(b"0\r\n\r\n")
    return True


@contextmanager
def running() -> Iterator[str]:
    """The server's URL, in a thread of its own."""
    loop = asyncio.new_event_loop()
    server = loop.run_until_complete(asyncio.start_server(_answer, "127.0.0.1", 0))
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        server.close()
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()
