"""/v1/responses with the official client on a real socket: the same chat, in items."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import httpx
import openai
import pydantic
import pytest

from qserve.config import LimitsConfig
from tests.api.conftest import serving
from tests.api.test_tools import HERMES, THINKING, Chat, served

TOOL = {
    "type": "function",
    "name": "get_weather",
    "parameters": {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
    "strict": False,
}
STOP = {"type": "function", "name": "stop", "parameters": None, "strict": None}
ITEMS: list[Any] = [{"role": "user", "content": [{"type": "input_text", "text": "What is the weather?"}]}]


class Weather(pydantic.BaseModel):
    city: Literal["Paris", "Rome"]
    sunny: bool


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chat]:
    with served(tmp_path_factory.mktemp("model") / "tiny", HERMES) as chat:
        yield chat


def ask(chat: Chat, **fields: Any) -> Any:
    fields = {"model": "tiny", "input": ITEMS, "max_output_tokens": 24, "temperature": 0, **fields}
    return chat.client.responses.create(**fields)


def test_it_is_the_same_chat(chat: Chat) -> None:
    response = ask(chat, instructions="Be brief.", input="Hello", top_p=0.9, metadata={"of": "a test"})
    messages: list[Any] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    same = chat.client.chat.completions.create(model="tiny", messages=messages, max_tokens=24, temperature=0)
    assert response.output_text == same.choices[0].message.content
    assert (response.usage.input_tokens, response.usage.output_tokens) == (same.usage.prompt_tokens, 24)
    assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert response.output[0].status == "incomplete"
    assert (response.instructions, response.metadata, response.top_p) == ("Be brief.", {"of": "a test"}, 0.9)
    assert (response.store, response.object, response.model) == (False, "response", "tiny")


def test_every_event_of_a_text(chat: Chat) -> None:
    events = list(ask(chat, stream=True, include=["message.output_text.logprobs"], top_logprobs=2))
    names = [event.type.removeprefix("response.") for event in events]
    grown = names.count("output_text.delta")
    assert names == [
        *("created", "in_progress", "output_item.added", "content_part.added"),
        *["output_text.delta"] * grown,
        *("output_text.done", "content_part.done", "output_item.done", "incomplete"),
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    whole = ask(chat, include=["message.output_text.logprobs"], top_logprobs=2)
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    assert "".join(event.delta for event in deltas) == whole.output_text == events[-1].response.output_text
    assert {event.item_id for event in deltas} == {events[-1].response.output[0].id}
    told = [entry.token for event in deltas for entry in event.logprobs]
    scores = whole.output[0].content[0].logprobs
    assert told == [entry.token for entry in scores]
    assert len(scores) == 24
    assert len(scores[0].top_logprobs) == 2


def test_frames_have_names_and_nothing_follows_the_last(chat: Chat) -> None:
    body = {"input": "x", "stream": True, "max_output_tokens": 3}
    text = httpx.post(chat.url + "/v1/responses", json=body).text
    *frames, end = text.split("\n\n")
    assert end == ""
    for frame in frames:
        name, data = frame.split("\n")
        assert name == f"event: {json.loads(data.removeprefix('data: '))['type']}"


def test_a_typed_answer(chat: Chat) -> None:
    response = chat.client.responses.parse(model="tiny", input="x", text_format=Weather, max_output_tokens=200)
    assert isinstance(response.output_parsed, Weather)
    assert (response.status, response.output[0].status) == ("completed", "completed")
    with chat.client.responses.stream(model="tiny", input="x", text_format=Weather, max_output_tokens=200) as stream:
        assert isinstance(stream.get_final_response().output_parsed, Weather)


def test_a_call_and_its_result(chat: Chat) -> None:
    fields: dict[str, Any] = {"tools": [TOOL, STOP], "max_output_tokens": 120}
    choice = {"type": "function", "name": "get_weather"}
    (call,) = ask(chat, **fields, tool_choice=choice).output
    assert (call.type, call.name, call.status) == ("function_call", "get_weather", "completed")
    assert json.loads(call.arguments)["city"] in ("Paris", "Rome")
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "Sunny."}
    after = ask(chat, **fields, input=[*ITEMS, call.to_dict(), result], tool_choice="none")
    function = {"name": call.name, "arguments": call.arguments}
    messages: list[Any] = [
        {"role": "user", "content": "What is the weather?"},
        {"role": "assistant", "tool_calls": [{"id": call.call_id, "type": "function", "function": function}]},
        {"role": "tool", "tool_call_id": call.call_id, "content": "Sunny."},
    ]
    same = chat.client.chat.completions.create(model="tiny", messages=messages, max_tokens=120, temperature=0)
    assert (after.output_text, after.usage.input_tokens) == (
        same.choices[0].message.content,
        same.usage.prompt_tokens,
    )


def test_every_event_of_a_call(chat: Chat) -> None:
    fields: dict[str, Any] = {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False}
    events = list(ask(chat, **fields, stream=True, max_output_tokens=120))
    names = [event.type.removeprefix("response.") for event in events]
    grown = names.count("function_call_arguments.delta")
    assert grown > 3
    assert names == [
        *("created", "in_progress", "output_item.added"),
        *["function_call_arguments.delta"] * grown,
        *("function_call_arguments.done", "output_item.done", "completed"),
    ]
    (call,) = events[-1].response.output
    deltas = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
    assert "".join(deltas) == call.arguments == events[-3].arguments
    assert events[2].item.call_id == call.call_id


def test_only_what_is_allowed_is_called(chat: Chat) -> None:
    choice = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "stop"}]}
    response = ask(chat, tools=[TOOL, STOP], tool_choice=choice, max_output_tokens=120, parallel_tool_calls=False)
    assert {call.name for call in response.output} == {"stop"}
    assert response.tool_choice.type == "allowed_tools"


def test_reasoning_is_an_item(tmp_path_factory: pytest.TempPathFactory) -> None:
    with served(tmp_path_factory.mktemp("model") / "tiny", THINKING) as chat:
        (item,) = ask(chat).output
        assert (item.type, item.status, item.summary) == ("reasoning", "incomplete", [])
        events = list(ask(chat, stream=True))
        deltas = [event.delta for event in events if event.type == "response.reasoning_text.delta"]
        assert "".join(deltas) == item.content[0].text
        assert ask(chat).usage.output_tokens_details.reasoning_tokens == 24
        again = ask(chat, input=[*ITEMS, item.to_dict(), {"role": "user", "content": "Go on."}], max_output_tokens=1)
        assert again.usage.input_tokens > ask(chat).usage.input_tokens
        with pytest.raises(openai.BadRequestError, match="cannot be told how much to reason"):
            ask(chat, reasoning={"effort": "low"})


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": []}, "input"),
        ({"input": [{"type": "reasoning", "summary": []}]}, "input"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0]"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content"),
        ({"input": [{"type": "function_call", "call_id": "x", "name": "y"}]}, "input[0].arguments"),
        ({"input": [{"type": "function_call_output", "call_id": "x", "output": "y"}]}, "input"),
        ({"input": "x" * 10_000}, "input"),
        ({"max_output_tokens": 10_000}, "max_output_tokens"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"tools": [{"type": "web_search"}]}, "tools[0]"),
        ({"tools": [STOP, STOP]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function"}}, "tool_choice.name"),
        ({"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": []}}, "tool_choice"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
        ({"text": {"format": {"type": "json_schema", "schema": {"type": "none"}}}}, "text.format"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"include": ["reasoning.encrypted_content"]}, "include[0]"),
        ({"store": True}, "store"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"truncation": "auto"}, "truncation"),
    ],
)
def test_what_cannot_be_done(chat: Chat, fields: dict[str, Any], param: str) -> None:
    response = httpx.post(chat.url + "/v1/responses", json={"input": "x", "max_output_tokens": 4, **fields})
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


def test_an_error_in_the_middle_is_the_last_event(tokenizer_directory: Path) -> None:
    with serving(tokenizer_directory, limits=LimitsConfig(request_seconds=0.2)) as server:
        server.runner.gate.clear()
        with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
            *_, last = client.responses.create(model="tiny", input="x", stream=True)
        assert last.type == "response.failed"
        assert (last.response.status, last.response.error.code) == ("failed", "server_error")
        server.runner.gate.set()
        server.wait_until_idle()
