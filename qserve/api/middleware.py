"""What happens to every request before its route: an id, the size and the kind of its body.

Plain ASGI: Starlette's BaseHTTPMiddleware would hide from the routes that a client has gone away.
"""

import re
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qserve.api.errors import refusal

_ALLOWED_ID = re.compile(r"[\x21-\x7e]{1,128}")


class RequestId:
    """Every answer carries x-request-id: the caller's own, if it is printable and short, or a new one."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _ALLOWED_ID.fullmatch(given) else uuid.uuid4().hex
        scope["request_id"] = request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        await self._app(scope, receive, send_with_id)


class BodyLimit:
    """Refuses a body that is too large before it is held in memory, and one that is not JSON."""

    def __init__(self, app: ASGIApp, *, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        media_type = headers.get("content-type", "application/json").partition(";")[0].strip().lower()
        declared = headers.get("content-length", "0")
        if media_type != "application/json":
            message = f"The body must be JSON, with 'Content-Type: application/json', not {media_type[:100]!r}."
            await refusal(scope, 415, message)(scope, receive, send)
        elif declared.isdecimal() and int(declared) > self._max_bytes:
            await refusal(scope, 413, self._message())(scope, receive, send)
        else:
            await self._app(scope, self._count(receive), send)

    def _count(self, receive: Receive) -> Receive:
        """For a body that does not declare its size, or declares a wrong one."""
        num_received = 0

        async def receive_limited() -> Message:
            nonlocal num_received
            message = await receive()
            num_received += len(message.get("body", b""))
            if num_received > self._max_bytes:
                raise HTTPException(413, self._message())
            return message

        return receive_limited

    def _message(self) -> str:
        return f"The body is too large: at most {self._max_bytes} bytes are taken."
