"""One HTTP request and all that comes back, each piece with the time it came.

For measuring servers. The bytes are kept as they arrive and read when all is over: a client that read them at once
would take from a server on the same machine the time that it measures. Knows HTTP/1.1, and not what is in the bytes.
"""

import asyncio
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import cast
from urllib.parse import urlsplit

import httptools


@dataclass(slots=True, kw_only=True)
class Exchange:
    """A request and its answer; times are of `time.perf_counter`, and 0.0 stands for what has not happened."""

    started_at: float
    ended_at: float = 0.0
    status: int = 0
    pieces: list[tuple[float, bytes]] = field(default_factory=list)  # of the body
    failure: str = ""  # why it is not whole

    @property
    def body(self) -> bytes:
        return b"".join(piece for _, piece in self.pieces)


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server is: what a URL says, less its path."""

    host: str
    port: int
    is_secure: bool

    @classmethod
    def parse(cls, url: str) -> "Address":
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{url!r} is no URL of a server: expected http://HOST:PORT")
        is_secure = parts.scheme == "https"
        return cls(parts.hostname, parts.port or (443 if is_secure else 80), is_secure)

    @property
    def authority(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


class Connections:
    """Connections to one server, kept open between requests and as many as run at once."""

    def __init__(self, url: str, *, headers: Mapping[str, str] | None = None, seconds: float = 600) -> None:
        self._address = Address.parse(url)
        self._headers = "".join(f"{name}: {value}\r\n" for name, value in (headers or {}).items())
        self._seconds = seconds
        self._idle: list[_Connection] = []

    async def exchange(self, method: str, path: str, body: bytes = b"") -> Exchange:
        """Never raises for what a server or the network does: `failure` tells."""
        request = self._encode(method, path, body)
        exchange = Exchange(started_at=time.perf_counter())
        try:
            async with asyncio.timeout(self._seconds):
                await self._send(request, exchange)
        except TimeoutError:
            exchange.failure = f"no end after {self._seconds:g} s"
        except OSError as error:
            exchange.failure = f"no connection to {self._address.authority}: {error.strerror or error}"
        exchange.ended_at = exchange.ended_at or time.perf_counter()
        return exchange

    def close(self) -> None:
        for connection in self._idle:
            connection.close()
        self._idle.clear()

    async def _send(self, request: bytes, exchange: Exchange) -> None:
        while self._idle:
            connection = self._idle.pop()
            if await self._send_over(connection, request, exchange):
                return
        await self._send_over(await self._open(), request, exchange)

    async def _send_over(self, connection: "_Connection", request: bytes, exchange: Exchange) -> bool:
        """False when the server had closed the connection before it read the request: it is to be sent over another."""
        if connection.is_closed:
            return False
        try:
            was_used = connection.was_used
            can_go_on = await connection.send(request, exchange)
        except BaseException:
            connection.close()
            raise
        if was_used and exchange.failure and not exchange.status:
            exchange.failure = ""
            return False
        if can_go_on:
            self._idle.append(connection)
        else:
            connection.close()
        return True

    async def _open(self) -> "_Connection":
        address = self._address
        secure = ssl.create_default_context() if address.is_secure else None
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(_Connection, address.host, address.port, ssl=secure)
        return connection

    def _encode(self, method: str, path: str, body: bytes) -> bytes:
        lines = f"{method} {path} HTTP/1.1\r\nHost: {self._address.authority}\r\n{self._headers}"
        if body:
            lines += "Content-Type: application/json\r\n"
        return f"{lines}Content-Length: {len(body)}\r\n\r\n".encode() + body


class _Connection(asyncio.Protocol):
    """One connection, with at most one request under way. The parser calls back the methods named on_..."""

    def __init__(self) -> None:
        self.is_closed = False
        self.was_used = False
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._exchange = Exchange(started_at=0.0)
        self._end: asyncio.Future[bool] | None = None  # whether the connection can be used again
        self._now = 0.0
        self._ends_with_connection = True

    async def send(self, request: bytes, exchange: Exchange) -> bool:
        """Fills the exchange; whether the connection can take another request."""
        assert self._transport is not None, "not connected"
        self._parser = httptools.HttpResponseParser(self)
        self._exchange, self._ends_with_connection = exchange, True
        self._end = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        self.was_used = True
        return await self._end

    def close(self) -> None:
        self.is_closed = True
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's own is one in all but name

    def data_received(self, data: bytes) -> None:
        self._now = time.perf_counter()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._finish(can_go_on=False, failure=f"what came is not HTTP: {error}")

    def connection_lost(self, error: Exception | None) -> None:
        self.is_closed = True
        self._now = time.perf_counter()
        is_whole = self._exchange.status and self._ends_with_connection and error is None
        self._finish(can_go_on=False, failure="" if is_whole else "the connection was closed before the answer's end")

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() in (b"content-length", b"transfer-encoding"):
            self._ends_with_connection = False

    def on_headers_complete(self) -> None:
        self._exchange.status = self._parser.get_status_code()

    def on_body(self, data: bytes) -> None:
        self._exchange.pieces.append((self._now, data))

    def on_message_complete(self) -> None:
        self._finish(can_go_on=self._parser.should_keep_alive())

    def _finish(self, *, can_go_on: bool, failure: str = "") -> None:
        if self._end is not None and not self._end.done():
            self._exchange.ended_at = self._now
            self._exchange.failure = failure
            self._end.set_result(can_go_on)
