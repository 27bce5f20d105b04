"""The ASGI application: which path is answered by what, and what every request passes through first."""

import asyncio
from collections.abc import Sequence

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.routing import Route

from qserve.api.access_log import AccessLog
from qserve.api.endpoints import ENDPOINTS
from qserve.api.errors import answer_http, answer_nobody, answer_ours, answer_unexpected
from qserve.api.keys import ApiKey
from qserve.api.middleware import BodyLimit, RequestId
from qserve.api.service import Service
from qserve.config import AccessConfig, LimitsConfig
from qserve.errors import QserveError

_ROUTES = [
    # A model's name may have slashes in it.
    Route(path.replace("{name}", "{name:path}"), endpoint.handler, methods=[endpoint.method])
    for endpoint in ENDPOINTS
    for path in (endpoint.path, *endpoint.also)
]


def make_app(
    service: Service,
    *,
    access: AccessConfig | None = None,
    limits: LimitsConfig | None = None,
    ping_seconds: float = 0,
) -> Starlette:
    """The application over a service that may still be loading its model."""
    access, limits = access or AccessConfig(), limits or LimitsConfig()
    app = Starlette(
        routes=_ROUTES,
        middleware=[
            Middleware(RequestId),
            Middleware(AccessLog, service=service),
            *_cors(access.allow_origin),
            Middleware(ApiKey, access=access),
            Middleware(BodyLimit, max_bytes=limits.max_body_mb * 2**20),
        ],
        exception_handlers={
            QserveError: answer_ours,
            HTTPException: answer_http,
            ClientDisconnect: answer_nobody,
            Exception: answer_unexpected,
        },
    )
    app.state.service = service
    app.state.limits = limits
    app.state.ping_seconds = ping_seconds
    app.state.one_text = asyncio.Semaphore(1)
    app.router.redirect_slashes = False
    return app


def _cors(origins: Sequence[str]) -> list[Middleware]:
    """Closed unless origins are named. It stands before the keys, for a browser's preflight carries none."""
    if not origins:
        return []
    exposed = ["x-request-id", "retry-after", "x-qserve-ignored-fields"]
    return [
        Middleware(
            CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=["*"], expose_headers=exposed
        )
    ]
