"""Structured output and token constraints over a real socket, on a tiny model whose own words are noise."""

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qserve.api.service import Service
from qserve.build import build_llm
from qserve.config import DeviceConfig, EngineConfig
from qserve.llm import LLM
from tests import tiny
from tests.api.conftest import listening, wait_until

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kind": {"enum": ["cat", "dog", None, 7]},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    },
    "required": ["name", "age", "kind", "tags"],
    "additionalProperties": False,
}
TIGHT = {"disable_any_whitespace": True}
PATTERN = r"[a-f]{2,5}-(\d{3}|none)"
CHOICES = ["yes", "no", 'per"haps\n', "naïve 東京 🙂"]
GRAMMAR = 'start: "(" item ("," item)* ")"\nitem: /[0-9]{1,3}/'
GBNF = 'root ::= "<" [a-z] [a-z]? ">"'
CHAT = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def llm(directory: Path) -> Iterator[LLM]:
    # A cache this small makes those who run together be preempted.
    llm = build_llm(directory, engine=EngineConfig(max_running=16), device=DeviceConfig(kv_cache_mb=1))
    yield llm
    llm.close()


@pytest.fixture(scope="module")
def url(llm: LLM) -> Iterator[str]:
    with listening(Service(llm)) as address:
        yield f"http://{address[0]}:{address[1]}"


@pytest.fixture
def client(llm: LLM, url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=60) as client:
        yield client
    wait_until(lambda: llm.loop.stats.num_held_blocks == 0 == llm.loop.stats.num_running)


def complete(client: httpx.Client, **fields: Any) -> dict[str, Any]:
    fields = {"prompt": "The answer is", "max_tokens": 200, "temperature": 0.8, "seed": 1, **fields}
    answer = client.post("/v1/completions", json=fields)
    assert answer.status_code == 200, answer.text
    choice: dict[str, Any] = answer.json()["choices"][0]
    return choice


def complain(client: httpx.Client, **fields: Any) -> dict[str, Any]:
    answer = client.post("/v1/completions", json={"prompt": "The answer is", **fields})
    assert answer.status_code == 400, answer.text
    error: dict[str, Any] = answer.json()["error"]
    return error


def check_person(text: str) -> None:
    found = json.loads(text)
    assert list(found) == ["name", "age", "kind", "tags"]
    assert isinstance(found["name"], str)
    assert len(found["name"]) <= 12
    assert type(found["age"]) is int
    assert 0 <= found["age"] <= 150
    assert found["kind"] in ("cat", "dog", None, 7)
    assert len(found["tags"]) <= 3
    assert all(type(tag) is bool for tag in found["tags"])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "fields",
    [
        {"structured_outputs": {"json": PERSON, **TIGHT}},
        {"structured_outputs": {"json": json.dumps(PERSON), "regex": None}},
        {"guided_json": PERSON},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}},
    ],
)
def test_json_is_valid_under_its_schema(client: httpx.Client, fields: dict[str, Any], seed: int) -> None:
    choice = complete(client, seed=seed, **fields)
    assert choice["finish_reason"] == "stop"
    check_person(choice["text"])


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {}, {"top_p": 0.9}, {"repetition_penalty": 1.2}])
def test_guesses_change_no_text(llm: LLM, client: httpx.Client, directory: Path, sampling: dict[str, Any]) -> None:
    people = {"type": "array", "items": PERSON, "minItems": 3, "maxItems": 3}
    asked = [{"structured_outputs": {"json": people}}, {"structured_outputs": {"regex": "((yes|no), ){20}"}}]
    num_accepted = llm.loop.stats.num_accepted_tokens
    found = [complete(client, max_tokens=400, logprobs=2, **sampling, **each) for each in asked]
    assert llm.loop.stats.num_accepted_tokens > num_accepted
    with closing(build_llm(directory, engine=EngineConfig(speculative_tokens=0))) as plain:
        with listening(Service(plain)) as address, httpx.Client(base_url="http://{}:{}".format(*address)) as other:
            assert [complete(other, max_tokens=400, logprobs=2, **sampling, **each) for each in asked] == found
        assert plain.loop.stats.num_draft_tokens == 0


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("prefix", ["structured_outputs", "guided_"])
def test_regex_choice_and_grammar(client: httpx.Client, prefix: str, temperature: float) -> None:
    def ask(kind: str, value: Any) -> str:
        asked = {f"guided_{kind}": value} if prefix == "guided_" else {"structured_outputs": {kind: value}}
        choice = complete(client, temperature=temperature, **asked)
        assert choice["finish_reason"] == "stop"
        text: str = choice["text"]
        return text

    assert re.fullmatch(PATTERN, ask("regex", PATTERN))
    assert ask("choice", CHOICES) in CHOICES
    assert re.fullmatch(r"\(\d{1,3}(,\d{1,3})*\)", ask("grammar", GRAMMAR))
    assert re.fullmatch(r"<[a-z]{1,2}>", ask("grammar", GBNF))


def test_a_json_object_of_any_form(client: httpx.Client) -> None:
    for asked in ({"response_format": {"type": "json_object"}}, {"structured_outputs": {"json_object": True}}):
        choice = complete(client, max_tokens=400, logit_bias={str(tiny.VOCABULARY_SIZE - 1): -1}, **asked)
        if choice["finish_reason"] == "stop":  # noise may open more than it closes
            assert isinstance(json.loads(choice["text"]), dict)
        else:
            assert choice["text"].startswith("{")


def test_structure_in_free_text(client: httpx.Client) -> None:
    structures = [
        {"begin": "<a>", "schema": {"type": "integer", "minimum": 10, "maximum": 99}, "end": "</a>"},
        {"begin": "<b>", "schema": {"enum": ["x"]}, "end": "</b>"},
    ]
    tag = {"type": "structural_tag", "structures": structures, "triggers": ["<"]}
    for seed in range(3):
        text = complete(client, seed=seed, max_tokens=60, response_format=tag)["text"]
        whole = re.sub(r"<a>\d\d</a>|<b>\"x\"</b>", "", text)
        assert "<" not in whole[: max(whole.rfind("<"), 0)]  # only the last may be cut off by max_tokens
    text = complete(client, max_tokens=60, structured_outputs={"structural_tag": json.dumps(tag)})["text"]
    assert text


def test_chat_and_the_official_client(url: str) -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "person", "strict": True, "schema": PERSON}}
    with openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0) as client:
        free: dict[str, Any] = {"model": "tiny", "messages": CHAT, "seed": 3, "max_completion_tokens": 400}
        fields = {**free, "response_format": schema}
        whole = client.chat.completions.create(**fields, logprobs=True, top_logprobs=1)
        message = whole.choices[0].message.content
        assert message is not None
        check_person(message)
        chunks = client.chat.completions.create(**fields, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == message
        chosen = client.chat.completions.create(**free, extra_body={"structured_outputs": {"choice": ["a", "b"]}})
        assert chosen.choices[0].message.content in ("a", "b")
        scores = whole.choices[0].logprobs
        assert scores is not None
        assert scores.content is not None
        # They are those of the model itself, for which JSON is unlikely.
        assert min(token.logprob for token in scores.content) < -3


def test_several_samples_follow_the_grammar_each_on_its_own(client: httpx.Client) -> None:
    fields = {"prompt": ["One", "Two"], "n": 3, "best_of": 4, "seed": 1, "max_tokens": 30}
    asked = {**fields, "structured_outputs": {"regex": PATTERN}}
    choices = client.post("/v1/completions", json=asked).json()["choices"]
    assert len(choices) == 6
    assert all(re.fullmatch(PATTERN, choice["text"]) for choice in choices)
    assert len({choice["text"] for choice in choices}) > 1


def test_free_requests_are_not_changed_by_those_beside_them(llm: LLM, url: str) -> None:
    """Constrained and free requests together, preempted as the cache is small; each as it is alone."""
    asked: list[dict[str, Any]] = [
        {"ignore_eos": True},
        {"guided_json": PERSON},
        {"ignore_eos": True, "temperature": 0, "logprobs": 2},
        {"structured_outputs": {"regex": "[a-z ]{150,190}"}},
        {"allowed_token_ids": list(range(100, 140)), "max_tokens": 180},
        {"structured_outputs": {"grammar": 'start: ("x" | "yz")~40..60'}},
        {"ignore_eos": True, "typical_p": 0.3, "bad_words": ["the"]},
        {"structured_outputs": {"choice": CHOICES}, "temperature": 0},
    ] * 2
    long = " and again" * 30  # so that a few of them fill the cache, whenever they come
    asked = [{"seed": number, "prompt": f"Text {number}{long}", **fields} for number, fields in enumerate(asked)]
    with httpx.Client(base_url=url, timeout=120) as client:
        alone = [complete(client, **fields) for fields in asked]
        before = llm.loop.stats.num_preemptions
        with ThreadPoolExecutor(len(asked)) as pool:
            calls = [pool.submit(complete, client, **fields) for fields in asked]
            together = [call.result() for call in calls]
    assert together == alone
    assert llm.loop.stats.num_preemptions > before


def test_streamed_text_is_the_same(client: httpx.Client) -> None:
    fields = {"prompt": "A", "max_tokens": 200, "seed": 5, "guided_json": PERSON}
    whole = complete(client, **fields, temperature=1)
    with client.stream("POST", "/v1/completions", json={**fields, "stream": True}) as answer:
        frames = [json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: {")]
    assert "".join(frame["choices"][0]["text"] for frame in frames) == whole["text"]
    assert [frame["choices"][0]["finish_reason"] for frame in frames].count("stop") == 1


def test_stop_tokens_come_only_where_the_text_may_end(llm: LLM, client: httpx.Client) -> None:
    """A pattern that may end at any third letter, and a stop token that is a letter of it."""
    letter = llm.tokenizer.encode("b")[0]
    end = next(iter(llm.tokenizer.end_token_ids))
    for seed in range(6):
        biased = {"seed": seed, "logit_bias": {str(letter): 6, str(end): 7}, "max_tokens": 90}
        fields: dict[str, Any] = {"structured_outputs": {"regex": "([a-c]{3})+"}, **biased}
        choice = complete(client, stop_token_ids=[letter], return_token_ids=True, **fields)
        assert re.fullmatch("([a-c]{3})+", choice["text"])
        assert choice["finish_reason"] == "stop"
        assert choice["token_ids"][-1] in (letter, end)
        longer = complete(client, min_tokens=20, return_token_ids=True, **fields)
        assert longer["finish_reason"] == "stop"
        assert len(longer["token_ids"]) > 20
        assert complete(client, ignore_eos=True, **fields)["finish_reason"] == "length"


def test_a_stop_string_still_ends_the_text(client: httpx.Client) -> None:
    choice = complete(client, structured_outputs={"regex": "ab(cd)+ef"}, stop=["cdcd", "e"])
    assert (choice["text"], choice["finish_reason"]) in (("ab", "stop"), ("abcd", "stop"))


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"response_format": {"type": "json_schema"}}, "response_format", "json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "thing"}}}},
            "response_format",
            "thing",
        ),
        ({"response_format": {"type": "xml"}}, "response_format.type", "xml"),
        ({"response_format": {"type": "structural_tag", "structures": []}}, "response_format", "structures"),
        ({"structured_outputs": {"json": {"type": "array", "uniqueItems": True}}}, "structured_outputs.json", "unique"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs.json", "JSON"),
        ({"structured_outputs": {"json": {"$ref": "http://127.0.0.1:9/x"}}}, "structured_outputs.json", "127.0.0.1"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs.regex", "unclosed group"),
        ({"structured_outputs": {"json": {"$ref": "#"}}}, "structured_outputs.json", "no text"),
        ({"structured_outputs": {"regex": "(a{1000}){1000}"}}, "structured_outputs.regex", "too many"),
        ({"structured_outputs": {"regex": "a" * 200_000}}, "structured_outputs.regex", "200000"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice", "at least 1"),
        ({"structured_outputs": {"choice": [1]}}, "structured_outputs.choice[0]", "string"),
        ({"structured_outputs": {"grammar": "start: other"}}, "structured_outputs.grammar", "other"),
        ({"structured_outputs": {"grammar": "root ::= ("}}, "structured_outputs.grammar", "compiled"),
        ({"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs.structural_tag", "triggers"),
        ({"structured_outputs": {}}, "structured_outputs", "none"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs", "choice"),
        ({"guided_json": {"type": "thing"}}, "guided_json", "thing"),
        ({"guided_whitespace_pattern": " "}, "guided", "none"),
        ({"guided_choice": ["a"], "guided_whitespace_pattern": " "}, "guided_whitespace_pattern", "no effect"),
        (
            {"structured_outputs": {"regex": "a", **TIGHT}},
            "structured_outputs.disable_any_whitespace",
            "where no JSON is asked for",
        ),
        (
            {"structured_outputs": {"json_object": True, **TIGHT, "whitespace_pattern": " "}},
            "structured_outputs.whitespace_pattern",
            "beside disable_any_whitespace",
        ),
        ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "guided_regex", "both"),
        ({"allowed_token_ids": [10**6]}, "allowed_token_ids", "vocabulary"),
        ({"allowed_token_ids": []}, "allowed_token_ids", "at least 1"),
        ({"bad_words": [" "]}, "bad_words", "256"),
        ({"typical_p": 0}, "typical_p", "greater"),
        ({"top_n_sigma": 1.0}, "top_n_sigma", "not supported"),
    ],
)
def test_what_cannot_be_followed_is_refused(
    client: httpx.Client, fields: dict[str, Any], param: str, words: str
) -> None:
    error = complain(client, **fields)
    assert error["param"] == param
    assert words in error["message"]
    assert len(error["message"]) < 700


def test_a_dead_end_is_an_error_in_words(client: httpx.Client) -> None:
    error = complain(client, structured_outputs={"regex": "ab"}, bad_words=["ab", "a", "b"])
    assert "bad_words" in error["message"]
    body = {"prompt": "x", "structured_outputs": {"regex": "ab"}, "allowed_token_ids": [5], "stream": True}
    with client.stream("POST", "/v1/completions", json=body) as answer:
        text = answer.read().decode()
    assert '"error"' in text
    assert text.endswith("data: [DONE]\n\n")


def test_text_formats_that_ask_for_nothing(client: httpx.Client) -> None:
    free = complete(client, max_tokens=8)
    assert complete(client, max_tokens=8, response_format={"type": "text"}, structured_outputs=None) == free


def test_allowed_tokens_and_bad_words(llm: LLM, client: httpx.Client) -> None:
    allowed = [300, 301, 302, 303]
    assert set(complete(client, allowed_token_ids=allowed, return_token_ids=True)["token_ids"]) <= set(allowed)
    free = complete(client, temperature=0, max_tokens=40)["text"]
    words = re.findall(r"\w{2,}", free)
    assert words
    without = complete(client, temperature=0, max_tokens=40, bad_words=words[:1])["text"]
    assert without != free


SCALARS = st.one_of(
    st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"type": "integer", "minimum": -5, "maximum": 300}]),
    st.lists(st.one_of(st.text(max_size=6), st.integers(-9, 9), st.none()), min_size=1, max_size=3).map(
        lambda values: {"enum": values}
    ),
    st.integers(0, 5).map(lambda length: {"type": "string", "maxLength": length}),
)
SCHEMAS = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=2).map(lambda some: {"anyOf": some}),
        inner.map(lambda item: {"type": "array", "items": item, "maxItems": 2}),
        st.dictionaries(st.sampled_from(["a", "b b", "é"]), inner, max_size=3).map(
            lambda fields: {
                "type": "object",
                "properties": fields,
                "required": sorted(fields)[:1],
                "additionalProperties": False,
            }
        ),
    ),
    max_leaves=4,
)


def is_valid(value: Any, schema: dict[str, Any]) -> bool:
    """As JSON Schema says, for the few words that are used above."""
    if "enum" in schema:
        return any(value == each and type(value) is type(each) for each in schema["enum"])
    if "anyOf" in schema:
        return any(is_valid(value, each) for each in schema["anyOf"])
    if schema["type"] == "array":
        return isinstance(value, list) and len(value) <= 2 and all(is_valid(item, schema["items"]) for item in value)
    if schema["type"] == "object":
        fields = schema["properties"]
        return (
            isinstance(value, dict)
            and set(schema["required"]) <= set(value) <= set(fields)
            and all(is_valid(item, fields[name]) for name, item in value.items())
        )
    if schema["type"] == "string":
        return isinstance(value, str) and len(value) <= schema["maxLength"]
    if schema["type"] == "integer":
        return type(value) is int and -5 <= value <= 300
    return value is None if schema["type"] == "null" else type(value) is bool


@settings(max_examples=25, deadline=None)
@given(schema=SCHEMAS, seed=st.integers(0, 99))
def test_any_schema_is_obeyed(url: str, schema: dict[str, Any], seed: int) -> None:
    with httpx.Client(base_url=url, timeout=60) as client:
        choice = complete(client, structured_outputs={"json": schema, **TIGHT}, seed=seed, max_tokens=400)
    assert choice["finish_reason"] == "stop"
    assert is_valid(json.loads(choice["text"]), schema)
