"""`qserve serve`: opens the port, loads the model behind it, answers, and ends in good order.

The port is open before anything is loaded, so that probes and clients get a clear 503 in the meantime; torch is
imported only by the thread that loads.
"""

import argparse
import gc
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module

from qserve.api.app import make_app
from qserve.api.service import Service
from qserve.clock import Clock
from qserve.config import AccessConfig, DeviceConfig, EngineConfig, LimitsConfig, ModelConfig, ServerConfig
from qserve.errors import QserveError, UsageError
from qserve.llm import LLM
from qserve.logs import set_up_logging
from qserve.options import PRECEDENCE, add_file_option, add_options, read_file, read_options
from qserve.server import Server, listen

_log = logging.getLogger(__name__)
_OPTIONS = (ServerConfig, AccessConfig, LimitsConfig, EngineConfig, DeviceConfig)

_DESCRIPTION = f"""\
Serve a model over the OpenAI API. MODEL is a directory with config.json and weights, or ORG/NAME on the model hub;
without it a small demo model is made once, kept in a cache, and served. {PRECEDENCE}"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = _DESCRIPTION
    parser.add_argument("model", nargs="?", metavar="MODEL", help="a directory or ORG/NAME; by default the demo model")
    add_file_option(parser)
    for config in _OPTIONS:
        add_options(parser, config)


def run(arguments: argparse.Namespace) -> int:
    file = read_file(arguments, (ModelConfig, *_OPTIONS))
    config = read_options(arguments, ServerConfig, file=file)
    set_up_logging(as_json=config.log_json)
    access, limits = read_options(arguments, AccessConfig, file=file), read_options(arguments, LimitsConfig, file=file)
    engine, device = read_options(arguments, EngineConfig, file=file), read_options(arguments, DeviceConfig, file=file)
    model = read_options(arguments, ModelConfig, file=file).model or None
    service = Service()
    app = make_app(service, access=access, limits=limits, ping_seconds=config.ping_seconds)
    server = Server(app, service, config, receive_seconds=limits.receive_seconds)
    listening = listen(config)
    loader = _Loader(model, service, configs=(config, engine, device))
    host, port = listening.getsockname()[:2]
    url = f"{'https' if config.ssl_certfile else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"
    _log.info("listening on %s; the model is being loaded", url)
    loader.start(then=lambda llm: print(_greeting(llm, url), flush=True), on_failure=server.stop)
    server.run(sockets=[listening])
    loader.cancel()
    if loader.failure is not None:
        raise loader.failure
    status = 1 if server.engine_has_died or loader.has_crashed else 0
    if loader.is_loading:
        _leave_at_once(status)
    return status


def _leave_at_once(status: int) -> None:
    """Nothing interrupts a thread in native code, and Python, ending under it, would abort the process."""
    logging.shutdown()
    sys.stdout.flush()
    os._exit(status)


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
        self.is_loading = True

    def start(self, *, then: Callable[[LLM], None], on_failure: Callable[[], None]) -> None:
        threading.Thread(target=self._run, args=(then, on_failure), name="qserve-loader", daemon=True).start()

    def cancel(self) -> None:
        """The server ends before the model is there."""
        if self._demo is not None and self._demo.poll() is None:
            self._demo.terminate()

    def _run(self, then: Callable[[LLM], None], on_failure: Callable[[], None]) -> None:
        try:
            try:
                llm = self._load()
            finally:
                self.is_loading = False
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
        server, engine, device = self._configs
        clock = Clock()
        with without_collections():
            with clock.measure("imports"):
                build = import_module("qserve.build")  # imports torch, which takes the most of a second
            llm: LLM = build.build_llm(model, server=server, engine=engine, device=device, clock=clock)
        return llm

    def _make_demo(self) -> str:
        """The artifact's path is the last line that the maker prints; its progress goes to our own stderr."""
        command = [sys.executable, "-m", "training.cli", "demo"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as self._demo:
            printed, _ = self._demo.communicate()
        if self._demo.returncode:
            raise UsageError("The demo model could not be made; what went wrong stands above. Name a model instead.")
        return printed.strip().splitlines()[-1]


@contextmanager
def without_collections() -> Iterator[None]:
    """What is loaded stays: to look through it for garbage takes 0.2 s of a start, and later 150 ms of every stream."""
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        gc.enable()


def _greeting(llm: LLM, url: str) -> str:
    lines = [
        f"\n{llm.info.name} is served at {url}. Try:\n",
        f"  curl -N {url}/v1/completions -H 'Content-Type: application/json' \\",
        '    -d \'{"prompt": "The capital of France is", "max_tokens": 16, "temperature": 0, "stream": true}\'\n',
    ]
    if llm.template is not None:
        message = '{"role": "user", "content": "What is the capital of France? Answer in one sentence."}'
        lines += [
            f"  curl {url}/v1/chat/completions -H 'Content-Type: application/json' \\",
            f'    -d \'{{"messages": [{message}], "max_tokens": 32, "temperature": 0}}\'\n',
        ]
    lines += [f"  curl {url}/v1/models/{llm.info.name}\n", "End with Ctrl+C."]
    return "\n".join(lines)
