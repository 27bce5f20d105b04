"""`qserve serve`: opens the port, loads the model behind it, answers, and ends in good order.

The port is open before anything is loaded, so that probes and clients get a clear 503 in the meantime; torch is
imported only by the thread that loads.
"""

import argparse
import asyncio
import logging
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from importlib import import_module
from types import FrameType

import uvicorn

from qserve.api.app import make_app
from qserve.api.service import Service
from qserve.config import DeviceConfig, EngineConfig, ServerConfig
from qserve.errors import QserveError, UsageError
from qserve.llm import LLM
from qserve.options import add_options, read_options

_log = logging.getLogger(__name__)
_BACKLOG = 2048
_KEEP_ALIVE_SECONDS = 75  # longer than clients keep idle connections, so that none is closed under their hands
_LAST_WORDS_SECONDS = 5  # after the drain: to send the error frames of the streams that were cut short

_DESCRIPTION = """\
Serve a model over the OpenAI API. MODEL is a directory with config.json and weights, or ORG/NAME on the model hub;
without it a small demo model is made once, kept in a cache, and served."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = _DESCRIPTION
    parser.add_argument("model", nargs="?", metavar="MODEL", help="a directory or ORG/NAME; by default the demo model")
    for config in (ServerConfig, EngineConfig, DeviceConfig):
        add_options(parser, config)


def run(arguments: argparse.Namespace) -> int:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    config = read_options(arguments, ServerConfig)
    engine, device = read_options(arguments, EngineConfig), read_options(arguments, DeviceConfig)
    listening = _listen(config)
    service = Service()
    loader = _Loader(arguments.model, service, configs=(config, engine, device))
    server = _Server(config, service)
    host, port = listening.getsockname()[:2]
    _log.info("listening on http://%s:%d; the model is being loaded", host, port)
    loader.start(then=lambda llm: print(_greeting(llm, f"http://{host}:{port}"), flush=True), on_failure=server.stop)
    server.run(sockets=[listening])
    loader.cancel()
    if loader.failure is not None:
        raise loader.failure
    return 1 if server.engine_has_died or loader.has_crashed else 0


class _Loader:
    """Finds and loads the model in a thread of its own."""

    def __init__(
        self, model: str | None, service: Service, *, configs: tuple[ServerConfig, EngineConfig, DeviceConfig]
    ) -> None:
        self._model = model
        self._service = service
        self._configs = configs
        self._demo: subprocess.Popen[str] | None = None
        self.failure: QserveError | None = None
        self.has_crashed = False

    def start(self, *, then: Callable[[LLM], None], on_failure: Callable[[], None]) -> None:
        threading.Thread(target=self._run, args=(then, on_failure), name="qserve-loader", daemon=True).start()

    def cancel(self) -> None:
        """The server ends before the model is there."""
        if self._demo is not None and self._demo.poll() is None:
            self._demo.terminate()

    def _run(self, then: Callable[[LLM], None], on_failure: Callable[[], None]) -> None:
        try:
            llm = self._load()
            self._service.open(llm)
            then(llm)
        except QserveError as error:
            self.failure = error
            on_failure()
        except BaseException:  # a server that never becomes ready must not stay; the trace goes to stderr
            self.has_crashed = True
            on_failure()
            raise

    def _load(self) -> LLM:
        model = self._make_demo() if self._model is None else self._model
        build = import_module("qserve.build")  # imports torch, which takes a second or two
        server, engine, device = self._configs
        llm: LLM = build.build_llm(model, server=server, engine=engine, device=device)
        return llm

    def _make_demo(self) -> str:
        """The artifact's path is the last line that the maker prints; its progress goes to our own stderr."""
        command = [sys.executable, "-m", "training.cli", "demo"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as self._demo:
            printed, _ = self._demo.communicate()
        if self._demo.returncode:
            raise UsageError("The demo model could not be made; what went wrong stands above. Name a model instead.")
        return printed.strip().splitlines()[-1]


class _Server(uvicorn.Server):
    """uvicorn, ending as we promise: what runs may finish, what cannot ends with an error frame, and the exit is 0."""

    def __init__(self, config: ServerConfig, service: Service) -> None:
        super().__init__(
            uvicorn.Config(
                make_app(service, config),
                log_level="warning",
                access_log=False,
                server_header=False,
                lifespan="off",
                http="httptools",
                timeout_keep_alive=_KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=int(config.drain_seconds) + _LAST_WORDS_SECONDS,
            )
        )
        self._service = service
        self._drain_seconds = config.drain_seconds
        self.engine_has_died = False

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
        return await super().on_tick(counter) or self.engine_has_died

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        draining = asyncio.create_task(self._service.close(drain_seconds=self._drain_seconds))
        await super().shutdown(sockets)
        if self.force_exit:
            draining.cancel()
        else:
            await draining


def _listen(config: ServerConfig) -> socket.socket:
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    try:
        return socket.create_server((config.host, config.port), family=family, backlog=_BACKLOG)
    except OSError as error:
        raise UsageError(
            f"Cannot listen on {config.host} port {config.port}: {error.strerror}. Choose another --port (0 takes a "
            "free one), or end what uses it."
        ) from error


def _greeting(llm: LLM, url: str) -> str:
    lines = [
        f"\n{llm.info.name} is served at {url}. Try:\n",
        f"  curl -N {url}/v1/completions -H 'Content-Type: application/json' \\",
        '    -d \'{"prompt": "The capital of France is", "max_tokens": 16, "temperature": 0, "stream": true}\'\n',
    ]
    if llm.template is not None:
        message = '{"role": "user", "content": "What is the capital of France?"}'
        lines += [
            f"  curl {url}/v1/chat/completions -H 'Content-Type: application/json' \\",
            f'    -d \'{{"messages": [{message}], "max_tokens": 32, "temperature": 0}}\'\n',
        ]
    lines += [f"  curl {url}/v1/models/{llm.info.name}\n", "End with Ctrl+C."]
    return "\n".join(lines)
