"""Errors as OpenAI's body, on every route: {"error": {"message", "type", "param", "code"}}.

One table says what each of our errors is over HTTP, another what HTTP's own errors are.
"""

import json
import logging
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from qserve.errors import (
    ContextLengthExceeded,
    DeadlineExceeded,
    EngineDead,
    ModelNotFound,
    NotReady,
    QserveError,
    QueueFull,
    RequestError,
)

_log = logging.getLogger(__name__)

# (error, status, type, code); the first row that fits counts
_OURS: tuple[tuple[type[QserveError], int, str, str | None], ...] = (
    (ContextLengthExceeded, 400, "invalid_request_error", "context_length_exceeded"),
    (ModelNotFound, 404, "invalid_request_error", "model_not_found"),
    (DeadlineExceeded, 408, "server_error", "deadline_exceeded"),
    (QueueFull, 429, "rate_limit_error", "queue_full"),
    (RequestError, 400, "invalid_request_error", None),
    (NotReady, 503, "server_error", "not_ready"),
    (EngineDead, 503, "server_error", "engine_dead"),
    (QserveError, 500, "server_error", "internal_error"),
)
_HTTP: dict[int, tuple[str, str]] = {
    401: ("authentication_error", "invalid_api_key"),
    404: ("invalid_request_error", "unknown_url"),
    405: ("invalid_request_error", "method_not_allowed"),
    413: ("invalid_request_error", "body_too_large"),
    415: ("invalid_request_error", "unsupported_media_type"),
}
_CLIENT_CLOSED_REQUEST = 499  # nobody reads it; nginx's number for the log


def error_body(error: QserveError) -> dict[str, Any]:
    """One of our errors as OpenAI writes it, for a response or for a frame of a stream."""
    _, kind, code = _row(error)
    return _body(str(error), kind=kind, param=getattr(error, "param", None), code=code)


async def answer_ours(request: Request, error: Exception) -> Response:
    assert isinstance(error, QserveError)
    status, _, _ = _row(error)
    retry_after = getattr(error, "retry_after", None)
    headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
    return JSONResponse(error_body(error), status, headers)


async def answer_http(request: Request, error: Exception) -> Response:
    """What the router raises: no such path, no such method."""
    assert isinstance(error, HTTPException)
    message = error.detail
    if message == HTTPStatus(error.status_code).phrase:
        message = f"{message}: {request.method} {request.url.path[:200]}"
    return refusal(error.status_code, message, headers=error.headers)


def refusal(status: int, message: str, *, headers: Mapping[str, str] | None = None) -> Response:
    """The answer to a request that does not reach a route."""
    kind, code = _HTTP.get(status, ("invalid_request_error", "http_error"))
    return JSONResponse(_body(message, kind=kind, param=None, code=code), status, headers)


async def answer_unexpected(request: Request, error: Exception) -> Response:
    """A fault of ours that nobody foresaw: the log gets the trace, the client only a number to quote."""
    request_id = request.scope.get("request_id", "unknown")
    _log.error("request %s failed with %s", request_id, type(error).__name__)  # the trace follows, from uvicorn
    message = f"The server failed on this request. Quote its id when you report it: {request_id}"
    body = _body(message, kind="server_error", param=None, code="internal_error")
    return JSONResponse(body, 500, {"x-request-id": request_id})


async def answer_nobody(request: Request, error: Exception) -> Response:
    """The client went away; the connection is closed, and this is for the log alone."""
    return Response(status_code=_CLIENT_CLOSED_REQUEST)


def error_frame(error: QserveError) -> bytes:
    """An error after the first byte of a stream, when the status can no longer tell it."""
    return f"data: {json.dumps(error_body(error))}\n\n".encode()


def _row(error: QserveError) -> tuple[int, str, str | None]:
    return next((status, kind, code) for cls, status, kind, code in _OURS if isinstance(error, cls))


def _body(message: str, *, kind: str, param: str | None, code: str | None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
