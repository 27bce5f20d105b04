"""What a client does wrong is told in OpenAI's body, with a status, on every route; and the small endpoints."""

from pathlib import Path
from typing import Any

import httpx
import pytest

from qserve import __version__
from qserve.api.service import Service
from qserve.config import AccessConfig, EngineConfig, LimitsConfig
from tests.api.conftest import Server, listening, serving


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    (error,) = response.json().values()
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert error["code"] is None or isinstance(error["code"], str)
    assert response.headers["x-request-id"]
    found: dict[str, Any] = error
    return found


BAD_FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"prompt": None}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": {}}, "prompt"),
    ({"prompt": ["a", 5]}, "prompt"),
    ({"prompt": [[1], "a"]}, "prompt"),
    ({"prompt": [1.5]}, "prompt"),
    ({"prompt": [True]}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": [512]}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": ["x"] * 1025}, "prompt"),
    ({"max_tokens": "abc"}, "max_tokens"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"max_tokens": True}, "max_tokens"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": 2.1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": 10**400}, "temperature"),
    ({"top_p": 1.1}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"min_p": 2}, "min_p"),
    ({"n": 0}, "n"),
    ({"n": 129}, "n"),
    ({"best_of": 1, "n": 2}, "best_of"),
    ({"best_of": 2, "stream": True}, "best_of"),
    ({"logprobs": 21}, "logprobs"),
    ({"logprobs": True}, "logprobs"),
    ({"stop": ""}, "stop"),
    ({"stop": [1]}, "stop"),
    ({"stop": ["x"] * 65}, "stop"),
    ({"seed": 2**63}, "seed"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"1": 101}}, "logit_bias[1]"),
    ({"logit_bias": {"512": 1}}, "logit_bias"),
    ({"logit_bias": {"²": 1}}, "logit_bias"),
    ({"logit_bias": [1]}, "logit_bias"),
    ({"stop_token_ids": [512]}, "stop_token_ids"),
    ({"min_tokens": 17}, "min_tokens"),
    ({"presence_penalty": 3}, "presence_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"include_usage": "yes"}}, "stream_options.include_usage"),
    ({"stream": "yes"}, "stream"),
    ({"stream": True, "prompt_logprobs": 1}, "prompt_logprobs"),
    ({"suffix": "end"}, "suffix"),
    ({"use_beam_search": True}, "use_beam_search"),
    ({"typical_p": 1.5}, "typical_p"),
    ({"model": 5}, "model"),
]


@pytest.mark.parametrize(("fields", "param"), BAD_FIELDS, ids=str)
def test_a_bad_field_is_named(client: httpx.Client, fields: dict[str, Any], param: str) -> None:
    error = error_of(client.post("/v1/completions", json={"prompt": "x", **fields}), 400)
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"text"',
        b'{"prompt": NaN}',
        b'{"prompt": "x", "temperature": Infinity}',
        b'{"prompt": "\xff"}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}",
        b'{"prompt": ' + b"[" * 100_000 + b"}",
    ],
    ids=lambda body: repr(body[:30]),
)
def test_a_body_that_is_no_json_object(client: httpx.Client, body: bytes) -> None:
    response = client.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert error_of(response, 400)["type"] == "invalid_request_error"


def test_what_is_echoed_is_capped(client: httpx.Client) -> None:
    long = "y" * 100_000
    for fields in ({"model": long}, {"max_tokens": long}, {"stop": [long]}, {"prompt": {"a": long}}, {long: 1}):
        response = client.post("/v1/completions", json={"prompt": "x", **fields})
        assert len(response.content) < 2000
        assert all(len(value) < 1000 for value in response.headers.values())


def test_any_unknown_field_can_be_named_in_a_header(client: httpx.Client) -> None:
    for name in ("\x02\r\n", "Ï\U00077e35", "", "a,b"):
        response = client.post("/v1/completions", json={"prompt": "x", name: 1})
        assert response.status_code == 200
        assert response.headers["x-qserve-ignored-fields"] == name.encode("unicode_escape").decode()


def test_unknown_model(client: httpx.Client) -> None:
    error = error_of(client.post("/v1/completions", json={"prompt": "x", "model": "gpt-4"}), 404)
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert error_of(client.get("/v1/models/gpt-4"), 404)["code"] == "model_not_found"


def test_unknown_path_and_method(client: httpx.Client) -> None:
    assert error_of(client.get("/v1/nothing"), 404)["code"] == "unknown_url"
    response = client.get("/v1/completions")
    assert error_of(response, 405)["code"] == "method_not_allowed"
    assert response.headers["allow"] == "POST"
    assert error_of(client.post("/health", json={}), 405)
    assert error_of(client.get("/" + "x" * 5000), 404)


def test_wrong_media_type(client: httpx.Client) -> None:
    response = client.post("/v1/completions", content=b"{}", headers={"Content-Type": "text/plain"})
    assert error_of(response, 415)["code"] == "unsupported_media_type"
    response = client.post("/v1/completions", data={"prompt": "x"})
    assert error_of(response, 415)


def test_a_body_that_is_too_large_declared_or_not(tokenizer_directory: Path) -> None:
    with serving(tokenizer_directory, limits=LimitsConfig(max_body_mb=1)) as server:
        body = b'{"prompt": "' + b"x" * 2**20 + b'"}'
        headers = {"Content-Type": "application/json"}
        for content in (body, iter([body])):
            response = httpx.post(server.url + "/v1/completions", content=content, headers=headers)
            assert error_of(response, 413)["code"] == "body_too_large"


def test_request_ids(client: httpx.Client) -> None:
    assert client.get("/health", headers={"x-request-id": "mine-7"}).headers["x-request-id"] == "mine-7"
    assert client.get("/health", headers={"x-request-id": "x" * 200}).headers["x-request-id"] != "x" * 200
    assert client.get("/health").headers["x-request-id"] != client.get("/health").headers["x-request-id"]


def test_api_keys(tokenizer_directory: Path) -> None:
    with serving(tokenizer_directory, access=AccessConfig(api_key=("one", "two"))) as server:
        for header in (None, "Bearer three", "Bearer", "one", "Bearer ünë"):
            headers = {} if header is None else {"Authorization": header.encode()}
            for method, path in (
                ("GET", "/v1/models"),
                ("POST", "/v1/completions"),
                ("GET", "/metrics"),
                ("GET", "/x"),
            ):
                response = httpx.request(method, server.url + path, headers=headers)
                assert error_of(response, 401)["code"] == "invalid_api_key"
        for key in ("one", "two"):
            response = httpx.get(server.url + "/v1/models", headers={"Authorization": f"Bearer {key}"})
            assert response.status_code == 200
        for path in ("/health", "/ready"):
            assert httpx.get(server.url + path).status_code == 200


def test_a_full_queue(tokenizer_directory: Path) -> None:
    engine = EngineConfig(max_running=1, max_queued=2, max_step_tokens=64)
    with serving(tokenizer_directory, engine=engine) as server:
        server.runner.gate.clear()
        response = httpx.post(server.url + "/v1/completions", json={"prompt": "x", "n": 4, "stream": True})
        server.runner.gate.set()
        error = error_of(response, 429)
        assert (error["type"], error["code"]) == ("rate_limit_error", "queue_full")
        assert int(response.headers["retry-after"]) > 0
        server.wait_until_idle()  # the three that were admitted are gone too
        assert httpx.post(server.url + "/v1/completions", json={"prompt": "x"}).status_code == 200


def test_while_the_model_is_loaded_probes_and_clients_are_told() -> None:
    with listening(Service()) as (host, port):
        url = f"http://{host}:{port}"
        assert httpx.get(url + "/health").status_code == 200
        for path in ("/ready", "/v1/models", "/metrics"):
            response = httpx.get(url + path)
            assert error_of(response, 503)["code"] == "not_ready"
            assert int(response.headers["retry-after"]) > 0
        assert error_of(httpx.post(url + "/v1/completions", json={"prompt": "x"}), 503)


def test_models(client: httpx.Client) -> None:
    (model,) = client.get("/v1/models").json()["data"]
    assert (model["id"], model["object"], model["max_model_len"]) == ("tiny", "model", 512)
    assert client.get("/v1/models/tiny").json() == {**model, "recipe": "none"}


def test_tokenizer_endpoints_round_trip(client: httpx.Client) -> None:
    for prefix in ("", "/v1"):
        tokens = client.post(prefix + "/tokenize", json={"prompt": "Grüße 東京", "add_special_tokens": False}).json()
        back = client.post(prefix + "/detokenize", json={"tokens": tokens["tokens"]}).json()
        assert back == {"prompt": "Grüße 東京"}
        info = client.get(prefix + "/tokenizer_info").json()
        assert (info["eos_token"], info["bos_token"]) == ("<|im_end|>", "<|im_start|>")
        assert "im_start" in info["chat_template"]
    assert error_of(client.post("/tokenize", json={}), 400)
    assert error_of(client.post("/detokenize", json={"tokens": [99999]}), 400)["param"] == "tokens"


def test_metrics_and_version(client: httpx.Client, server: Server) -> None:
    client.post("/v1/completions", json={"prompt": "x", "max_tokens": 3, "ignore_eos": True})
    text = client.get("/metrics").text
    assert 'qserve:num_requests_running{engine="0",model_name="tiny"} 0.0' in text
    assert 'qserve:request_success_total{engine="0",finished_reason="length",model_name="tiny"}' in text
    assert "qserve:time_to_first_token_seconds_bucket" in text
    assert client.get("/version").json() == {"version": __version__}
