"""Errors as OpenAI's body, {"error": {"message", "type", "param", "code"}}, and as Anthropic's on its own routes.

One table says what each of our errors is over HTTP, another what HTTP's own errors are, a third Anthropic's types.
"""

import json
import logging
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Scope

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
_ANTHROPIC = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    503: "overloaded_error",
}
_ANTHROPIC_PATH = "/v1/messages"
_CLIENT_CLOSED_REQUEST = 499  # nobody reads it; nginx's number for the log


def error_body(error: QserveError) -> dict[str, Any]:
    """One of our errors as OpenAI writes it, for a response or for a frame of a stream."""
    _, kind, code = _row(error)
    return _body(str(error), kind=kind, param=getattr(error, "param", None), code=code)


def anthropic_body(error: QserveError) -> dict[str, Any]:
    """The same as Anthropic writes it."""
    status, _, _ = _row(error)
    return _anthropic(status, str(error))


async def answer_ours(request: Request, error: Exception) -> Response:
    assert isinstance(error, QserveError)
    status, _, _ = _row(error)
    retry_after = getattr(error, "retry_after", None)
    headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
    return _respond(request.scope, status, error_body(error), headers)


async def answer_http(request: Request, error: Exception) -> Response:
    """What the router raises: no such path, no such method."""
    assert isinstance(error, HTTPException)
    message = error.detail
    if message == HTTPStatus(error.status_code).phrase:
        message = f"{message}: {request.method} {request.url.path[:200]}"
    return refusal(request.scope, error.status_code, message, headers=error.headers)


def refusal(scope: Scope, status: int, message: str, *, headers: Mapping[str, str] | None = None) -> Response:
    """The answer to a request that does not reach a route."""
    kind, code = _HTTP.get(status, ("invalid_request_error", "http_error"))
    return _respond(scope, status, _body(message, kind=kind, param=None, code=code), headers)


async def answer_unexpected(request: Request, error: Exception) -> Response:
    """A fault of ours that nobody foresaw: the log gets the trace, the client only a number to quote."""
    request_id = request.scope.get("request_id", "unknown")
    _log.error("request %s failed with %s", request_id, type(error).__name__)  # the trace follows, from uvicorn
    message = f"The server failed on this request. Quote its id when you report it: {request_id}"
    body = _body(message, kind="server_error", param=None, code="internal_error")
    return _respond(request.scope, 500, body, {"x-request-id": request_id})


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


def _anthropic(status: int, message: str) -> dict[str, Any]:
    kind = _ANTHROPIC.get(status, "invalid_request_error" if status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": message}}


def _respond(scope: Scope, status: int, body: dict[str, Any], headers: Mapping[str, str] | None) -> Response:
    """In the words of the path that was asked."""
    if scope["path"].startswith(_ANTHROPIC_PATH):
        body = {**_anthropic(status, body["error"]["message"]), "request_id": scope.get("request_id")}
    return JSONResponse(body, status, headers)
