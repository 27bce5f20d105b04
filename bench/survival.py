"""A server under clients that mean harm, or know no better: it answers each in words, holds nothing, and goes on.

    python -m bench.survival MODEL            starts a server on the model, all scenarios, at full size
    python -m bench.survival --url URL        a server that runs; it should have a short --receive-seconds
    python -m bench.survival MODEL --flood 500 --only flood

A scenario raises AssertionError where the server does not do as it should. tests/api/test_survival.py runs them small.
"""

import argparse
import asyncio
import json
import socket
import struct
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx

from bench.server import serving
from bench.watch import read, wait_until_idle

_COMPLETIONS, _CHAT = "/v1/completions", "/v1/chat/completions"
_RESPONSES, _MESSAGES = "/v1/responses", "/v1/messages"
_POSTS = (_COMPLETIONS, _CHAT, _RESPONSES, _MESSAGES, "/tokenize", "/detokenize")
_IDLE_SECONDS = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A server, and how hard it is tried."""

    url: str
    client: httpx.Client
    receive_seconds: float  # the server's own
    num_slow: int = 200  # connections that dawdle
    num_flood: int = 10_000  # requests at once
    body_mib: int = 10

    @property
    def address(self) -> tuple[str, int]:
        parts = urlsplit(self.url)
        assert parts.hostname
        assert parts.port
        return parts.hostname, parts.port

    def connect(self) -> socket.socket:
        wire = socket.create_connection(self.address, timeout=self.receive_seconds + 30)
        wire.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return wire

    def post(self, path: str, content: bytes | Iterator[bytes]) -> httpx.Response:
        headers = {"Content-Type": "application/json"}
        return self.client.post(self.url + path, content=content, headers=headers, timeout=300)

    def check_answers(self) -> None:
        """A well-behaved client beside all others is served."""
        response = self.client.post(self.url + _COMPLETIONS, json={"prompt": "Hello", "max_tokens": 2}, timeout=60)
        assert response.status_code == 200, response.text


def slow_clients(target: Target) -> str:
    """They send the head, or the body, a byte at a time, or nothing at all."""
    heads = [
        b"",
        b"GET /",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nX-A: ",
        _head(_COMPLETIONS, length=1000) + b'{"',
    ]
    wires = [(target.connect(), heads[number % len(heads)]) for number in range(target.num_slow)]
    start = time.monotonic()
    for wire, head in wires:
        wire.sendall(head)
    while time.monotonic() < start + target.receive_seconds / 2:
        target.check_answers()
        for wire, head in wires:
            if head:
                wire.sendall(b"a")
        time.sleep(0.2)
    answers = Counter(_read_rest(wire).partition(b"\r\n")[0].decode() or "closed" for wire, _ in wires)
    seconds = time.monotonic() - start
    assert set(answers) == {"HTTP/1.1 408 Request Timeout", "closed"}, answers
    assert seconds < 2 * target.receive_seconds + 20, f"let go after {seconds:.0f} s"
    return f"{len(wires)} let go after {seconds:.1f} s: {dict(answers)}"


def endless_head(target: Target) -> str:
    """Headers without end must not be held."""
    with target.connect() as wire:
        wire.sendall(b"GET /health HTTP/1.1\r\nX-A: ")
        num_sent = 0
        try:
            while num_sent < 50 * 2**20:
                num_sent += wire.send(b"a" * 65536)
        except OSError:
            pass  # refused: what is hoped for
    assert num_sent < 20 * 2**20, "taken without a limit"
    return f"refused after {num_sent // 1024} KiB"


def half_closed(target: Target) -> str:
    """Clients that say they will send nothing more, before or in the middle of their answer, or vanish with a reset."""
    body = json.dumps({"prompt": "Hello", "max_tokens": 200, "stream": True, "ignore_eos": True}).encode()
    whole = _head(_COMPLETIONS, length=len(body)) + body
    wires = []
    for number in range(60):
        wire = target.connect()
        wire.sendall(whole[: len(whole) - 5 * (number % 4 == 3)])  # some never send the end of the body
        if number % 2:
            wire.recv(1) if number % 4 == 1 else None
        if number % 3 == 2:
            wire.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset at close
            wire.close()
        else:
            wire.shutdown(socket.SHUT_WR)
            wires.append(wire)
    for wire in wires:
        _read_rest(wire)
    return f"{len(wires)} half closed, {60 - len(wires)} reset"


def large_bodies(target: Target) -> str:
    """Much of everything: the answer is a short error, and soon."""
    size = target.body_mib * 2**20
    bodies: dict[str, bytes] = {
        "long prompt": b'{"prompt": "' + b"hello world " * (size // 12) + b'"}',
        "long word": b'{"prompt": "' + b"x" * size + b'"}',
        "many ids": b'{"prompt": [' + b"5," * (size // 2) + b"5]}",
        "many prompts": b'{"prompt": [' + b'"a",' * (size // 4) + b'"a"]}',
        "unknown field": b'{"prompt": "x", "max_tokens": 1, "field": "' + b"x" * size + b'"}',
        "many fields": b'{"prompt": "x", "max_tokens": 1'
        + b"".join(b', "f%d": 1' % n for n in range(size // 14))
        + b"}",
        "many stops": b'{"prompt": "x", "stop": [' + b'"s",' * (size // 4) + b'"s"]}',
        "many biases": b'{"prompt": "x", "logit_bias": {'
        + b",".join(b'"%d": 1' % n for n in range(size // 12))
        + b"}}",
        "no json": b"\x00" * size,
        "too large": b'{"prompt": "' + b"x" * (64 * 2**20) + b'"}',
    }
    slowest = ("", 0.0)
    for name, body in bodies.items():
        start = time.monotonic()
        try:
            response = target.post(_COMPLETIONS, body)
        except httpx.TransportError:
            assert name == "too large", name  # refused while it is still being sent
            continue
        slowest = max(slowest, (name, time.monotonic() - start), key=lambda pair: pair[1])
        expected = {"unknown field": {200}, "many fields": {200}, "too large": {413}}.get(name, {400})
        assert response.status_code in expected, (name, response.status_code, response.text[:300])
        assert len(response.content) < 4000, name
    response = target.post(_COMPLETIONS, (b"x" * 2**16 for _ in range(1024)))  # no length is declared
    assert response.status_code == 413, response.text[:300]
    return f"{len(bodies) + 1} bodies, the slowest took {slowest[1]:.2f} s ({slowest[0]})"


def hostile_json(target: Target) -> str:
    """What no JSON parser should be fed, on every route that reads a body."""
    texts = [
        b"",
        b"\xff\xfe\x00",
        b"{",
        b"[" * 200_000,
        b'{"a":' * 200_000,
        b'{"prompt": ' + b'{"a":' * 100 + b"1" + b"}" * 100 + b"}",
        b'{"prompt": "\xed\xa0\x80"}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "\\u0000"}',
        b'{"prompt": "x", "prompt": 5}',
        b'{"messages": [{"role": "user", "content": ' + b"[" * 5000 + b"]" * 5000 + b"}]}",
        b'{"input": [' + b'{"type": "function_call",' * 1000 + b"}" * 1000 + b"]}",
        b'{"max_tokens": 2, "messages": [{"role": "user", "content": [' + b'{"type": "tool_result"},' * 1000 + b"0]}]}",
        b'{"tokens": [1e2]}',
        b'{"tokens": [99999999999999999999999999999999]}',
        b'\xef\xbb\xbf{"prompt": "x"}',
    ]
    base = {
        _COMPLETIONS: b'"prompt": "x", "max_tokens": 2',
        _CHAT: b'"messages": [{"role": "user", "content": "x"}], "max_tokens": 2',
        _RESPONSES: b'"input": "x", "max_output_tokens": 2',
        _MESSAGES: b'"messages": [{"role": "user", "content": "x"}], "max_tokens": 2',
    }
    numbers = [b"NaN", b"Infinity", b"-Infinity", b"1e400", b"-1e400", b"9" * 400, b"9" * 5000, b"1" + b"0" * 18, b"-1"]
    fields = (b"temperature", b"max_tokens", b"seed", b"n", b"top_p", b"priority", b"timeout", b"top_k", b"min_tokens")
    cases = [(path, text) for path in _POSTS for text in texts]
    for path, start in base.items():
        cases += [(path, b'{%s, "%s": %s}' % (start, field, number)) for field in fields for number in numbers]
        cases += [(path, b'{%s, "logit_bias": {"%s": 1}}' % (start, number)) for number in numbers]
    statuses = Counter(_check_error(target, path, text) for path, text in cases)
    return f"{len(cases)} bodies: {dict(sorted(statuses.items()))}"


def bad_http(target: Target) -> str:
    """Not quite HTTP, or too much of it."""
    body = b'{"prompt": "x", "max_tokens": 1}'
    requests = {
        "noise": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 100,
        "no version": b"GET /health\r\n\r\n",
        "negative length": b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
        "two lengths": b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n12345",
        "bad chunk": b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n",
        "no such path": b"GET /%ff%fe%00 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
        "odd method": b"BREW /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
        "upgrade": b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: Upgrade, close\r\nUpgrade: websocket\r\n\r\n",
        "pipeline": (_head(_COMPLETIONS, length=len(body)) + body) * 20
        + _head(_COMPLETIONS, length=len(body), close=True)
        + body,
    }
    statuses = {}
    for name, request in requests.items():
        with target.connect() as wire:
            wire.sendall(request)
            wire.shutdown(socket.SHUT_WR) if name == "no version" else None
            answer = _read_rest(wire)
        first = answer[9:12].decode("latin-1")
        assert not first.startswith("5"), (name, answer[:300])
        statuses[name] = first or "closed"
        if name == "pipeline":
            assert answer.count(b"HTTP/1.1 200") == 21, answer.count(b"HTTP/1.1 200")
    return str(statuses)


def flood(target: Target) -> str:
    """More requests at once than the queue may hold: each is answered, with 200 or with 429 and when to come back."""
    start = time.monotonic()
    statuses = asyncio.run(_flood(target))
    seconds = time.monotonic() - start
    assert set(statuses) <= {"200", "429"}, statuses
    assert statuses["200"], statuses
    return f"{target.num_flood} requests in {seconds:.1f} s: {dict(statuses)}"


async def _flood(target: Target) -> Counter[str]:
    body = json.dumps({"prompt": "Hello", "max_tokens": 4, "temperature": 0}).encode()
    request = _head(_COMPLETIONS, length=len(body), close=True) + body
    door = asyncio.Semaphore(4000)  # connections being opened: more would only wait in the kernel's queue

    async def ask() -> str:
        async with door:
            reader, writer = await asyncio.open_connection(*target.address)
        writer.write(request)
        answer = await reader.read()
        writer.close()
        head = answer.partition(b"\r\n\r\n")[0].lower()
        assert not head.startswith(b"http/1.1 429") or b"retry-after" in head, head
        return answer[9:12].decode() or "closed"

    async with asyncio.timeout(600):
        return Counter(await asyncio.gather(*(ask() for _ in range(target.num_flood))))


SCENARIOS: dict[str, Callable[[Target], str]] = {
    "slow clients": slow_clients,
    "endless head": endless_head,
    "half closed": half_closed,
    "large bodies": large_bodies,
    "hostile json": hostile_json,
    "bad http": bad_http,
    "flood": flood,
}


def _head(path: str, *, length: int, close: bool = False) -> bytes:
    end = "Connection: close\r\n" if close else ""
    lines = (
        f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n{end}\r\n"
    )
    return lines.encode()


def _read_rest(wire: socket.socket) -> bytes:
    """Everything until the server closes the connection."""
    answer = b""
    try:
        while piece := wire.recv(65536):
            answer += piece
    except ConnectionError:
        pass  # closed hard; what came before counts
    wire.close()
    return answer


def _check_error(target: Target, path: str, body: bytes) -> int:
    """A status below 500, and where it is an error the body that OpenAI gives it, or Anthropic on its own path."""
    response = target.post(path, body)
    assert response.status_code < 500, (path, body[:200], response.text[:300])
    if response.status_code >= 400:
        fields = {"message", "type"} if path == _MESSAGES else {"message", "type", "param", "code"}
        assert set(response.json()["error"]) == fields, response.text[:300]
        assert len(response.content) < 4000, (path, body[:200])
    return response.status_code


@contextmanager
def _server(arguments: argparse.Namespace) -> Iterator[str]:
    if arguments.url:
        yield arguments.url
        return
    options = ["--receive-seconds", str(arguments.receive_seconds)]
    with serving(*([arguments.model] if arguments.model else []), *options) as url:
        yield url


def main() -> int:
    parser = argparse.ArgumentParser(description="Put a server under clients that mean harm.")
    parser.add_argument("model", nargs="?", help="what to serve; by default the demo model")
    parser.add_argument("--url", help="a server that runs already")
    parser.add_argument("--receive-seconds", type=float, default=5, help="the server's own (default 5)")
    parser.add_argument("--slow", type=int, default=200, help="slow connections (default 200)")
    parser.add_argument("--flood", type=int, default=10_000, help="requests at once (default 10000)")
    parser.add_argument("--only", choices=SCENARIOS, help="one scenario alone")
    arguments = parser.parse_args()
    results: dict[str, Any] = {}
    with _server(arguments) as url, httpx.Client() as client:
        target = Target(
            url=url,
            client=client,
            receive_seconds=arguments.receive_seconds,
            num_slow=arguments.slow,
            num_flood=arguments.flood,
        )
        target.check_answers()
        before = read(url)
        print(f"{'before':<14} {before.shown}", flush=True)
        for name in [arguments.only] if arguments.only else SCENARIOS:
            results[name] = SCENARIOS[name](target)
            after = wait_until_idle(url, seconds=_IDLE_SECONDS)
            assert after.is_idle, f"{name}: {after.shown}"
            target.check_answers()
            print(f"{name:<14} {results[name]}\n{'':<14} then {after.shown}", flush=True)
    print(json.dumps({"scenarios": results, "memory_mib": [before.memory_mib, after.memory_mib]}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
