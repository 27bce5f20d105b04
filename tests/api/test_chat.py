"""/v1/chat/completions: the model's template, and the shapes that chat clients read."""

import json
from typing import Any

import httpx
import pytest

from tests.api.conftest import Server
from tests.api.test_completions import stream

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi, 東京"}]


def chat(client: httpx.Client, **fields: Any) -> dict[str, Any]:
    fields = {"ignore_eos": True, "messages": MESSAGES, "max_tokens": 12, **fields}
    response = client.post("/v1/chat/completions", json=fields)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def prompt_text(server: Server, client: httpx.Client, **fields: Any) -> str:
    (choice,) = chat(client, return_token_ids=True, **fields)["choices"]
    return server.llm.tokenizer.decode(choice["prompt_token_ids"], skip_special_tokens=False)


def test_the_answer_has_openais_shape(client: httpx.Client) -> None:
    answer = chat(client)
    assert answer["object"] == "chat.completion"
    assert answer["id"].startswith("chatcmpl-")
    (choice,) = answer["choices"]
    assert set(choice["message"]) == {"role", "content", "refusal"}
    assert choice["message"]["role"] == "assistant"
    assert choice["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 12


def test_the_prompt_is_the_templates_with_no_second_beginning(server: Server, client: httpx.Client) -> None:
    expected = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi, 東京<|im_end|>\n<|im_start|>assistant\n"
    assert prompt_text(server, client) == expected
    closed = expected.removesuffix("<|im_start|>assistant\n")
    assert prompt_text(server, client, add_generation_prompt=False) == closed


def test_content_in_parts_is_text(server: Server, client: httpx.Client) -> None:
    parts = [{"type": "text", "text": "Hi,"}, {"type": "text", "text": "you"}]
    text = prompt_text(server, client, messages=[{"role": "user", "content": parts}])
    assert "user\nHi,\nyou<|im_end|>" in text


def test_a_final_message_is_continued(server: Server, client: httpx.Client) -> None:
    messages = [*MESSAGES, {"role": "assistant", "content": "Well, "}]
    assert prompt_text(server, client, messages=messages, continue_final_message=True).endswith("assistant\nWell, ")


def test_streamed_text_is_the_whole_text(client: httpx.Client) -> None:
    fields: dict[str, Any] = {"messages": MESSAGES, "n": 2, "seed": 4, "max_tokens": 20}
    whole = chat(client, **fields)["choices"]
    chunks = stream(client, "/v1/chat/completions", **fields)
    for choice in whole:
        own = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        assert "".join(c["delta"].get("content", "") for c in own) == choice["message"]["content"]
        assert [c["delta"].get("role") for c in own] == ["assistant"] + [None] * (len(own) - 1)
        assert [c["finish_reason"] for c in own] == [None] * (len(own) - 1) + ["length"]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}


def test_a_stream_that_ends_at_once_still_has_a_role(client: httpx.Client) -> None:
    (chunk,) = stream(client, "/v1/chat/completions", messages=MESSAGES, ignore_eos=False, logit_bias={"2": 100})
    assert chunk["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert chunk["choices"][0]["finish_reason"] == "stop"


def test_logprobs_carry_the_bytes_of_the_text(client: httpx.Client) -> None:
    (choice,) = chat(client, logprobs=True, top_logprobs=3, max_tokens=40)["choices"]
    tokens = choice["logprobs"]["content"]
    assert all(len(token["top_logprobs"]) == 3 for token in tokens)
    joined = bytes(byte for token in tokens if not token["token"].startswith("<|") for byte in token["bytes"])
    assert joined.decode(errors="replace") == choice["message"]["content"]
    (plain,) = chat(client, logprobs=True)["choices"]
    assert plain["logprobs"]["content"][0]["top_logprobs"] == []


def test_by_default_an_answer_may_fill_the_context(client: httpx.Client) -> None:
    answer = chat(client, max_tokens=None)
    assert answer["usage"]["total_tokens"] == 512
    assert chat(client, max_tokens=9, max_completion_tokens=5)["usage"]["completion_tokens"] == 5


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content"),
        ({"messages": [{"role": "user"}]}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"tools": [{"type": "retrieval"}]}, "tools[0].type"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
        ({"messages": [{"role": "user", "content": None}], "continue_final_message": True}, "continue_final_message"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(client: httpx.Client, fields: dict[str, Any], param: str) -> None:
    response = client.post("/v1/chat/completions", json={"messages": MESSAGES, **fields})
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param


def test_what_asks_for_nothing_is_taken(client: httpx.Client) -> None:
    neutral = {"tools": [], "tool_choice": "auto", "response_format": {"type": "text"}, "store": False, "user": "me"}
    assert chat(client, **neutral)["choices"] == chat(client)["choices"]


def test_tokenize_shows_the_chat_prompt(client: httpx.Client, server: Server) -> None:
    tokens = client.post("/tokenize", json={"messages": MESSAGES, "return_token_strs": True}).json()
    assert server.llm.tokenizer.decode(tokens["tokens"], skip_special_tokens=False) == prompt_text(server, client)
    assert tokens["count"] == len(tokens["tokens"]) == len(tokens["token_strs"])
    assert json.dumps(tokens)
