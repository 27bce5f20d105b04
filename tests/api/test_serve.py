"""`qserve serve` as a process: the port before the model, the words it prints, and how it ends."""

import gc
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from qserve.api.app import make_app
from qserve.api.service import Service
from qserve.config import ServerConfig
from qserve.serve import without_collections
from qserve.server import Server, listen
from tests import tiny
from tests.api.conftest import make_llm, wait_until

COMMAND = [sys.executable, "-m", "qserve.cli", "serve"]
LONG = {"prompt": "Hello", "max_tokens": 500, "stream": True, "ignore_eos": True, "temperature": 0}


class Process:
    """A server in a process of its own, and what it has printed so far."""

    def __init__(self, *arguments: str) -> None:
        self._process = subprocess.Popen(
            [*COMMAND, *arguments, "--port", "0"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.lines.append(line)
        self._process.stdout.close()

    @property
    def printed(self) -> str:
        return "".join(self.lines)

    @property
    def url(self) -> str:
        wait_until(lambda: "listening on" in self.printed or self._process.poll() is not None, seconds=60)
        found = re.search(r"listening on (http://\S+:\d+)", self.printed)
        assert found, self.printed
        return found[1]

    def wait_until_ready(self) -> str:
        url = self.url
        wait_until(lambda: "Try:" in self.printed or self._process.poll() is not None, seconds=120)
        assert httpx.get(url + "/ready").status_code == 200, self.printed
        return url

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    def leave_memory(self, *, mib: int) -> None:
        """Lets the process have no more than this beside what it has."""
        pages = int(Path(f"/proc/{self._process.pid}/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + mib * 2**20
        resource.prlimit(self._process.pid, resource.RLIMIT_AS, (limit, limit))

    def wait(self) -> int:
        status = self._process.wait(timeout=60)
        self._reader.join()
        return status

    def kill(self) -> None:
        self._process.kill()
        self.wait()


@contextmanager
def process(*arguments: str) -> Iterator[Process]:
    running = Process(*arguments)
    try:
        yield running
    finally:
        running.kill()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


class Reader(threading.Thread):
    """One client that reads a stream to its end."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self._url = url
        self.frames: list[str] = []
        self.start()

    def run(self) -> None:
        with httpx.stream("POST", self._url + "/v1/completions", json=LONG, timeout=60) as response:
            for line in response.iter_lines():
                if line:
                    self.frames.append(line.removeprefix("data: "))

    def finish(self) -> list[Any]:
        self.join(60)
        assert self.frames[-1] == "[DONE]"
        return [json.loads(frame) for frame in self.frames[:-1]]


def test_from_the_first_probe_to_a_drained_end(checkpoint: Path) -> None:
    with process(str(checkpoint), "--served-model-name", "mine") as running:
        url = running.url
        assert httpx.get(url + "/health").status_code == 200
        assert httpx.get(url + "/ready").status_code == 503  # torch alone takes longer to import than this
        url = running.wait_until_ready()
        assert "curl" in running.printed
        parts = re.search(r"mine is loaded in ([\d.]+) s \((.*?)\)", running.printed)
        assert parts, running.printed
        seconds = {name: float(number) for name, number in (part.rsplit(" ", 1) for part in parts[2].split(", "))}
        assert list(seconds) == ["imports", "checkpoint", "tokenizer", "kernels", "weights", "warm-up"]
        assert abs(sum(seconds.values()) - float(parts[1])) < 0.05
        assert httpx.get(url + "/v1/models").json()["data"][0]["id"] == "mine"
        readers = [Reader(url) for _ in range(4)]
        wait_until(lambda: all(len(reader.frames) > 3 for reader in readers))
        running.signal(signal.SIGTERM)
        for reader in readers:
            *_, last = reader.finish()
            assert last["choices"][0]["finish_reason"] == "length"
        assert running.wait() == 0, running.printed
        assert "Traceback" not in running.printed


def test_garbage_is_left_alone_while_the_model_is_loaded_and_what_is_there_then_for_ever() -> None:
    before = gc.get_freeze_count()
    try:
        with without_collections():
            assert not gc.isenabled()
        assert gc.isenabled()
        assert gc.get_freeze_count() > before
        with pytest.raises(ValueError, match="broken"), without_collections():
            raise ValueError("broken")
        assert gc.isenabled()
    finally:
        gc.unfreeze()


def test_what_takes_longer_than_the_drain_ends_with_an_error(checkpoint: Path) -> None:
    with process(str(checkpoint), "--drain-seconds", "0", "--kernels", "reference", "--threads", "1") as running:
        reader = Reader(running.wait_until_ready())
        wait_until(lambda: len(reader.frames) > 3)
        running.signal(signal.SIGTERM)
        *_, last = reader.finish()
        assert last["error"]["code"] == "not_ready"
        assert running.wait() == 0, running.printed


def test_a_server_that_is_still_loading_ends_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")  # to read it takes for ever
    with process(str(tmp_path)) as running:
        assert httpx.get(running.url + "/ready").status_code == 503
        running.signal(signal.SIGTERM)
        assert running.wait() == 0, running.printed
        assert "Traceback" not in running.printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/nowhere/at/all"], "does not exist; expected the directory"),
        (["--max-running", "2", "--max-step-tokens", "1", "CHECKPOINT"], "max_step_tokens"),
        (["--max-model-len", "10000", "CHECKPOINT"], "the model's own limit is 512"),
        (["--host", "256.0.0.1"], "Cannot listen on"),
    ],
)
def test_what_the_operator_can_put_right_is_one_line(checkpoint: Path, arguments: list[str], message: str) -> None:
    given = [str(checkpoint) if argument == "CHECKPOINT" else argument for argument in arguments]
    ended = subprocess.run(
        [*COMMAND, *given, "--port", "0"], capture_output=True, text=True, timeout=120, check=False, env=os.environ
    )
    assert ended.returncode == 1, ended.stderr
    assert message in ended.stderr.splitlines()[-1]
    assert "Traceback" not in ended.stderr


def test_a_server_whose_engine_has_died_ends_and_says_so(tokenizer_directory: Path) -> None:
    """A supervisor is to start another, and clients are told in the meantime."""
    llm, runner = make_llm(tokenizer_directory)
    config = ServerConfig(port=0)
    service = Service(llm)
    server = Server(make_app(service), service, config)
    with listen(config) as listening:
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        runner.fault = RuntimeError("the device is on fire")
        port = listening.getsockname()[1]
        response = httpx.post(f"http://127.0.0.1:{port}/v1/completions", json={"prompt": "x"}, timeout=30)
        assert response.json()["error"]["code"] == "engine_dead"
        thread.join(timeout=30)
    assert not thread.is_alive()
    assert server.engine_has_died


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="takes a running process its memory away as Linux can")
def test_a_process_whose_engine_has_died_ends(tmp_path: Path) -> None:
    """Whoever streams or waits is told, and the process ends by itself, not with 0."""
    wide = tiny.make_checkpoint(tmp_path / "wide", intermediate_size=32768)  # a prompt takes more than what is left
    with process(str(wide), "--kernels", "reference", "--threads", "1") as running:
        url = running.wait_until_ready()
        reader = Reader(url)
        wait_until(lambda: len(reader.frames) > 3)
        running.leave_memory(mib=32)
        response = httpx.post(url + "/v1/completions", json={"prompt": [5] * 400}, timeout=60)
        assert (response.status_code, response.json()["error"]["code"]) == (503, "engine_dead")
        *_, last = reader.finish()
        assert last["error"]["code"] == "engine_dead"
        assert running.wait() == 1
        assert "the engine thread has ended" in running.printed


def test_no_connection_outlives_the_server(tokenizer_directory: Path) -> None:
    """Of a client that reads nothing, while more is to be sent than fits on the way."""
    llm, _ = make_llm(tokenizer_directory)
    config = ServerConfig(port=0)
    service = Service(llm)
    server = Server(make_app(service), service, config)
    with listen(config) as listening, socket.socket() as wire:
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        wire.connect(listening.getsockname())
        body = json.dumps({**LONG, "prompt": ["Hello"] * 50, "logprobs": 20})
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
        wire.sendall(f"{head}Content-Type: application/json\r\n\r\n{body}".encode())
        wait_until(lambda: llm.loop.stats.num_generated_tokens > 6000, seconds=60)
        server.force_exit = True
        server.stop()
        thread.join()
    llm.close()
    assert not server.server_state.connections
