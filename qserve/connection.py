"""One client's connection: uvicorn's, with an end to its patience.

uvicorn waits for ever for a request that has begun, holds a head of any size, and tells bad HTTP as plain text. Here
a head is bounded, head and body each have their time, and what is wrong is told as on every route. Knows no routes.
"""

import asyncio
import json
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

_MAX_HEAD_BYTES = 64 * 1024
_REASONS = {400: "Bad Request", 408: "Request Timeout", 431: "Request Header Fields Too Large"}


class Connection(HttpToolsProtocol):
    """From its first byte to its end, over any number of requests."""

    def __init__(self, *given: Any, receive_seconds: float, **named: Any) -> None:
        super().__init__(*given, **named)
        self._receive_seconds = receive_seconds
        self._patience: asyncio.TimerHandle | None = None
        self._num_head_bytes = 0
        self._is_in_head = True

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._be_patient()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._is_in_head:
            self._num_head_bytes += len(data)
            if self._num_head_bytes > _MAX_HEAD_BYTES:
                self._refuse(431, f"The head of a request may have {_MAX_HEAD_BYTES} bytes.", "head_too_large")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._is_in_head, self._num_head_bytes = True, 0
        self._be_patient()

    def on_headers_complete(self) -> None:
        self._is_in_head = False
        self._be_patient()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._stop_waiting()
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, msg, "bad_http")

    def _be_patient(self) -> None:
        self._stop_waiting()
        self._patience = self.loop.call_later(self._receive_seconds, self._lose_patience)

    def _stop_waiting(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None

    def _lose_patience(self) -> None:
        if self.pipeline or (self._is_in_head and self._is_answering):  # it is we who keep the client waiting
            self._be_patient()
        elif self._is_in_head and not self._num_head_bytes:
            self.transport.close()  # opened, and never used
        else:
            message = f"The request did not arrive whole in {self._receive_seconds:g} seconds."
            self._refuse(408, message, "request_timeout")

    @property
    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _refuse(self, status: int, message: str, code: str) -> None:
        """An answer to what is no whole request, unless another is on its way already; then the end."""
        if self.transport.is_closing():
            return
        if not self._is_answering if self._is_in_head else not self.cycle.response_started:
            self.transport.write(_write_answer(status, message, code))
        self.transport.close()


def _write_answer(status: int, message: str, code: str) -> bytes:
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
    body = json.dumps({"error": error})
    head = f"HTTP/1.1 {status} {_REASONS[status]}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
    return f"{head}\r\nconnection: close\r\n\r\n{body}".encode()
