"""Who may ask: the keys of this server, and the check of every request but those of probes."""

import hashlib
import hmac
from collections.abc import Collection
from pathlib import Path

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from qserve.api.errors import refusal
from qserve.config import AccessConfig
from qserve.errors import UsageError

_ALWAYS_OPEN = frozenset({"/health", "/ready"})


class ApiKey:
    """Asks for one of the keys, on every path but the open ones."""

    def __init__(self, app: ASGIApp, *, access: AccessConfig) -> None:
        self._app = app
        self._digests = [_digest(key.encode()) for key in read_keys(access)]
        self._open_paths = _ALWAYS_OPEN | ({"/metrics"} if access.open_metrics else set())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not self._lets_in(scope):
            message = "Incorrect API key, or none: send the header 'Authorization: Bearer KEY', or 'x-api-key: KEY'."
            await refusal(scope, 401, message, headers={"WWW-Authenticate": "Bearer"})(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _lets_in(self, scope: Scope) -> bool:
        if not self._digests or scope["path"] in self._open_paths:
            return True
        return self._is_known(_given(Headers(scope=scope)).encode("latin-1"))

    def _is_known(self, given: bytes) -> bool:
        # Digests have one length, every one is compared, and each in constant time: the time taken tells nothing.
        digest = _digest(given)
        return sum(hmac.compare_digest(digest, known) for known in self._digests) > 0


def _given(headers: Headers) -> str:
    """The key that a request brings, as OpenAI's clients send it or as Anthropic's do; an empty one is nobody's."""
    scheme, _, given = headers.get("authorization", "").partition(" ")
    return given.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "").strip()


def read_keys(access: AccessConfig) -> Collection[str]:
    """All keys of the configuration and of its file."""
    keys = [*access.api_key, *_read_file(access.api_key_file)]
    if any(not key or key != key.strip() for key in keys):
        raise UsageError("An API key is empty, or has spaces around it. Give each key as clients will send it.")
    return keys


def _read_file(path: str) -> list[str]:
    if not path:
        return []
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"The file of --api-key-file, {path}, cannot be read: {error}.") from error
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        # An open server because of an empty file is what nobody wants.
        raise UsageError(
            f"The file of --api-key-file, {path}, holds no key: write one a line, or leave the option out."
        )
    return keys


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
