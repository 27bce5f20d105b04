"""The official client's own habits: retries, timeouts, errors by class, typed answers, many requests at once."""

import asyncio
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import openai
import pydantic
import pytest

from qserve.api.service import Service
from qserve.config import AccessConfig, EngineConfig
from tests.api.conftest import Tiny, listening, make_llm, serving, wait_until


def client_of(url: str, **options: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=url + "/v1", **{"api_key": "none", "max_retries": 0, **options})


@pytest.fixture
def client(tiny_server: Tiny) -> Iterator[openai.OpenAI]:
    with client_of(tiny_server.url) as client:
        yield client
    tiny_server.wait_until_idle()


class Weather(pydantic.BaseModel):
    city: Literal["Paris", "Rome"]
    sunny: bool


MESSAGES: list[Any] = [{"role": "user", "content": "What is the weather?"}]


def test_a_typed_answer(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(
        model="tiny", messages=MESSAGES, response_format=Weather, max_tokens=200, seed=5
    )
    assert isinstance(answer.choices[0].message.parsed, Weather)


def test_a_typed_tool_is_strict(client: openai.OpenAI) -> None:
    tool = openai.pydantic_function_tool(Weather)
    answer = client.chat.completions.parse(
        model="tiny", messages=MESSAGES, tools=[tool], tool_choice="required", parallel_tool_calls=False, max_tokens=200
    )
    calls = answer.choices[0].message.tool_calls
    assert calls is not None
    assert isinstance(calls[0].function.parsed_arguments, Weather)


def test_a_full_queue_is_tried_again(tokenizer_directory: Path) -> None:
    engine = EngineConfig(max_running=1, max_queued=0, max_step_tokens=64)
    with serving(tokenizer_directory, engine=engine) as server, client_of(server.url) as client:
        server.runner.gate.clear()
        first = threading.Thread(target=lambda: client.completions.create(model="tiny", prompt="x"))
        first.start()
        wait_until(lambda: server.llm.loop.stats.num_running == 1)
        with pytest.raises(openai.RateLimitError) as refused:
            client.completions.create(model="tiny", prompt="y")
        assert refused.value.code == "queue_full"
        assert refused.value.request_id
        threading.Timer(0.2, server.runner.gate.set).start()
        answer = client.with_options(max_retries=4).completions.create(model="tiny", prompt="y")
        assert answer.choices[0].finish_reason
        first.join()


def test_a_server_that_is_loading_is_tried_again(tokenizer_directory: Path) -> None:
    service, (llm, _) = Service(), make_llm(tokenizer_directory)
    with listening(service) as (host, port), client_of(f"http://{host}:{port}") as client:
        with pytest.raises(openai.InternalServerError) as loading:
            client.models.list()
        assert loading.value.status_code == 503
        threading.Timer(0.2, service.open, [llm]).start()
        begin = time.monotonic()
        assert client.with_options(max_retries=3).models.list().data[0].id == "tiny"
        assert time.monotonic() - begin > 0.2


def test_what_was_wrong_is_not_tried_again(client: openai.OpenAI) -> None:
    begin = time.monotonic()
    patient = client.with_options(max_retries=5)
    with pytest.raises(openai.BadRequestError) as bad:
        patient.completions.create(model="tiny", prompt="x", n=0)
    assert (bad.value.param, bad.value.type, bad.value.code) == ("n", "invalid_request_error", None)
    with pytest.raises(openai.NotFoundError):
        patient.models.retrieve("other")
    assert time.monotonic() - begin < 5


def test_a_wrong_key(tokenizer_directory: Path) -> None:
    with serving(tokenizer_directory, access=AccessConfig(api_key=("secret",))) as server:
        with client_of(server.url) as client, pytest.raises(openai.AuthenticationError) as refused:
            client.models.list()
        assert refused.value.code == "invalid_api_key"
        with client_of(server.url, api_key="secret") as client:
            assert client.models.list().data


def test_a_client_that_waits_no_longer_leaves_nothing_behind(tokenizer_directory: Path) -> None:
    with serving(tokenizer_directory) as server, client_of(server.url) as client:
        server.runner.gate.clear()
        with pytest.raises(openai.APITimeoutError):
            client.with_options(timeout=0.3).completions.create(model="tiny", prompt="x", max_tokens=400)
        server.runner.gate.set()
        server.wait_until_idle()


def test_many_streams_at_once(tiny_server: Tiny) -> None:
    async def ask(client: openai.AsyncOpenAI, number: int) -> str:
        fields: dict[str, Any] = {"model": "tiny", "prompt": f"Number {number}", "max_tokens": 20, "temperature": 0}
        if number % 2:
            return (await client.completions.create(**fields)).choices[0].text
        stream = await client.completions.create(**fields, stream=True)
        return "".join([choice.text async for chunk in stream for choice in chunk.choices])

    async def main() -> list[str]:
        url = tiny_server.url + "/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(ask(client, number // 2) for number in range(24)))

    texts = asyncio.run(main())
    assert texts[::2] == texts[1::2]
