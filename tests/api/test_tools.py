"""Tools over a real socket with the official client: a tiny random model that is made to call by its grammar."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from qserve.api.service import Service
from qserve.build import build_llm
from qserve.config import DeviceConfig, EngineConfig
from qserve.text.tools import find_tool_format
from tests import tiny
from tests.api.conftest import listening

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Paris", "Rome"]}, "days": {"type": "integer", "maximum": 9}},
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}
STOP = {"type": "function", "function": {"name": "stop"}}
NAMED = {"type": "function", "function": {"name": "get_weather"}}
MESSAGES: list[Any] = [{"role": "user", "content": "What is the weather?"}]
HERMES = "{% for tool in tools or [] %}{{ tool | tojson }}\n{% endfor %}{# <tool_call> #}" + tiny.CHATML.replace(
    "message['content']",
    "(message['content'] or '') + (message['tool_calls'] | tojson if message['tool_calls'] else '')",
)
THINKING = tiny.CHATML.replace("assistant\n' }}", "assistant\n<think>\n' }}{# </think> #}")
TEMPLATES = {"hermes": HERMES, "json": tiny.CHATML, "mistral": HERMES.replace("<tool_call>", "[TOOL_CALLS]")}


@dataclass
class Chat:
    url: str
    client: openai.OpenAI
    directory: Path


@pytest.fixture(scope="module", params=list(TEMPLATES))
def chat(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chat]:
    with served(tmp_path_factory.mktemp("model") / "tiny", TEMPLATES[request.param]) as chat:
        yield chat


@pytest.fixture(scope="module")
def thinking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chat]:
    with served(tmp_path_factory.mktemp("model") / "tiny", THINKING) as chat:
        yield chat


@contextmanager
def served(directory: Path, template: str) -> Iterator[Chat]:
    tiny.make_checkpoint(directory)
    file = directory / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": template}))
    # No guesses: a frame for each token.
    llm = build_llm(directory, engine=EngineConfig(speculative_tokens=0), device=DeviceConfig(kv_cache_mb=8))
    try:
        with listening(Service(llm)) as (host, port):
            url = f"http://{host}:{port}"
            with openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0) as client:
                yield Chat(url, client, directory)
    finally:
        llm.close()


def ask(chat: Chat, **fields: Any) -> Any:
    fields = {"model": "tiny", "messages": MESSAGES, "tools": [WEATHER, STOP], "seed": 3, "max_tokens": 120, **fields}
    return chat.client.chat.completions.create(**fields)


def put_together(chunks: Any) -> tuple[list[tuple[str, str]], str, list[str]]:
    """Calls, text and finish reasons of a stream, as clients put them together."""
    calls: dict[int, list[str]] = {}
    text, reasons, ids = "", [], set()
    for choice in (choice for chunk in chunks for choice in chunk.choices):
        text += choice.delta.content or ""
        reasons += [choice.finish_reason] if choice.finish_reason else []
        for call in choice.delta.tool_calls or []:
            if call.id:
                ids.add(call.id)
                calls[call.index] = [call.function.name, ""]
            calls[call.index][1] += call.function.arguments or ""
    assert len(ids) == len(calls)
    return [(name, arguments) for name, arguments in calls.values()], text, reasons


class TestForced:
    def test_a_named_function_is_called_under_its_schema(self, chat: Chat) -> None:
        choice = ask(chat, tool_choice=NAMED).choices[0]
        (call,) = choice.message.tool_calls
        assert (choice.finish_reason, choice.message.content, call.function.name) == ("tool_calls", None, "get_weather")
        arguments = json.loads(call.function.arguments)
        assert arguments["city"] in ("Paris", "Rome")
        assert arguments["days"] <= 9

    def test_streamed_it_is_the_same(self, chat: Chat) -> None:
        fields: dict[str, Any] = {"tool_choice": "required", "parallel_tool_calls": False, "temperature": 0}
        whole = ask(chat, **fields).choices[0]
        chunks = list(ask(chat, **fields, stream=True))
        assert next(chunk.choices[0].delta.role for chunk in chunks) == "assistant"
        found = [(call.function.name, call.function.arguments) for call in whole.message.tool_calls]
        assert put_together(chunks) == (found, "", ["tool_calls"])

    def test_arguments_stream(self, chat: Chat) -> None:
        chunks = list(ask(chat, tool_choice=NAMED, stream=True))
        assert sum(bool(chunk.choices[0].delta.tool_calls) for chunk in chunks) > 3

    def test_every_choice_calls(self, chat: Chat) -> None:
        choices = ask(chat, tool_choice=NAMED, n=3, temperature=1.5).choices
        assert len({choice.message.tool_calls[0].id for choice in choices}) == 3


def written(chat: Chat, *names: str) -> str:
    """Calls as the model of this template would write them."""
    template = json.loads((chat.directory / "tokenizer_config.json").read_text())["chat_template"]
    form = find_tool_format(template)
    calls = [form.head % name + '{"city": "Rome"}' + form.tail for name in names]
    return ("" if form.is_bare else form.begin) + form.opening + form.between.join(calls) + form.closing


class TestFree:
    """What the model writes is chosen by structured output; whether it is a call is for the server to find out."""

    def test_parallel_calls(self, chat: Chat) -> None:
        fields: dict[str, Any] = {"extra_body": {"guided_choice": [written(chat, "get_weather", "stop")]}}
        choice = ask(chat, **fields).choices[0]
        assert [call.function.name for call in choice.message.tool_calls] == ["get_weather", "stop"]
        assert choice.finish_reason == "tool_calls"
        calls, text, reasons = put_together(ask(chat, **fields, stream=True))
        assert calls == [("get_weather", '{"city": "Rome"}'), ("stop", '{"city": "Rome"}')]
        assert (text, reasons) == ("", ["tool_calls"])
        (only,) = ask(chat, **fields, parallel_tool_calls=False).choices[0].message.tool_calls
        assert only.function.name == "get_weather"

    def test_without_tools_it_is_text(self, chat: Chat) -> None:
        text = written(chat, "stop")
        for fields in ({"tool_choice": "none"}, {"tools": []}):
            choice = ask(chat, **fields, extra_body={"guided_choice": [text]}).choices[0]
            assert (choice.message.content, choice.message.tool_calls) == (text, None)
            assert choice.finish_reason == "stop"

    def test_text_beside_tools_is_the_same_streamed(self, chat: Chat) -> None:
        whole = ask(chat, temperature=0, logprobs=True).choices[0]
        chunks = list(ask(chat, temperature=0, stream=True, logprobs=True))
        assert put_together(chunks)[1:] == (whole.message.content, [whole.finish_reason])
        tokens = [entry.token for chunk in chunks for entry in chunk.choices[0].logprobs.content or []]
        assert tokens == [entry.token for entry in whole.logprobs.content]

    def test_strict_tools_bind_what_calls_there_are(self, chat: Chat) -> None:
        tool = {**WEATHER, "function": {**WEATHER["function"], "strict": True}}  # type: ignore[dict-item]
        assert ask(chat, tools=[tool], max_tokens=8).choices[0].finish_reason == "length"


def test_tools_and_earlier_calls_stand_in_the_prompt(chat: Chat) -> None:
    call = {"id": "123456789", "type": "function", "function": {"name": "stop", "arguments": '{"now": "soon"}'}}
    messages = [
        *MESSAGES,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "stopped", "tool_call_id": "123456789"},
    ]
    fields = {"messages": messages, "tools": [STOP]}
    tokens = httpx.post(chat.url + "/tokenize", json=fields).json()["tokens"]
    prompt = httpx.post(chat.url + "/detokenize", json={"tokens": tokens}).json()["prompt"]
    for part in ('"name": "stop"', '{"now": "soon"}', "stopped"):
        assert part in prompt
    assert ask(chat, messages=messages, max_tokens=1).usage.prompt_tokens > 50


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tool_choice": "required", "tools": []}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
        ({"tool_choice": "perhaps"}, "tool_choice"),
        ({"tools": [STOP, STOP]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "two words"}}]}, "tools[0].function.name"),
        ({"tool_choice": "required", "response_format": {"type": "json_object"}}, "tools"),
        (
            {"tool_choice": "required", "tools": [{**STOP, "function": {"name": "f", "parameters": {"type": "no"}}}]},
            "tools",
        ),
    ],
)
def test_what_cannot_be_done(chat: Chat, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        ask(chat, **fields)
    assert refused.value.param == param


def test_reasoning_is_apart(thinking: Chat) -> None:
    whole = ask(thinking, tools=[], max_tokens=30, temperature=0).choices[0].message
    assert whole.content == ""
    assert whole.reasoning_content
    chunks = ask(thinking, tools=[], max_tokens=30, temperature=0, stream=True)
    deltas = [chunk.choices[0].delta.model_dump() for chunk in chunks]
    assert "".join(delta.get("reasoning_content") or "" for delta in deltas) == whole.reasoning_content
    hidden = ask(thinking, tools=[], max_tokens=30, temperature=0, extra_body={"include_reasoning": False})
    assert not hasattr(hidden.choices[0].message, "reasoning_content")
    assert hidden.usage.completion_tokens_details.reasoning_tokens == 30
    *_, last = ask(
        thinking, tools=[], max_tokens=9, temperature=0, n=2, stream=True, stream_options={"include_usage": True}
    )
    assert last.usage.completion_tokens_details.reasoning_tokens == 18


def test_where_nothing_reasons_no_reasoning_is_counted(chat: Chat) -> None:
    assert ask(chat, tools=[], max_tokens=3).usage.completion_tokens_details is None


def test_a_structured_answer_is_no_reasoning(thinking: Chat) -> None:
    answer = ask(thinking, tools=[], extra_body={"guided_choice": ["yes"]}).choices[0].message
    assert answer.content == "yes"


SWITCH = "{% if enable_thinking is false %}off{% endif %}{# <think></think> #}"
EFFORT = "{{ reasoning_effort | default('') }}"


@pytest.mark.parametrize(
    ("addition", "effort", "changes"),
    [(SWITCH, "none", True), (EFFORT, "low", True), (EFFORT, "none", True), ("", "none", False)],
)
def test_a_template_is_told_how_much_to_reason(tmp_path: Path, addition: str, effort: str, changes: bool) -> None:
    with served(tmp_path / "tiny", addition + tiny.CHATML) as chat:
        num_plain = ask(chat, tools=[], max_tokens=1).usage.prompt_tokens
        told = ask(chat, tools=[], max_tokens=1, reasoning_effort=effort).usage.prompt_tokens
        assert (told > num_plain) == changes
        if effort == "none" and addition == SWITCH:
            with pytest.raises(openai.BadRequestError, match="cannot be told how much to reason"):
                ask(chat, tools=[], reasoning_effort="high")
