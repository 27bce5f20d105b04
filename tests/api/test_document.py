"""What is said of the API is what is served."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from qserve.api.app import make_app
from qserve.api.document import document
from qserve.api.endpoints import ENDPOINTS
from qserve.api.messages.request import MessageRequest
from qserve.api.openapi import request_schemas
from qserve.api.protocol import ChatRequest, TokenizeRequest, parse
from qserve.api.responses.request import ResponseRequest
from qserve.api.service import Service
from qserve.api.wire import Wire
from qserve.errors import InvalidRequest

FILE = Path(__file__).parent.parent.parent / "docs" / "api.md"
MINIMAL: dict[str, dict[str, Any]] = {
    "CompletionRequest": {"prompt": "x"},
    "ChatRequest": {"messages": [{"role": "user", "content": "x"}]},
    "ResponseRequest": {"input": "x"},
    "MessageRequest": {"messages": [{"role": "user", "content": "x"}], "max_tokens": 4},
    "MessagePrompt": {"messages": [{"role": "user", "content": "x"}]},
    "EmbeddingRequest": {"input": "x"},
    "ScoreRequest": {"items": "x", "label_token_ids": [1]},
    "TokenizeRequest": {"prompt": "x"},
    "DetokenizeRequest": {"tokens": []},
}
BODIES = [endpoint.operation.body for endpoint in ENDPOINTS if endpoint.operation.body is not None]


def test_the_file_is_up_to_date() -> None:
    assert FILE.read_text() == document(), "write it anew: python -m qserve.api.document > docs/api.md"


def test_no_two_schemas_have_one_name() -> None:
    seen: dict[str, Any] = {}
    for body in BODIES:
        for name, schema in request_schemas(body).items():
            assert seen.setdefault(name, schema) == schema, name


def references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        yield from ([value["$ref"]] if "$ref" in value else [])
        for inner in value.values():
            yield from references(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from references(inner)


def test_the_openapi_document_has_every_route_and_lacks_no_schema(client: httpx.Client) -> None:
    described = client.get("/openapi.json").json()
    served = {
        (route.path.replace(":path", ""), *sorted(route.methods - {"HEAD"})) for route in make_app(Service()).routes
    }  # type: ignore[attr-defined]
    assert {(path, *map(str.upper, item)) for path, item in described["paths"].items()} == served
    assert set(references(described)) == {f"#/components/schemas/{name}" for name in described["components"]["schemas"]}


def test_answers_have_the_fields_that_are_described(client: httpx.Client) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    for path, item in paths.items():
        operation = item.get("get") or item["post"]
        body = operation.get("requestBody")
        if body is None:
            response = client.get(path.replace("{name}", "tiny"))
        else:
            name = body["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
            if name == "EmbeddingRequest":
                continue  # the fake device has no hidden states
            response = client.post(path, json=MINIMAL[name])
        assert response.status_code == 200, response.text
        content = operation["responses"]["200"]["content"]
        media_type = response.headers["content-type"].partition(";")[0]
        if "required" in content[media_type]["schema"]:
            assert set(content[media_type]["schema"]["required"]) <= set(response.json())


@pytest.mark.parametrize("body", BODIES, ids=lambda body: body.__name__)
def test_every_field_takes_its_default_and_null(body: type[Wire]) -> None:
    schema = request_schemas(body)[body.__name__]
    minimal = MINIMAL[body.__name__]
    assert set(schema.get("required", ())) <= set(minimal)
    for name, field in schema["properties"].items():
        values = [None, *([field["default"]] if "default" in field else []), *field.get("enum", ())]
        for value in values if name not in minimal else ():
            parse(body, json.dumps({**minimal, name: value}).encode())


@pytest.mark.parametrize("body", BODIES, ids=lambda body: body.__name__)
def test_what_is_not_served_is_refused(body: type[Wire]) -> None:
    for name in body.not_served:
        with pytest.raises(InvalidRequest) as refused:
            parse(body, json.dumps({**MINIMAL[body.__name__], name: "something"}).encode())
        assert refused.value.param == name


def test_fields_of_fields_are_listed() -> None:
    written = document()
    for name in ("stream_options.include_usage", "response_format.json_schema.schema", "tools[].function.name"):
        assert f"| `{name}` |" in written


@pytest.mark.parametrize(
    ("body", "fields", "unknown"),
    [
        (ChatRequest, {"tools": [{"type": "function", "function": {"name": "f", "a": 1}, "b": 1}]}, []),
        (
            ChatRequest,
            {"messages": [{"role": "user", "content": [{"type": "text", "a": 1}]}]},
            ["messages[0].content[0].a"],
        ),
        (ChatRequest, {"chat_template_kwargs": {"a": {"b": 1}}, "c": {"d": 1}}, ["c"]),
        (ResponseRequest, {"input": [{"role": "user", "content": "x", "id": "1"}]}, ["input[0].id"]),
        (
            MessageRequest,
            {"system": [{"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}, "a": 1}]},
            ["system[0].a"],
        ),
    ],
)
def test_unknown_fields_are_found_wherever_they_stand(
    body: type[Wire], fields: dict[str, Any], unknown: list[str]
) -> None:
    assert parse(body, json.dumps({**MINIMAL[body.__name__], **fields}).encode())[1] == unknown


@pytest.mark.parametrize(
    ("body", "fields", "advice"),
    [
        (ChatRequest, {"chat_template": "x"}, "--chat-template"),
        (ChatRequest, {"thinking_token_budget": 9}, "max_tokens"),
        (MessageRequest, {"thinking": {"type": "enabled", "budget_tokens": 1024}}, "send adaptive"),
        (ResponseRequest, {"previous_response_id": "x"}, "whole conversation"),
    ],
)
def test_a_refusal_tells_what_to_do_instead(body: type[Wire], fields: dict[str, Any], advice: str) -> None:
    with pytest.raises(InvalidRequest, match=advice):
        parse(body, json.dumps({**MINIMAL[body.__name__], **fields}).encode())


@pytest.mark.parametrize(
    ("body", "fields", "param"),
    [
        (
            ChatRequest,
            {"response_format": {"type": "text", "json_schema": {"schema": {}}}},
            "response_format.json_schema",
        ),
        (
            ChatRequest,
            {"stream": True, "stream_options": {"continuous_usage_stats": True}},
            "stream_options.continuous_usage_stats",
        ),
        (MessageRequest, {"tool_choice": {"type": "any", "name": "f"}}, "tool_choice.name"),
        (ResponseRequest, {"tool_choice": {"type": "auto", "name": "f"}}, "tool_choice.name"),
        (ResponseRequest, {"tool_choice": {"type": "function", "name": "f", "mode": "auto"}}, "tool_choice.mode"),
        (TokenizeRequest, {"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        (
            TokenizeRequest,
            {"prompt": None, "messages": [{"role": "user"}], "add_special_tokens": True},
            "add_special_tokens",
        ),
    ],
)
def test_nothing_is_taken_that_would_have_no_effect(body: type[Wire], fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest, match="no effect") as refused:
        parse(body, json.dumps({**MINIMAL[body.__name__], **fields}).encode())
    assert refused.value.param == param
