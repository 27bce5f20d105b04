"""The whole of it, over a tiny model: many clients at once, the official client, and transformers as the oracle."""

import asyncio
import json
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qserve.engine.request import SamplingParams
from qserve.generation import GenerationOptions
from tests import tiny
from tests.api.conftest import Tiny

PROMPTS = ["The import system", "A list of", "Python is", "def f(", "naïve 東京", "An object's type", "with open", "0x"]


@pytest.fixture
def server(tiny_server: Tiny) -> Tiny:
    return tiny_server


@pytest.fixture
def client(server: Tiny) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
        yield client
    server.wait_until_idle()


@pytest.fixture(scope="module")
def model(tiny_server: Tiny) -> Any:
    """transformers' own, as the oracle."""
    return AutoModelForCausalLM.from_pretrained(tiny_server.directory, dtype=torch.float32)


def greedy(model: Any, server: Tiny, prompt: str, max_tokens: int) -> str:
    tokenizer = AutoTokenizer.from_pretrained(server.directory)
    ids = tokenizer(prompt, return_tensors="pt")
    made = model.generate(**ids, max_new_tokens=max_tokens, do_sample=False)[0]
    text: str = tokenizer.decode(made[ids["input_ids"].shape[1] :], skip_special_tokens=True)
    return text


@pytest.mark.parametrize("prompt", PROMPTS[:3])
def test_greedy_text_is_that_of_transformers(server: Tiny, client: openai.OpenAI, model: Any, prompt: str) -> None:
    answer = client.completions.create(model="tiny", prompt=prompt, max_tokens=32, temperature=0)
    assert answer.choices[0].text == greedy(model, server, prompt, 32)


class TestOfficialClient:
    def test_completions(self, client: openai.OpenAI) -> None:
        answer = client.completions.create(model="tiny", prompt=PROMPTS[:2], max_tokens=8, n=2, seed=1, logprobs=2)
        assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
        assert answer.usage is not None
        assert answer.usage.completion_tokens <= 32
        logprobs = answer.choices[0].logprobs
        assert logprobs is not None
        assert logprobs.tokens is not None
        assert 1 <= len(logprobs.tokens) <= 8

    def test_streamed_completions(self, client: openai.OpenAI) -> None:
        fields: dict[str, Any] = {"model": "tiny", "prompt": PROMPTS[2], "max_tokens": 32, "temperature": 0}
        whole = client.completions.create(**fields).choices[0]
        chunks = list(client.completions.create(**fields, stream=True, stream_options={"include_usage": True}))
        assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == whole.text
        assert chunks[-1].usage is not None
        assert chunks[-2].choices[0].finish_reason == whole.finish_reason

    def test_chat(self, client: openai.OpenAI) -> None:
        fields: dict[str, Any] = {
            "model": "tiny",
            "messages": [{"role": "user", "content": "Hello"}],
            "max_completion_tokens": 24,
            "temperature": 0,
        }
        whole = client.chat.completions.create(**fields, logprobs=True, top_logprobs=2)
        assert whole.choices[0].logprobs is not None
        assert whole.choices[0].logprobs.content
        content = whole.choices[0].message.content
        assert content
        with client.chat.completions.stream(**fields, stop=content[8:10]) as events:
            for _ in events:
                pass
            final = events.get_final_completion().choices[0]
        assert final.message.content == content[: content.index(content[8:10])]
        assert final.finish_reason == "stop"

    def test_models(self, client: openai.OpenAI) -> None:
        assert [model.id for model in client.models.list()] == ["tiny"]
        details = client.models.retrieve("tiny").model_dump()
        assert details["bytes"]["total"] > 0
        assert details["recipe"] is None
        assert (details["loss"], details["provenance"]["method"]) == ({"artifact": 1.5}, "made by a test")
        assert details["kernels"]

    def test_errors(self, client: openai.OpenAI) -> None:
        with pytest.raises(openai.NotFoundError) as missing:
            client.completions.create(model="gpt-4", prompt="x")
        assert missing.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError) as bad:
            client.completions.create(model="tiny", prompt="x", temperature=3)
        assert bad.value.param == "temperature"
        with pytest.raises(openai.BadRequestError) as long:
            client.completions.create(model="tiny", prompt="x", max_tokens=600)
        assert long.value.code == "context_length_exceeded"


async def read_some(server: Tiny, prompt: str, *, frames: int, max_tokens: int) -> str:
    """Reads a stream to its end, or hangs up after so many frames."""
    body = json.dumps(
        {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "stream": True, "ignore_eos": True}
    ).encode()
    reader, writer = await asyncio.open_connection(*server.address)
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"
    writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    text = ""
    async for line in reader:
        if line.startswith(b"data: {"):
            text += json.loads(line[6:])["choices"][0]["text"]
            frames -= 1
            if frames == 0:
                break
    writer.close()
    return text


def test_half_of_32_clients_hang_up_and_the_rest_get_the_text_they_get_alone(server: Tiny) -> None:
    prompts = [f"{PROMPTS[number % len(PROMPTS)]} {number}" for number in range(32)]

    async def alone() -> list[str]:
        return [await read_some(server, prompt, frames=-1, max_tokens=64) for prompt in prompts[::2]]

    async def together() -> list[str]:
        calls = [
            read_some(
                server, prompt, frames=-1 if number % 2 == 0 else 1 + number // 2, max_tokens=64 + number % 2 * 300
            )
            for number, prompt in enumerate(prompts)
        ]
        return (await asyncio.gather(*calls))[::2]

    expected = asyncio.run(alone())
    assert asyncio.run(together()) == expected
    server.wait_until_idle()
    assert server.llm.loop.stats.num_aborted >= 16


def test_scores_are_those_of_transformers(server: Tiny, model: Any) -> None:
    """As lm-evaluation-harness asks; the first time, and again when the prefix is in the cache."""
    ids = server.llm.tokenizer.encode(tiny.prose()[:400])[:120]
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0].log_softmax(-1)[torch.arange(len(ids) - 1), ids[1:]]
    for _ in range(2):
        fields = {"prompt": [ids], "max_tokens": 1, "logprobs": 1, "echo": True, "temperature": 0, "seed": 1234}
        choice = httpx.post(server.url + "/v1/completions", json=fields).json()["choices"][0]
        found = choice["logprobs"]["token_logprobs"]
        assert len(found) == len(ids) + 1
        torch.testing.assert_close(torch.tensor(found[1:-1]), expected, atol=1e-3, rtol=0)


def test_from_python(server: Tiny, model: Any) -> None:
    """The in-process interface: whole texts, and a stream that is left early."""
    (text,) = server.llm.generate([PROMPTS[0]], max_tokens=16, temperature=0)
    assert text == greedy(model, server, PROMPTS[0], 16)

    async def first_piece() -> str:
        options = GenerationOptions(sampling=SamplingParams(max_tokens=400, temperature=0), ignore_eos=True)
        async for delta in server.llm.stream(server.llm.encode(PROMPTS[0]), options):
            return delta.text
        raise AssertionError

    assert text.startswith(asyncio.run(first_piece()))
    server.wait_until_idle()


def test_a_connection_without_a_request_does_not_matter(server: Tiny) -> None:
    with socket.create_connection(server.address):
        assert httpx.get(server.url + "/health").status_code == 200
