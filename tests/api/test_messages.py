"""/v1/messages with Anthropic's official client on a real socket: the same chat, in content blocks."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import pytest

from qserve.config import AccessConfig, LimitsConfig
from tests.api.conftest import serving
from tests.api.test_tools import HERMES, THINKING, Chat, served

TOOL = {
    "name": "get_weather",
    "description": "The weather of a city.",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
}
STOP = {"name": "stop", "input_schema": {"type": "object"}}
QUESTION = {"role": "user", "content": "What is the weather?"}
GREEDY = {"temperature": 0}


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chat]:
    with served(tmp_path_factory.mktemp("model") / "tiny", HERMES) as chat:
        yield chat


@pytest.fixture(scope="module")
def thinking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chat]:
    with served(tmp_path_factory.mktemp("model") / "tiny", THINKING) as chat:
        yield chat


def client_of(url: str, **options: Any) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=url, **{"api_key": "none", "max_retries": 0, **options})


def ask(chat: Chat, **fields: Any) -> Any:
    extra = {**GREEDY, **fields.pop("extra_body", {})}
    with client_of(chat.url) as client:
        asked: dict[str, Any] = {"model": "tiny", "messages": [QUESTION], "max_tokens": 24, **fields}
        return client.messages.create(**asked, extra_body=extra)


def stream(chat: Chat, **fields: Any) -> tuple[list[Any], Any]:
    """The events as they come, and the message that the client makes of them."""
    with client_of(chat.url) as client:
        asked: dict[str, Any] = {"model": "tiny", "messages": [QUESTION], "max_tokens": 24, **fields}
        with client.messages.stream(**asked, extra_body=GREEDY) as events:
            return list(events), events.get_final_message()


def complete(chat: Chat, messages: list[Any], **fields: Any) -> Any:
    asked: dict[str, Any] = {"max_tokens": 24, "temperature": 0, **fields}
    return chat.client.chat.completions.create(model="tiny", messages=messages, **asked)


def test_it_is_the_same_chat(chat: Chat) -> None:
    blocks = [{"type": "text", "text": "Hello"}, {"type": "text", "text": "Go on."}]
    message = ask(chat, system="Be brief.", messages=[{"role": "user", "content": blocks}])
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello\n\nGo on."}]
    same = complete(chat, messages)
    assert message.content[0].text == same.choices[0].message.content
    usage = message.usage
    assert usage.input_tokens + usage.cache_read_input_tokens == same.usage.prompt_tokens
    assert (message.stop_reason, usage.output_tokens, message.model) == ("max_tokens", 24, "tiny")


def test_every_event_of_a_text(chat: Chat) -> None:
    body = {"messages": [QUESTION], "max_tokens": 12, "stream": True, **GREEDY}
    text = httpx.post(chat.url + "/v1/messages", json=body).text
    frames = [frame.split("\n") for frame in text.removesuffix("\n\n").split("\n\n")]
    events = [json.loads(data.removeprefix("data: ")) for _, data in frames]
    names = [event["type"] for event in events]
    assert [name.removeprefix("event: ") for name, _ in frames] == names
    grown = names.count("content_block_delta")
    assert names == [
        *("message_start", "content_block_start"),
        *["content_block_delta"] * grown,
        *("content_block_stop", "message_delta", "message_stop"),
    ]
    assert events[0]["message"]["content"] == []
    assert events[0]["message"]["stop_reason"] is None
    _, message = stream(chat, max_tokens=12)
    told = "".join(event["delta"]["text"] for event in events[2:-3])
    assert told == message.content[0].text == ask(chat, max_tokens=12).content[0].text
    assert (message.stop_reason, message.usage.output_tokens) == ("max_tokens", 12)


def test_a_stop_sequence_is_told(chat: Chat) -> None:
    text = ask(chat).content[0].text
    stop = text[4:7]
    message = ask(chat, stop_sequences=[stop, "never"])
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", stop)
    assert message.content[0].text == text[: text.index(stop)]


def test_the_last_words_are_gone_on_with(chat: Chat) -> None:
    said = ask(chat, max_tokens=8)
    begun = {"role": "assistant", "content": said.content[0].text}
    counted = complete(chat, [QUESTION, begun], extra_body={"continue_final_message": True}).usage.prompt_tokens
    usage = ask(chat, messages=[QUESTION, begun]).usage
    assert usage.input_tokens + usage.cache_read_input_tokens == counted


def test_a_call_and_its_result(chat: Chat) -> None:
    fields: dict[str, Any] = {"tools": [TOOL, STOP], "max_tokens": 120}
    message = ask(chat, **fields, tool_choice={"type": "tool", "name": "get_weather"})
    (call,) = message.content
    assert (message.stop_reason, call.type, call.name) == ("tool_use", "tool_use", "get_weather")
    assert call.input["city"] in ("Paris", "Rome")
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "No station.", "is_error": True}
    turns = [QUESTION, {"role": "assistant", "content": message.content}, {"role": "user", "content": [result]}]
    after = ask(chat, **fields, messages=turns, tool_choice={"type": "none"})
    function = {"name": call.name, "arguments": json.dumps(call.input)}
    messages = [
        QUESTION,
        {"role": "assistant", "tool_calls": [{"id": call.id, "type": "function", "function": function}]},
        {"role": "tool", "tool_call_id": call.id, "content": "Error: No station."},
    ]
    assert after.content[0].text == complete(chat, messages, max_tokens=120).choices[0].message.content


def test_arguments_stream(chat: Chat) -> None:
    choice = {"type": "any", "disable_parallel_tool_use": True}
    events, message = stream(chat, tools=[TOOL], tool_choice=choice, max_tokens=120)
    (call,) = message.content
    deltas = [event.delta.partial_json for event in events if event.type == "content_block_delta"]
    assert len(deltas) > 3
    assert json.loads("".join(deltas)) == call.input
    assert message.stop_reason == "tool_use"


def test_a_call_that_is_cut_short_has_what_there_was(chat: Chat) -> None:
    choice = {"type": "any", "disable_parallel_tool_use": True}
    whole = ask(chat, tools=[TOOL], tool_choice=choice, max_tokens=120).usage.output_tokens
    message = ask(chat, tools=[TOOL], tool_choice=choice, max_tokens=whole - 18)
    assert (message.stop_reason, message.content[0].type) == ("max_tokens", "tool_use")
    assert isinstance(message.content[0].input, dict)


def test_thoughts_are_blocks(thinking: Chat) -> None:
    message = ask(thinking)
    (thought,) = message.content
    assert (thought.type, thought.signature) == ("thinking", "")
    _, streamed = stream(thinking)
    assert streamed.content[0].thinking == thought.thinking
    turns = [QUESTION, {"role": "assistant", "content": [thought, {"type": "text", "text": "Rain."}]}, QUESTION]
    assert ask(thinking, messages=turns).type == "message"
    hidden = ask(thinking, thinking={"type": "adaptive", "display": "omitted"})
    assert [block.type for block in hidden.content] == ["text"]
    with pytest.raises(anthropic.BadRequestError, match="cannot be told how much to reason"):
        ask(thinking, thinking={"type": "disabled"})


def test_who_never_thinks_need_not_be_told(chat: Chat) -> None:
    assert ask(chat, thinking={"type": "disabled"}).content == ask(chat).content


def test_json_under_a_schema(chat: Chat) -> None:
    wanted = {"format": {"type": "json_schema", "schema": TOOL["input_schema"]}}
    assert set(json.loads(ask(chat, output_config=wanted, max_tokens=120).content[0].text)) == {"city"}


def test_more_than_fits_ends_at_the_end_of_the_context(chat: Chat) -> None:
    message = ask(chat, max_tokens=5000, extra_body={"ignore_eos": True})
    usage = message.usage
    assert message.stop_reason == "model_context_window_exceeded"
    assert usage.input_tokens + usage.cache_read_input_tokens + usage.output_tokens == 512


def test_tokens_are_counted(chat: Chat) -> None:
    fields: dict[str, Any] = {"model": "tiny", "messages": [QUESTION], "system": "Be brief.", "tools": [TOOL]}
    with client_of(chat.url) as client:
        counted = client.messages.count_tokens(**fields).input_tokens
        usage = client.messages.create(**fields, max_tokens=1).usage
    assert counted == usage.input_tokens + usage.cache_read_input_tokens


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"max_tokens": None}, "max_tokens is required"),
        ({"messages": [{"role": "user", "content": []}]}, r"messages\[0\].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, r"messages\[0\].content\[0\]: this model"),
        ({"messages": [{"role": "user", "content": [{"type": "thinking", "thinking": "x"}]}]}, "of the assistant"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "x"}]}]}, "no such call"),
        ({"messages": [{"role": "user", "content": "x" * 9000}]}, "context is 512"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking.type"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, r"tools\[0\].type"),
        ({"tool_choice": {"type": "any"}}, "there are no tools"),
        ({"tool_choice": {"type": "tool"}}, "needs name"),
        ({"stop_sequences": [""]}, "stop_sequences"),
        ({"mcp_servers": [{}]}, "mcp_servers is not supported"),
    ],
)
def test_what_cannot_be_done(chat: Chat, fields: dict[str, Any], words: str) -> None:
    body = {"messages": [QUESTION], "max_tokens": 4, **fields}
    response = httpx.post(chat.url + "/v1/messages", json=body)
    told = response.json()
    assert (response.status_code, told["type"]) == (400, "error")
    assert told["error"]["type"] == "invalid_request_error"
    assert told["request_id"] == response.headers["x-request-id"]
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(told["error"]["message"])


def test_errors_have_the_clients_classes(tokenizer_directory: Path) -> None:
    with serving(tokenizer_directory, access=AccessConfig(api_key=("secret",))) as server:
        fields: dict[str, Any] = {"model": "tiny", "messages": [QUESTION], "max_tokens": 4}
        with client_of(server.url, api_key="wrong") as client, pytest.raises(anthropic.AuthenticationError):
            client.messages.create(**fields)
        with client_of(server.url, api_key="secret") as client:
            assert client.messages.create(**fields).content
            with pytest.raises(anthropic.NotFoundError, match="not_found_error"):
                client.messages.create(**{**fields, "model": "other"})
        with client_of(server.url, api_key=None, auth_token="secret") as client:
            assert client.messages.count_tokens(model="tiny", messages=fields["messages"]).input_tokens
        headers = {"x-api-key": "secret"}
        assert httpx.get(server.url + "/v1/messages", headers=headers).json()["type"] == "error"
        assert "type" not in httpx.get(server.url + "/v1/nothing", headers=headers).json()


def test_an_error_in_the_middle_is_an_event(tokenizer_directory: Path) -> None:
    with serving(tokenizer_directory, limits=LimitsConfig(request_seconds=0.2)) as server:
        server.runner.gate.clear()
        fields: dict[str, Any] = {"model": "tiny", "messages": [QUESTION], "max_tokens": 4}
        with client_of(server.url) as client, pytest.raises(anthropic.APIStatusError, match="timeout_error"):
            list(client.messages.create(**fields, stream=True))
        server.runner.gate.set()
        server.wait_until_idle()
