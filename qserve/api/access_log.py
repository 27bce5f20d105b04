"""One line of the log and one count of the metrics for every request, at its end; never what was said in it.

Plain ASGI, as middleware.py is. Routes leave their generations in the scope, which is read here when they are closed.
"""

import logging
import time
from collections.abc import Sequence
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qserve.api.service import Service
from qserve.llm import Generation
from qserve.metrics import Metrics, Outcome

_log = logging.getLogger("qserve.requests")
_PROBES = frozenset({"/health", "/ready", "/metrics"})  # asked every few seconds, and of no interest when all is well
_NO_ANSWER = 499  # the client went away first; nginx's number
_FAILED = 500
_LONGEST_PATH = 200
_GENERATIONS = "qserve.generations"


def note_generations(scope: Scope, generations: Sequence[Generation]) -> None:
    """Lets the log line of a request tell what came of its generations."""
    scope[_GENERATIONS] = generations


class AccessLog:
    """Writes the line when the answer is sent, or when it is clear that there will be none."""

    def __init__(self, app: ASGIApp, *, service: Service) -> None:
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start = time.perf_counter()
        status = _NO_ANSWER

        async def send_and_look(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, send_and_look)
        except Exception:
            status = _FAILED
            raise
        finally:
            self._note(scope, status, seconds=time.perf_counter() - start)

    def _note(self, scope: Scope, status: int, *, seconds: float) -> None:
        outcomes = [one.outcome for one in scope.get(_GENERATIONS, ()) if one.outcome is not None]
        metrics = self._service.metrics
        if metrics is not None:
            _count(metrics, scope, status, outcomes, seconds=seconds)
        is_dull = scope["path"] in _PROBES and status < 400
        fields = {
            "request_id": scope.get("request_id", "-"),
            "method": scope["method"],
            "path": scope["path"][:_LONGEST_PATH],
            "status": status,
            "seconds": round(seconds, 4),
            **_sum_up(outcomes),
        }
        _log.log(logging.DEBUG if is_dull else logging.INFO, "request", extra={"fields": fields})


def _count(metrics: Metrics, scope: Scope, status: int, outcomes: Sequence[Outcome], *, seconds: float) -> None:
    route = scope.get("route")  # the route's own pattern: paths that clients make up would be names without end
    metrics.observe_http(
        handler=getattr(route, "path", "none"), method=_known(scope["method"]), status=status, seconds=seconds
    )
    if outcomes:
        metrics.observe_answer(outcomes)


def _known(method: str) -> str:
    return method if method in ("GET", "HEAD", "POST", "OPTIONS") else "other"


def _sum_up(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    if not outcomes:
        return {}
    first = [end.first_token_seconds for end in outcomes if end.first_token_seconds is not None]
    queued = [end.queue_seconds for end in outcomes if end.queue_seconds is not None]
    return {
        "generations": len(outcomes),
        "prompt_tokens": sum(end.num_prompt_tokens for end in outcomes),
        "cached_tokens": sum(end.num_cached_tokens for end in outcomes),
        "output_tokens": sum(end.num_output_tokens for end in outcomes),
        "queue_seconds": round(max(queued), 4) if queued else None,
        "first_token_seconds": round(min(first), 4) if first else None,
        "finish_reason": ",".join(sorted({end.finish_reason for end in outcomes})),
    }
