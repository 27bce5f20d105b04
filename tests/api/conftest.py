"""A real server on a real socket, over a fake device or over a tiny model."""

import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import pytest

from qserve.api.app import make_app
from qserve.api.service import Service
from qserve.build import build_llm
from qserve.checkpoint.save import PROVENANCE_FILE
from qserve.config import AccessConfig, DeviceConfig, EngineConfig, LimitsConfig, ServerConfig
from qserve.engine.engine import Engine
from qserve.engine.loop import EngineLoop
from qserve.engine.scheduler import Scheduler
from qserve.llm import LLM, ModelInfo
from qserve.metrics import Metrics
from qserve.server import Server as HttpServer
from qserve.server import listen
from qserve.text.templates import load_chat_template
from qserve.text.tokenizer import load_tokenizer
from tests import tiny
from tests.api.fake_runner import FakeRunner

CONTEXT = 512


@dataclass
class Server:
    """A running server and what the tests look at behind it."""

    url: str
    address: tuple[str, int]
    llm: LLM
    runner: FakeRunner

    @property
    def is_idle(self) -> bool:
        """No request runs or waits, and no block is held."""
        stats = self.llm.loop.stats
        return not (stats.num_running or stats.num_waiting or stats.num_held_blocks)

    @property
    def num_given_up(self) -> int:
        """Requests that were closed before they were finished."""
        found = re.search(
            r'engine="0",finished_reason="abort",model_name="tiny"} (\d+)', self.llm.metrics.render().decode()
        )
        return int(found[1]) if found else 0

    def wait_until_idle(self) -> None:
        wait_until(lambda: self.is_idle)


def wait_until(condition: Callable[[], bool], *, seconds: float = 10) -> None:
    """Fails when it does not come about."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "what was waited for never came about"
        time.sleep(0.002)


def make_llm(
    directory: Path,
    *,
    engine: EngineConfig | None = None,
    other_names: tuple[str, ...] = (),
    metrics_prefix: str = "qserve",
) -> tuple[LLM, FakeRunner]:
    config = engine or EngineConfig(max_running=64, max_step_tokens=256)
    runner = FakeRunner(tiny.VOCABULARY_SIZE)
    loop = EngineLoop(Engine(Scheduler(config, num_blocks=2048), runner)).start()
    tokenizer = load_tokenizer(directory)
    llm = LLM(
        info=ModelInfo(
            name="tiny",
            other_names=other_names,
            max_model_len=CONTEXT,
            vocabulary_size=tiny.VOCABULARY_SIZE,
            created=1700000000,
            details={"recipe": "none"},
        ),
        tokenizer=tokenizer,
        template=load_chat_template(directory, tokenizer.special),
        loop=loop,
        metrics=Metrics(
            "tiny", lambda: loop.stats, max_model_len=CONTEXT, prefix=metrics_prefix, cache={"block_size": 16}
        ),
    )
    return llm, runner


@contextmanager
def listening(
    service: Service,
    *,
    access: AccessConfig | None = None,
    limits: LimitsConfig | None = None,
    ping_seconds: float = 0,
) -> Iterator[tuple[str, int]]:
    """The server in a thread, on a free port."""
    limits = limits or LimitsConfig()
    config = ServerConfig(port=0, drain_seconds=5)
    app = make_app(service, access=access, limits=limits, ping_seconds=ping_seconds)
    server = HttpServer(app, service, config, receive_seconds=limits.receive_seconds)
    with listen(config) as sock:
        thread = threading.Thread(target=server.run, args=([sock],))
        thread.start()
        try:
            yield sock.getsockname()
        finally:
            server.stop()
            thread.join()


@contextmanager
def serving(
    directory: Path,
    *,
    engine: EngineConfig | None = None,
    access: AccessConfig | None = None,
    limits: LimitsConfig | None = None,
    metrics_prefix: str = "qserve",
    ping_seconds: float = 0,
) -> Iterator[Server]:
    llm, runner = make_llm(directory, engine=engine, metrics_prefix=metrics_prefix)
    try:
        with listening(Service(llm), access=access, limits=limits, ping_seconds=ping_seconds) as address:
            yield Server(f"http://{address[0]}:{address[1]}", address, llm, runner)
    finally:
        runner.gate.set()
        llm.close()


@pytest.fixture(scope="session")
def tokenizer_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    tiny.make_tokenizer(directory)
    return directory


@pytest.fixture(scope="session")
def shared_server(tokenizer_directory: Path) -> Iterator[Server]:
    with serving(tokenizer_directory) as server:
        yield server


@pytest.fixture
def server(shared_server: Server) -> Iterator[Server]:
    """One server for all tests; each leaves it idle, with every block free."""
    yield replace(shared_server)
    shared_server.runner.gate.set()
    shared_server.wait_until_idle()


@pytest.fixture
def client(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=30) as client:
        yield client


@dataclass
class Tiny:
    """A server over a tiny model, all of it real."""

    url: str
    address: tuple[str, int]
    llm: LLM
    directory: Path

    def wait_until_idle(self) -> None:
        wait_until(lambda: self.llm.loop.stats.num_held_blocks == 0 == self.llm.loop.stats.num_running)


@pytest.fixture(scope="session")
def tiny_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tiny]:
    directory = tiny.make_checkpoint(tmp_path_factory.mktemp("model") / "tiny")
    (directory / PROVENANCE_FILE).write_text('{"method": "made by a test", "loss": {"artifact": 1.5}}')
    llm = build_llm(directory, engine=EngineConfig(max_running=16), device=DeviceConfig(kv_cache_mb=8))
    try:
        with listening(Service(llm)) as address:
            yield Tiny(f"http://{address[0]}:{address[1]}", address, llm, directory)
    finally:
        llm.close()
