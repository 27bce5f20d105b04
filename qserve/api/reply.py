"""What every answer owes its client: not to work for one who has gone, and to name the fields that were ignored."""

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.types import Receive

T = TypeVar("T")


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The work's result, unless the client goes away first; the body must have been read."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_wait_until_gone(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()


async def _wait_until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def name_unknown_fields(names: Sequence[str]) -> dict[str, str]:
    """The header that tells which fields of a request are unknown, if there are any."""
    return {"x-qserve-ignored-fields": _as_header(names)} if names else {}


def _as_header(names: Sequence[str]) -> str:
    """Field names as a header may carry them, control characters escaped, and not too many."""
    return ", ".join(name[:80].encode("unicode_escape").decode() for name in names[:10])
