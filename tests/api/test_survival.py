"""The scenarios of bench/survival.py, small; and an engine that dies under its clients."""

import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from bench.survival import SCENARIOS, Target
from qserve.config import EngineConfig, LimitsConfig
from tests.api.conftest import Server, serving, wait_until


@pytest.fixture(scope="module")
def strained(tokenizer_directory: Path) -> Iterator[Server]:
    engine = EngineConfig(max_running=4, max_step_tokens=64, max_queued=16)
    with serving(tokenizer_directory, engine=engine, limits=LimitsConfig(receive_seconds=1)) as server:
        yield server


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_scenario(strained: Server, scenario: str) -> None:
    with httpx.Client() as client:
        url = strained.url
        target = Target(url=url, client=client, receive_seconds=1, num_slow=12, num_flood=200, body_mib=1)
        target.check_answers()
        SCENARIOS[scenario](target)
        strained.wait_until_idle()
        target.check_answers()


def test_everybody_is_told_when_the_engine_dies(tokenizer_directory: Path) -> None:
    """Those who stream, those who wait for the whole, and those who are still in the queue."""
    with serving(tokenizer_directory, engine=EngineConfig(max_running=4, max_step_tokens=64)) as server:
        server.runner.gate.clear()
        answers: list[httpx.Response] = []

        def ask(number: int) -> None:
            body = {"prompt": "x", "max_tokens": 50, "stream": number % 2 == 0}
            answers.append(httpx.post(server.url + "/v1/completions", json=body, timeout=30))

        clients = [threading.Thread(target=ask, args=(number,)) for number in range(12)]
        clients[0].start()  # one that streams has begun before anything goes wrong
        wait_until(lambda: server.llm.loop.stats.num_running > 0)
        for client in clients[1:]:
            client.start()
        server.runner.fault = RuntimeError("the device is on fire")
        server.runner.gate.set()
        for client in clients:
            client.join(30)
        assert len(answers) == 12
        assert all("engine_dead" in answer.text for answer in answers)
        assert sorted({answer.status_code for answer in answers}) == [200, 503]
        server.runner.fault = None
