"""uvicorn as this server uses it: which port, how a connection behaves, and how the whole ends.

Knows of the model only whether it is alive, and how to drain it.
"""

import asyncio
import resource
import socket
import ssl
from functools import partial
from types import FrameType
from typing import Any, cast

import uvicorn

from qserve.api.service import Service
from qserve.config import ServerConfig
from qserve.connection import Connection
from qserve.errors import UsageError

_BACKLOG = 2048
_MAX_FILES = 65536
_KEEP_ALIVE_SECONDS = 75  # longer than clients keep idle connections, so that none is closed under their hands
_DEAD_TICKS = 20  # two seconds in which whoever asks is told 503, before connections are refused
_LAST_WORDS_SECONDS = 5  # after the drain: to send the error frames of the streams that were cut short


class Server(uvicorn.Server):
    """uvicorn, ending as we promise: what runs may finish, what cannot ends with an error frame, and the exit is 0."""

    def __init__(self, app: Any, service: Service, config: ServerConfig, *, receive_seconds: float = 60) -> None:
        connection = partial(Connection, receive_seconds=receive_seconds)
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                log_level="error",  # warnings tell only of bad HTTP, which anyone can send
                access_log=False,
                server_header=False,
                lifespan="off",
                ws="none",
                http=cast(type[asyncio.Protocol], connection),
                timeout_keep_alive=_KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=int(config.drain_seconds) + _LAST_WORDS_SECONDS,
                ssl_certfile=config.ssl_certfile or None,
                ssl_keyfile=config.ssl_keyfile or None,
            )
        )
        self._service = service
        self._drain_seconds = config.drain_seconds
        self.engine_has_died = False
        self._num_dead_ticks = 0
        _load(self.config, config)
        _allow_many_connections()

    def stop(self) -> None:
        """Ends the server; may be called from any thread."""
        self.should_exit = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Not uvicorn's own: it would raise the signal again after a clean end, and we would not exit with 0."""
        self.force_exit = self.should_exit  # asked twice: at once
        self.should_exit = True

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second. Without its engine the process is of no use, and a supervisor should start another."""
        self.engine_has_died = not self._service.is_alive
        self._num_dead_ticks += self.engine_has_died
        return await super().on_tick(counter) or self._num_dead_ticks > _DEAD_TICKS

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        draining = asyncio.create_task(self._service.close(drain_seconds=self._drain_seconds))
        await super().shutdown(sockets)
        if self.force_exit:
            draining.cancel()
        else:
            await draining
        await self._cut_connections()

    async def _cut_connections(self) -> None:
        """uvicorn leaves open those whose clients read no more, and the loop would be closed under them."""
        connections = cast(set[Connection], self.server_state.connections)
        for connection in [*connections]:
            connection.transport.abort()
        while connections:
            await asyncio.sleep(0)


def listen(config: ServerConfig) -> socket.socket:
    """The open port. It takes connections from now on, which wait until the server runs."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    try:
        return socket.create_server((config.host, config.port), family=family, backlog=_BACKLOG)
    except OSError as error:
        raise UsageError(
            f"Cannot listen on {config.host} port {config.port}: {error.strerror}. Choose another --port (0 takes a "
            "free one), or end what uses it."
        ) from error


def _load(settings: uvicorn.Config, config: ServerConfig) -> None:
    """Reads the TLS files, so that what is wrong with them is told before anything starts."""
    if config.ssl_keyfile and not config.ssl_certfile:
        raise UsageError("--ssl-keyfile was given without --ssl-certfile. TLS needs the certificate.")
    try:
        settings.load()
    except (OSError, ssl.SSLError) as error:
        files = " and ".join(filter(None, (config.ssl_certfile, config.ssl_keyfile)))
        raise UsageError(
            f"TLS cannot be set up from {files}: {error}. Expected PEM files that belong together."
        ) from error


def _allow_many_connections() -> None:
    """As many as the system lets us have: every connection is a file, and the soft limit is often 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MAX_FILES if hard == resource.RLIM_INFINITY else min(hard, _MAX_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
