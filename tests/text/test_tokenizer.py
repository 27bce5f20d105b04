"""The tokenizer against transformers' AutoTokenizer on the same directory."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import processors
from transformers import AutoTokenizer

from qserve.errors import BrokenCheckpoint, NotACheckpoint
from qserve.text.tokenizer import Tokenizer, load_tokenizer
from tests import tiny
from tests.text.conftest import metaspace_backend, sentencepiece_backend, write

TEXTS = ("Hello, world", "  two  spaces", "", "naïve 東京 👩‍👩‍👧", "<s>written out</s> end", "line\nline")


def with_bos_template(backend: Backend) -> Backend:
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return backend


@pytest.mark.parametrize(
    ("backend", "settings"),
    [
        (sentencepiece_backend(), {}),
        (metaspace_backend(), {}),
        (with_bos_template(sentencepiece_backend()), {}),
        (with_bos_template(sentencepiece_backend()), {"add_bos_token": False}),
        (sentencepiece_backend(), {"add_bos_token": True}),
        (sentencepiece_backend(), {"add_bos_token": True, "add_eos_token": True}),
        (sentencepiece_backend(), {"add_bos_token": True, "bos_token": None}),
        (sentencepiece_backend(), {"pad_token": "<new-pad>", "additional_special_tokens": ["<one>", "<two>"]}),
        (
            sentencepiece_backend(),
            {"added_tokens_decoder": {"900": {"content": "<later>", "special": True, "normalized": False}}},
        ),
    ],
)
def test_ids_are_those_of_transformers(tmp_path: Path, backend: Backend, settings: dict[str, Any]) -> None:
    directory = write(tmp_path, backend, **settings)
    ours, theirs = load_tokenizer(directory), AutoTokenizer.from_pretrained(directory)
    for text in [*TEXTS, *(f"a{token}b" for token in theirs.all_special_tokens)]:
        for add_special_tokens in (True, False):
            expected = theirs.encode(text, add_special_tokens=add_special_tokens)
            assert ours.encode(text, add_special_tokens=add_special_tokens) == expected
            assert ours.decode(expected) == theirs.decode(expected, skip_special_tokens=True)
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert ours.special_ids >= set(theirs.all_special_ids)


def test_truncation_and_padding_of_the_file_are_off(tmp_path: Path) -> None:
    backend = metaspace_backend()
    backend.enable_truncation(4)
    backend.enable_padding(length=100)
    tokenizer = load_tokenizer(write(tmp_path, backend))
    assert 4 < len(tokenizer.encode("a long text of many tokens")) < 100


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        (None, None, {2}),
        ({"eos_token_id": [5, 7]}, {"eos_token_id": 9}, {2, 5, 7}),
        ({"eos_token_id": 5}, None, {2, 5}),
        ({}, {"eos_token_id": 9}, {2, 9}),
    ],
)
def test_ends_are_the_generation_settings_and_the_tokenizers_own(
    tmp_path: Path, generation: dict[str, Any] | None, config: dict[str, Any] | None, expected: set[int]
) -> None:
    directory = write(tmp_path, metaspace_backend())
    for name, content in (("generation_config.json", generation), ("config.json", config)):
        if content is not None:
            (directory / name).write_text(json.dumps(content))
    assert load_tokenizer(directory).end_token_ids == expected


def test_bytes_of_tokens_joined_are_the_text(byte_level: Tokenizer) -> None:
    text = "naïve 👩‍👩‍👧 東京"
    ids = byte_level.encode(text, add_special_tokens=False)
    assert b"".join(map(byte_level.token_bytes, ids)).decode() == text


def test_bytes_of_byte_tokens(sentencepiece: Tokenizer) -> None:
    ids = sentencepiece.encode("a👩", add_special_tokens=False)
    assert b"".join(map(sentencepiece.token_bytes, ids)).decode() == " a👩"
    assert sentencepiece.token_bytes(1) == b"<s>"


def test_a_piece_of_a_character_is_written_as_bytes(byte_level: Tokenizer) -> None:
    assert byte_level.token_text(byte_level.encode("é", add_special_tokens=False)[0]) == "bytes:\\xc3"
    assert byte_level.token_text(byte_level.vocabulary_size + 5) == ""


def test_a_tokenizer_without_tokenizer_json_is_converted(tmp_path: Path) -> None:
    tiny.make_tokenizer(tmp_path)
    expected = load_tokenizer(tmp_path).encode("Hello there")
    state = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "vocab.json").write_text(json.dumps(state["model"]["vocab"]))
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in state["model"]["merges"]]
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "tokenizer_class": "GPT2Tokenizer"}))
    (tmp_path / "tokenizer.json").unlink()
    assert load_tokenizer(tmp_path).encode("Hello there") == expected


def test_a_directory_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotACheckpoint, match=r"expected tokenizer\.json"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_broken_file_is_named(tmp_path: Path, name: str) -> None:
    tiny.make_tokenizer(tmp_path)
    (tmp_path / name).write_text('{"cut')
    with pytest.raises(BrokenCheckpoint, match=name):
        load_tokenizer(tmp_path)
