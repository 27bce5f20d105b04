"""Scores as evaluation harnesses ask for them, each of their expectations against transformers' own numbers."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests import tiny
from tests.api.conftest import Tiny

END = 2  # the tiny tokenizer's <|im_end|>
CONTEXT = 512


@pytest.fixture(scope="module")
def model(tiny_server: Tiny) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_server.directory, dtype=torch.float32)


@pytest.fixture
def client(tiny_server: Tiny) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=tiny_server.url, timeout=60) as client:
        yield client
    tiny_server.wait_until_idle()


def ids_of(server: Tiny, length: int, *, start: int = 0) -> list[int]:
    return server.llm.tokenizer.encode(tiny.prose()[start : start + 6 * length])[:length]


def score(client: httpx.Client, prompts: list[list[int]], **fields: Any) -> list[dict[str, Any]]:
    """The harness's own request."""
    asked = {"prompt": prompts, "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True, **fields}
    response = client.post("/v1/completions", json=asked)
    assert response.status_code == 200, response.text
    return [choice["logprobs"] for choice in sorted(response.json()["choices"], key=lambda choice: choice["index"])]


@torch.inference_mode()
def reference(model: Any, ids: list[int]) -> torch.Tensor:
    """Log-probabilities of what follows each position: (tokens, vocabulary)."""
    logprobs: torch.Tensor = model(torch.tensor([ids])).logits[0].log_softmax(dim=-1)
    return logprobs


def check(model: Any, ids: list[int], found: dict[str, Any]) -> None:
    expected = reference(model, ids)
    values, tops = found["token_logprobs"][1:-1], found["top_logprobs"][1:-1]
    torch.testing.assert_close(torch.tensor(values), expected[torch.arange(len(ids) - 1), ids[1:]], atol=1e-3, rtol=0)
    for row, (value, top) in enumerate(zip(values, tops, strict=True)):
        is_greedy = value == max(top.values())  # exact, as the harness compares
        assert is_greedy == (int(expected[row].argmax()) == ids[row + 1])


def test_several_prompts_of_any_length(client: httpx.Client, tiny_server: Tiny, model: Any) -> None:
    prompts = [ids_of(tiny_server, length, start=50 * length) for length in (2, 17, 200, 511)]
    for ids, found in zip(prompts, score(client, prompts), strict=True):
        assert {len(values) for values in found.values()} == {len(ids) + 1}
        check(model, ids, found)


def test_again_from_a_warm_cache_and_beside_others_bit_for_bit(client: httpx.Client, tiny_server: Tiny) -> None:
    ids = ids_of(tiny_server, 120)
    alone = score(client, [ids])[0]["token_logprobs"]
    assert score(client, [ids])[0]["token_logprobs"] == alone
    assert score(client, [ids, ids_of(tiny_server, 90, start=999), ids])[2]["token_logprobs"] == alone


@pytest.mark.parametrize("ignore_eos", [True, False])
def test_an_end_token_that_is_made_counts_as_an_entry(
    client: httpx.Client, tiny_server: Tiny, ignore_eos: bool
) -> None:
    ids = ids_of(tiny_server, 20)
    (found,) = score(client, [ids], logit_bias={str(END): 100}, ignore_eos=ignore_eos)
    assert len(found["token_logprobs"]) == 21
    assert found["tokens"][-1] == "<|im_end|>"


def test_end_tokens_in_the_prompt_are_scored_as_any_other(client: httpx.Client, tiny_server: Tiny, model: Any) -> None:
    ids = [END, *ids_of(tiny_server, 10), END, *ids_of(tiny_server, 10), END]
    check(model, ids, score(client, [ids])[0])


def test_without_a_token_made(client: httpx.Client, tiny_server: Tiny, model: Any) -> None:
    """Older harnesses; a prompt may then fill the context."""
    for ids in (ids_of(tiny_server, 30), ids_of(tiny_server, CONTEXT)):
        (found,) = score(client, [ids], max_tokens=0, logprobs=5)
        assert {len(values) for values in found.values()} == {len(ids)}
        expected = reference(model, ids)[torch.arange(len(ids) - 1), ids[1:]]
        torch.testing.assert_close(torch.tensor(found["token_logprobs"][1:]), expected, atol=1e-3, rtol=0)


def test_prompt_logprobs_are_the_same_numbers_with_ranks(client: httpx.Client, tiny_server: Tiny, model: Any) -> None:
    ids = ids_of(tiny_server, 40)
    values = score(client, [ids])[0]["token_logprobs"]
    fields = {"prompt": ids, "max_tokens": 1, "prompt_logprobs": 3}
    first, *rows = client.post("/v1/completions", json=fields).json()["choices"][0]["prompt_logprobs"]
    assert first is None
    expected = reference(model, ids)
    for position, row in enumerate(rows):
        own = row[str(ids[position + 1])]
        assert own["logprob"] == values[position + 1]
        assert own["rank"] == int((expected[position] > expected[position, ids[position + 1]]).sum()) + 1
        assert {str(token) for token in expected[position].topk(3).indices.tolist()} <= set(row)
        assert 3 <= len(row) <= 4


def test_the_remote_tokenizer_of_the_harness(client: httpx.Client) -> None:
    special = client.get("/tokenizer_info").json()
    assert special["eos_token"] == "<|im_end|>"
    text = "naïve 東京 <|im_end|>"
    tokens = client.post("/tokenize", json={"prompt": text, "add_special_tokens": False}).json()["tokens"]
    assert tokens[-1] == END
    assert client.post("/detokenize", json={"tokens": tokens}).json() == {"prompt": text}
