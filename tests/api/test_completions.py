"""/v1/completions: every form of a prompt, every parameter, streamed and whole."""

import json
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests import tiny
from tests.api.conftest import CONTEXT, Server

END = 2  # the tiny tokenizer's <|im_end|>


def complete(client: httpx.Client, **fields: Any) -> dict[str, Any]:
    response = client.post("/v1/completions", json={"ignore_eos": True, **fields})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def stream(client: httpx.Client, path: str = "/v1/completions", **fields: Any) -> list[dict[str, Any]]:
    response = client.post(path, json={"ignore_eos": True, **fields, "stream": True})
    assert response.status_code == 200, response.text
    *frames, done, rest = response.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(frame.removeprefix("data: ")) for frame in frames]


def texts_of(chunks: list[dict[str, Any]]) -> dict[int, str]:
    texts: dict[int, str] = {}
    for choice in (choice for chunk in chunks for choice in chunk["choices"]):
        texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
    return texts


def test_the_answer_has_openais_shape(client: httpx.Client) -> None:
    answer = complete(client, prompt="Hello", max_tokens=4)
    assert answer["object"] == "text_completion"
    assert answer["id"].startswith("cmpl-")
    assert answer["model"] == "tiny"
    (choice,) = answer["choices"]
    assert choice["finish_reason"] == "length"
    assert (choice["index"], choice["logprobs"], choice["stop_reason"]) == (0, None, None)
    usage = answer["usage"]
    assert usage["completion_tokens"] == 4
    assert usage["total_tokens"] == usage["prompt_tokens"] + 4


def test_text_and_ids_of_a_prompt_give_the_same(client: httpx.Client, server: Server) -> None:
    prompts = ["Hello there", "naïve 東京"]
    ids = [server.llm.tokenizer.encode(prompt) for prompt in prompts]
    forms: list[Any] = [prompts, ids]
    answers = [complete(client, prompt=form)["choices"] for form in forms]
    assert answers[0] == answers[1]
    alone: list[Any] = [prompts[0], ids[0], [prompts[0]], [ids[0]]]
    for form in alone:
        (choice,) = complete(client, prompt=form)["choices"]
        assert choice == answers[0][0]


def test_an_empty_prompt_begins_a_document(client: httpx.Client) -> None:
    assert complete(client, prompt="")["usage"]["prompt_tokens"] == 1


def test_choices_are_numbered_by_prompt_and_sample(client: httpx.Client) -> None:
    answer = complete(client, prompt=["a", "b"], n=3, seed=7)
    assert [choice["index"] for choice in answer["choices"]] == list(range(6))
    texts = [choice["text"] for choice in answer["choices"]]
    assert len(set(texts)) == 6  # a seed, and each sample its own
    assert answer["usage"]["completion_tokens"] == 6 * 16
    assert answer["usage"]["prompt_tokens"] == 2
    assert texts == [choice["text"] for choice in complete(client, prompt=["a", "b"], n=3, seed=7)["choices"]]
    assert texts_of(stream(client, prompt=["a", "b"], n=3, seed=7)) == dict(enumerate(texts))


def test_best_of_returns_the_most_likely(client: httpx.Client) -> None:
    fields: dict[str, Any] = {"prompt": "a", "seed": 3, "max_tokens": 5, "logprobs": 0}
    everyone = complete(client, n=4, **fields)["choices"]
    best = complete(client, n=2, best_of=4, **fields)
    ranked = sorted(everyone, key=lambda choice: sum(choice["logprobs"]["token_logprobs"]), reverse=True)
    assert [choice["text"] for choice in best["choices"]] == [choice["text"] for choice in ranked[:2]]
    assert [choice["index"] for choice in best["choices"]] == [0, 1]
    assert best["usage"]["completion_tokens"] == 20
    assert complete(client, prompt="a", seed=3, best_of=2)["choices"][0]["logprobs"] is None


def test_null_is_not_given(client: httpx.Client) -> None:
    names = ["stop", "n", "logprobs", "seed", "stream_options", "suffix", "user", "best_of", "temperature", "top_k"]
    plain = complete(client, prompt="x", max_tokens=8)
    assert complete(client, prompt="x", max_tokens=8, **dict.fromkeys(names))["choices"] == plain["choices"]
    assert complete(client, prompt="x", max_tokens=None)["usage"]["completion_tokens"] == 16


def test_unknown_fields_are_named_in_a_header(client: httpx.Client) -> None:
    response = client.post("/v1/completions", json={"prompt": "x", "speling": 1, "max_tokens": 1, "user": "me"})
    assert response.headers["x-qserve-ignored-fields"] == "speling"
    deep = {
        "prompt": "x",
        "stream": True,
        "stream_options": {"include_usge": True},
        "response_format": {"type": "text", "a": [1]},
    }
    response = client.post("/v1/completions", json=deep)
    assert response.headers["x-qserve-ignored-fields"] == "response_format.a, stream_options.include_usge"
    assert "x-qserve-ignored-fields" not in client.post("/v1/completions", json={"prompt": "x"}).headers


class TestEcho:
    def test_the_prompt_comes_back_as_it_was_sent(self, client: httpx.Client) -> None:
        prompt = "naïve 東京 "
        plain = complete(client, prompt=prompt)["choices"][0]["text"]
        assert complete(client, prompt=prompt, echo=True)["choices"][0]["text"] == prompt + plain

    def test_no_token_is_made_for_max_tokens_0(self, client: httpx.Client) -> None:
        answer = complete(client, prompt="Hello", echo=True, max_tokens=0, logprobs=1)
        assert answer["choices"][0]["text"] == "Hello"
        assert answer["choices"][0]["finish_reason"] == "length"
        assert answer["usage"]["completion_tokens"] == 0
        assert len(answer["choices"][0]["logprobs"]["tokens"]) == answer["usage"]["prompt_tokens"]
        assert complete(client, prompt="Hello", max_tokens=0)["choices"][0]["text"] == ""

    def test_a_prompt_that_ends_inside_a_character_is_one_text_with_its_completion(
        self, client: httpx.Client, server: Server
    ) -> None:
        first, *rest = server.llm.tokenizer.encode("👩")
        bias = {str(rest[0]): 100}
        text = complete(client, prompt=[first], echo=True, max_tokens=1, logit_bias=bias)["choices"][0]["text"]
        assert text == server.llm.tokenizer.decode([first, rest[0]])

    def test_streamed(self, client: httpx.Client) -> None:
        fields: dict[str, Any] = {"prompt": ["Hello", "you"], "echo": True, "logprobs": 2, "max_tokens": 6}
        whole = complete(client, **fields)["choices"]
        chunks = stream(client, **fields)
        assert texts_of(chunks) == {choice["index"]: choice["text"] for choice in whole}
        for choice in whole:
            parts = [c["logprobs"] for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
            joined = {name: [item for part in parts if part for item in part[name]] for name in choice["logprobs"]}
            assert joined == choice["logprobs"]


class TestLogprobs:
    def test_as_evaluation_harnesses_need_them(self, client: httpx.Client, server: Server) -> None:
        """lm-evaluation-harness: one entry more than the prompt, floats from the second on, exact equality."""
        ids = server.llm.tokenizer.encode("The capital of France is Paris, a city")
        fields = {"prompt": [ids], "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True, "temperature": 0}
        response = client.post("/v1/completions", json=fields)
        logprobs = response.json()["choices"][0]["logprobs"]
        assert {len(values) for values in logprobs.values()} == {len(ids) + 1}
        assert (logprobs["token_logprobs"][0], logprobs["top_logprobs"][0]) == (None, None)
        for token, value, top in list(zip(*[logprobs[k] for k in ("tokens", "token_logprobs", "top_logprobs")]))[1:]:  # noqa: B905
            assert isinstance(value, float)
            assert top[token] == value
            assert 1 <= len(top) <= 2

    def test_the_end_token_is_in_logprobs_and_usage_and_not_in_the_text(self, client: httpx.Client) -> None:
        fields = {"prompt": "x", "max_tokens": 1, "logprobs": 0, "logit_bias": {str(END): 100}, "ignore_eos": False}
        answer = complete(client, **fields)
        (choice,) = answer["choices"]
        assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("", "stop", None)
        assert choice["logprobs"]["tokens"] == ["<|im_end|>"]
        assert answer["usage"]["completion_tokens"] == 1

    def test_counts(self, client: httpx.Client) -> None:
        for number in (0, 1, 5, 20):
            (choice,) = complete(client, prompt="abc", logprobs=number)["choices"]
            assert all(0 < len(top) <= number + 1 for top in choice["logprobs"]["top_logprobs"])
            assert len(choice["logprobs"]["tokens"]) == 16

    def test_offsets_point_into_the_text(self, client: httpx.Client) -> None:
        (choice,) = complete(client, prompt="Grüße 東京", echo=True, logprobs=0, max_tokens=30)["choices"]
        text, offsets = choice["text"], choice["logprobs"]["text_offset"]
        assert offsets == sorted(offsets)
        for token, offset in zip(choice["logprobs"]["tokens"], offsets, strict=True):
            if not token.startswith("bytes:") and token not in tiny.SPECIAL_TOKENS:
                assert text[offset : offset + len(token)] == token

    def test_tokens_as_ids(self, client: httpx.Client) -> None:
        (choice,) = complete(
            client, prompt="x", logprobs=1, return_tokens_as_token_ids=True, return_token_ids=True, max_tokens=3
        )["choices"]
        assert choice["logprobs"]["tokens"] == [f"token_id:{token_id}" for token_id in choice["token_ids"]]

    def test_prompt_logprobs(self, client: httpx.Client, server: Server) -> None:
        ids = server.llm.tokenizer.encode("Hello there")
        (choice,) = complete(client, prompt=ids, prompt_logprobs=2, max_tokens=1)["choices"]
        first, *others = choice["prompt_logprobs"]
        assert first is None
        assert [str(token_id) in entry for token_id, entry in zip(ids[1:], others, strict=True)] == [True] * len(others)
        assert set(others[0][str(ids[1])]) == {"logprob", "rank", "decoded_token"}


class TestStop:
    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(data=st.data())
    def test_a_stop_string_never_leaks_streamed_or_not(self, client: httpx.Client, data: st.DataObject) -> None:
        fields: dict[str, Any] = {"prompt": data.draw(st.text("abc", min_size=1, max_size=5)), "max_tokens": 24}
        free = complete(client, **fields)["choices"][0]["text"]
        start = data.draw(st.integers(0, max(len(free) - 2, 0)))
        stop = free[start : start + data.draw(st.integers(1, 6))] or "x"
        stops = [stop, *data.draw(st.lists(st.text("abc \ufffd", min_size=1, max_size=3), max_size=2))]
        include = data.draw(st.booleans())
        fields |= {"stop": stops, "include_stop_str_in_output": include}
        (choice,) = complete(client, **fields)["choices"]
        end, found = min((free.find(s) + len(s), number) for number, s in enumerate(stops) if s in free)
        assert choice["text"] == (free[:end] if include else free[: end - len(stops[found])])
        assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stops[found])
        chunks = stream(client, **fields)
        assert texts_of(chunks) == {0: choice["text"]}
        assert [c["finish_reason"] for chunk in chunks for c in chunk["choices"] if c["finish_reason"]] == ["stop"]

    def test_min_tokens_delays_a_stop_string(self, client: httpx.Client) -> None:
        free = complete(client, prompt="abc", max_tokens=12)["choices"][0]["text"]
        fields: dict[str, Any] = {"prompt": "abc", "max_tokens": 12, "stop": [free[0]]}
        assert complete(client, **fields)["choices"][0]["text"] == ""
        assert len(complete(client, **fields, min_tokens=12)["choices"][0]["text"]) > 1

    def test_stop_token_ids(self, client: httpx.Client) -> None:
        free = complete(client, prompt="abc", return_token_ids=True)["choices"][0]
        wanted = free["token_ids"][5]
        (choice,) = complete(client, prompt="abc", stop_token_ids=[wanted], return_token_ids=True)["choices"]
        assert choice["token_ids"] == free["token_ids"][: free["token_ids"].index(wanted) + 1]
        assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", wanted)
        assert free["text"].startswith(choice["text"])

    def test_generation_ends_at_the_stop_string(self, client: httpx.Client, server: Server) -> None:
        free = complete(client, prompt="abc", max_tokens=4)["choices"][0]["text"]
        before = server.runner.num_steps
        server.runner.seconds = 0.005  # the engine goes on until it is told
        complete(client, prompt="abc", max_tokens=400, stop=free[0])
        server.wait_until_idle()
        server.runner.seconds = 0.0
        assert server.runner.num_steps - before < 200


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(prompt=st.text(max_size=30), max_tokens=st.integers(0, 40), seed=st.integers(0, 2**40))
def test_streamed_text_is_the_whole_text(client: httpx.Client, prompt: str, max_tokens: int, seed: int) -> None:
    fields = {"prompt": prompt, "max_tokens": max_tokens, "seed": seed}
    whole = complete(client, **fields)["choices"][0]
    chunks = stream(client, **fields)
    assert texts_of(chunks) == {0: whole["text"]}
    assert chunks[-1]["choices"][0]["finish_reason"] == whole["finish_reason"]


class TestContext:
    def test_all_of_it_can_be_used(self, client: httpx.Client) -> None:
        assert complete(client, prompt=[5] * (CONTEXT - 1), max_tokens=1)["usage"]["total_tokens"] == CONTEXT

    @pytest.mark.parametrize(("length", "max_tokens"), [(CONTEXT, 1), (CONTEXT - 1, 2), (CONTEXT + 1, 0), (1, CONTEXT)])
    @pytest.mark.parametrize("streams", [True, False])
    def test_more_is_refused_before_anything_is_sent(
        self, client: httpx.Client, length: int, max_tokens: int, streams: bool
    ) -> None:
        fields = {"prompt": [5] * length, "max_tokens": max_tokens, "stream": streams}
        response = client.post("/v1/completions", json=fields)
        assert response.status_code == 400
        assert response.json()["error"]["code"] == "context_length_exceeded"

    def test_truncation_when_asked(self, client: httpx.Client) -> None:
        answer = complete(client, prompt=[*range(5, 105)], truncate_prompt_tokens=10, return_token_ids=True)
        assert answer["choices"][0]["prompt_token_ids"] == list(range(95, 105))
