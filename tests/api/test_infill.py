"""A text that is filled in between a prompt and a suffix, where the tokenizer has tokens for it."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from qserve.text.infill import INFILL_FORMATS, infill
from tests import tiny
from tests.api.conftest import Server, serving

NAMES = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")


@pytest.fixture(scope="module")
def filling(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The last three tokens of the tiny tokenizer become those for the three places."""
    directory = tmp_path_factory.mktemp("infill")
    tiny.make_tokenizer(directory)
    file = directory / "tokenizer.json"
    told = json.loads(file.read_text())
    model, first = told["model"], tiny.VOCABULARY_SIZE - 3
    model["vocab"] = {token: token_id for token, token_id in model["vocab"].items() if token_id < first}
    model["merges"] = [(left, right) for left, right in model["merges"] if left + right in model["vocab"]]
    names = dict(enumerate(NAMES, start=first))
    told["added_tokens"] += [{**told["added_tokens"][0], "id": key, "content": name} for key, name in names.items()]
    file.write_text(json.dumps(told))
    with serving(directory) as server:
        yield server


def ids_of(server: Server, **fields: Any) -> list[int]:
    body = {"max_tokens": 2, "return_token_ids": True, **fields}
    (choice,) = httpx.post(server.url + "/v1/completions", json=body).raise_for_status().json()["choices"]
    return list(choice["prompt_token_ids"])


@pytest.mark.parametrize("as_ids", [False, True])
def test_the_model_reads_what_stands_around_the_gap(filling: Server, as_ids: bool) -> None:
    encode = filling.llm.tokenizer.encode
    before, after, between = range(tiny.VOCABULARY_SIZE - 3, tiny.VOCABULARY_SIZE)
    prompt = encode("def add(a, b):") if as_ids else "def add(a, b):"
    expected = [before, *encode("def add(a, b):"), after, *encode("return sum"), between]
    assert ids_of(filling, prompt=prompt, suffix="return sum") == expected
    assert ids_of(filling, prompt=prompt, suffix="") == encode("def add(a, b):")


@pytest.mark.parametrize("fields", [{"echo": True}, {"truncate_prompt_tokens": 5}])
def test_it_goes_together_with_nothing_that_cuts_or_repeats_the_prompt(filling: Server, fields: dict[str, Any]) -> None:
    body = {"prompt": "x", "suffix": "y", **fields}
    response = httpx.post(filling.url + "/v1/completions", json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "suffix")


@pytest.mark.parametrize("form", INFILL_FORMATS, ids=lambda form: form.before)
def test_forms_are_found_by_their_tokens(form: Any) -> None:
    known = {form.before: 7, form.after: 8, form.between: 9}
    assert infill([1, 2], [3], token_to_id=known.get) == [7, 1, 2, 8, 3, 9]
    assert infill([1, 2], [3], token_to_id={form.before: 7}.get) is None
