"""/v1/embeddings and /v1/score, with transformers as the oracle."""

import base64
from array import array
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.api.conftest import Tiny

TEXTS = ["The import system", "naïve 東京", "def f(" * 20]


@pytest.fixture(scope="module")
def model(tiny_server: Tiny) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_server.directory, dtype=torch.float32)


@pytest.fixture
def client(tiny_server: Tiny) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=tiny_server.url, timeout=30) as client:
        yield client
    tiny_server.wait_until_idle()


def post(client: httpx.Client, path: str, **fields: Any) -> dict[str, Any]:
    response = client.post(path, json=fields)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def vectors(answer: dict[str, Any]) -> torch.Tensor:
    assert [row["index"] for row in answer["data"]] == list(range(len(answer["data"])))
    return torch.tensor([row["embedding"] for row in answer["data"]])


@torch.inference_mode()
def hidden_states(model: Any, ids: list[int]) -> torch.Tensor:
    hidden: torch.Tensor = model.model(torch.tensor([ids])).last_hidden_state[0]
    return hidden


class TestEmbeddings:
    @pytest.mark.parametrize("pooling", ["mean", "last"])
    def test_they_are_the_models_pooled_hidden_states(
        self, client: httpx.Client, tiny_server: Tiny, model: Any, pooling: str
    ) -> None:
        found = vectors(post(client, "/v1/embeddings", input=TEXTS, pooling=pooling))
        for text, vector in zip(TEXTS, found, strict=True):
            hidden = hidden_states(model, tiny_server.llm.tokenizer.encode(text))
            expected = hidden.mean(dim=0) if pooling == "mean" else hidden[-1]
            torch.testing.assert_close(vector, expected / expected.norm(), atol=1e-4, rtol=1e-4)
            assert vector.norm() == pytest.approx(1, abs=1e-5)

    def test_every_form_of_input_gives_the_same(self, client: httpx.Client, tiny_server: Tiny) -> None:
        ids = [tiny_server.llm.tokenizer.encode(text) for text in TEXTS]
        answer = post(client, "/v1/embeddings", input=TEXTS)
        assert answer["usage"]["prompt_tokens"] == sum(map(len, ids))
        torch.testing.assert_close(vectors(post(client, "/v1/embeddings", input=ids)), vectors(answer))
        for form in (TEXTS[0], ids[0]):
            torch.testing.assert_close(vectors(post(client, "/v1/embeddings", input=form))[0], vectors(answer)[0])

    def test_base64_holds_the_same_floats(self, client: httpx.Client) -> None:
        plain = vectors(post(client, "/v1/embeddings", input="x"))
        (row,) = post(client, "/v1/embeddings", input="x", encoding_format="base64")["data"]
        assert torch.equal(torch.tensor(array("f", base64.b64decode(row["embedding"]))), plain[0])

    def test_fewer_dimensions_are_the_first_ones_at_length_one(self, client: httpx.Client) -> None:
        whole = vectors(post(client, "/v1/embeddings", input="x", normalize=False))[0]
        short = vectors(post(client, "/v1/embeddings", input="x", dimensions=8))[0]
        torch.testing.assert_close(short, whole[:8] / whole[:8].norm())
        response = client.post("/v1/embeddings", json={"input": "x", "dimensions": 65})
        assert (response.status_code, response.json()["error"]["param"]) == (400, "dimensions")

    def test_the_official_client(self, tiny_server: Tiny, client: httpx.Client) -> None:
        """It asks for base64 by itself."""
        plain = vectors(post(client, "/v1/embeddings", input=TEXTS))
        with openai.OpenAI(base_url=tiny_server.url + "/v1", api_key="none", max_retries=0) as official:
            answer = official.embeddings.create(model="tiny", input=TEXTS)
        torch.testing.assert_close(torch.tensor([row.embedding for row in answer.data]), plain)

    def test_a_text_that_is_too_long_or_cut(self, client: httpx.Client) -> None:
        response = client.post("/v1/embeddings", json={"input": [[5] * 600]})
        assert response.json()["error"]["code"] == "context_length_exceeded"
        cut = post(client, "/v1/embeddings", input=[[5] * 600], truncate_prompt_tokens=512)
        assert cut["usage"]["prompt_tokens"] == 512


class TestScore:
    LABELS = (20, 300, 7)

    def expected(self, model: Any, ids: list[int]) -> torch.Tensor:
        with torch.inference_mode():
            logits = model(torch.tensor([ids])).logits[0, -1]
        return torch.softmax(logits, dim=-1)[list(self.LABELS)]

    def test_labels_after_query_and_item(self, client: httpx.Client, tiny_server: Tiny, model: Any) -> None:
        fields: dict[str, Any] = {"query": "Is this Python?", "items": TEXTS, "label_token_ids": self.LABELS}
        answer = post(client, "/v1/score", **fields)
        assert answer["object"] == "scoring"
        softmaxed = post(client, "/v1/score", **fields, apply_softmax=True)["scores"]
        for text, scores, shares in zip(TEXTS, answer["scores"], softmaxed, strict=True):
            expected = self.expected(model, tiny_server.llm.tokenizer.encode("Is this Python?" + text))
            torch.testing.assert_close(torch.tensor(scores), expected, atol=1e-5, rtol=1e-3)
            torch.testing.assert_close(torch.tensor(shares), expected / expected.sum(), atol=1e-5, rtol=1e-3)

    def test_ids_and_order(self, client: httpx.Client, model: Any) -> None:
        fields: dict[str, Any] = {"query": [5, 6], "items": [[9, 10, 11]], "label_token_ids": self.LABELS}
        for item_first, ids in ((False, [5, 6, 9, 10, 11]), (True, [9, 10, 11, 5, 6])):
            (scores,) = post(client, "/v1/score", **fields, item_first=item_first)["scores"]
            torch.testing.assert_close(torch.tensor(scores), self.expected(model, ids), atol=1e-5, rtol=1e-3)

    @pytest.mark.parametrize(
        ("fields", "param"),
        [
            ({"items": [[1]]}, "items"),
            ({"label_token_ids": []}, "label_token_ids"),
            ({"label_token_ids": [512]}, "label_token_ids"),
            ({"items": ["x"] * 1025}, "items"),
        ],
    )
    def test_what_cannot_be_scored(self, client: httpx.Client, fields: dict[str, Any], param: str) -> None:
        response = client.post("/v1/score", json={"query": "a", "items": "b", "label_token_ids": [1], **fields})
        assert (response.status_code, response.json()["error"]["param"]) == (400, param)
