"""The tokenizer of a GGUF file, from metadata alone."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from qserve.errors import ArtifactError
from tests.tiny import CHATML, SPECIAL_TOKENS, make_tokenizer, prose
from training.gguf_tokenizer import (
    PRE_TOKENIZERS,
    TokenType,
    build_tokenizer,
    generation_settings,
    stop_ids,
    tokenizer_settings,
)

SAMPLES = (
    "plain words",
    "  two  spaces\n\n\tand tabs \r\n",
    "12345 and 6½ and ٣٤",
    "I'm, DON'T, we'll",
    "naïve 東京 😀 e\u0301",
    "<|im_start|>user\nHello<|im_end|>",
    "camelCaseWords and SHOUTING, //comments//",
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(directory)
    return directory


@pytest.fixture
def metadata(tiny: Path) -> dict[str, Any]:
    parts = json.loads((tiny / "tokenizer.json").read_text())
    tokens = [token for token, _ in sorted(parts["model"]["vocab"].items(), key=lambda item: item[1])]
    return {
        "general.architecture": "llama",
        "llama.context_length": 512,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [
            TokenType.CONTROL if token in SPECIAL_TOKENS else TokenType.NORMAL for token in tokens
        ],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in parts["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.chat_template": CHATML,
    }


def test_ids_equal_the_tokenizer_it_came_from(tiny: Path, metadata: dict[str, Any]) -> None:
    original = Tokenizer.from_file(str(tiny / "tokenizer.json"))
    imported = build_tokenizer(metadata)
    for text in (*SAMPLES, prose()[:20_000]):
        assert imported.encode(text).ids == original.encode(text).ids


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_every_pre_tokenizer_gives_the_text_back(metadata: dict[str, Any], pre: str) -> None:
    tokenizer = build_tokenizer(metadata, pre_tokenizer=pre)
    normalizes = PRE_TOKENIZERS[pre].normalizes
    for text in SAMPLES:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        expected = tokenizer.normalizer.normalize_str(text) if normalizes else text
        assert tokenizer.decode(ids, skip_special_tokens=False) == expected


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-2", ["I", "'m", " 12345", " XyZ", "//", "\n\n", " ok"]),
        ("smollm", ["I", "'m", " ", "1", "2", "3", "4", "5", " XyZ", "//", "\n\n", " ok"]),
        ("llama-bpe", ["I", "'m", " ", "123", "45", " XyZ", "//\n\n", " ok"]),
        ("qwen2", ["I", "'m", " ", "1", "2", "3", "4", "5", " XyZ", "//\n\n", " ok"]),
        ("tekken", ["I", "'m", " ", "1", "2", "3", "4", "5", " Xy", "Z", "//\n\n", " ok"]),
        ("gpt-4o", ["I'm", " ", "123", "45", " Xy", "Z", "//\n\n", " ok"]),
    ],
)
def test_text_is_cut_by_the_rules_of_its_name(pre: str, pieces: list[str]) -> None:
    cut = PRE_TOKENIZERS[pre].build().pre_tokenize_str("I'm 12345 XyZ//\n\n ok")
    assert [piece.replace("Ġ", " ").replace("Ċ", "\n") for piece, _ in cut] == pieces


def test_special_tokens_are_found_in_text_and_left_out_of_decoded_text(metadata: dict[str, Any]) -> None:
    tokenizer = build_tokenizer(metadata)
    ids = tokenizer.encode("<|im_start|>hi<|im_end|>").ids
    assert (ids[0], ids[-1]) == (1, 2)
    assert tokenizer.decode(ids) == "hi"


def test_a_user_defined_token_is_one_token_and_stays_in_decoded_text(metadata: dict[str, Any]) -> None:
    types = list(metadata["tokenizer.ggml.token_type"])
    types[1] = TokenType.USER_DEFINED
    tokenizer = build_tokenizer({**metadata, "tokenizer.ggml.token_type": types})
    ids = tokenizer.encode("<|im_start|>hi").ids
    assert ids[0] == 1
    assert tokenizer.decode(ids) == "<|im_start|>hi"


def test_a_text_begins_and_ends_as_the_file_asks(metadata: dict[str, Any]) -> None:
    asking = {**metadata, "tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}
    plain = build_tokenizer(metadata).encode("hi").ids
    assert build_tokenizer(asking).encode("hi").ids == [1, *plain, 2]
    assert build_tokenizer(asking).encode("hi", add_special_tokens=False).ids == plain


def test_settings_name_special_tokens_and_template(metadata: dict[str, Any]) -> None:
    settings = tokenizer_settings(metadata)
    assert (settings["bos_token"], settings["eos_token"], settings["pad_token"]) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|endoftext|>",
    )
    assert settings["chat_template"] == CHATML
    assert settings["model_max_length"] == 512
    assert generation_settings(metadata) == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def test_every_token_that_ends_a_turn_stops_generation(metadata: dict[str, Any]) -> None:
    asking = {**metadata, "tokenizer.ggml.eot_token_id": 0, "tokenizer.ggml.eom_token_id": 2}
    assert stop_ids(asking) == [2, 0]
    assert generation_settings(asking)["eos_token_id"] == [2, 0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer.ggml.pre": "brand-new"}, "pre-tokenizer 'brand-new'.*smollm.*--pre-tokenizer"),
        ({"tokenizer.ggml.model": "rwkv"}, "kind 'rwkv'"),
        ({"tokenizer.ggml.tokens": ["a", "a"]}, "2 tokens of which only 1"),
    ],
)
def test_what_cannot_be_imported_is_said(metadata: dict[str, Any], changes: Mapping[str, Any], message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        build_tokenizer({**metadata, **changes})


def test_a_missing_key_is_named(metadata: dict[str, Any]) -> None:
    del metadata["tokenizer.ggml.merges"]
    with pytest.raises(ArtifactError, match=r"no tokenizer\.ggml\.merges"):
        build_tokenizer(metadata)


def _sentence_piece(*, prefix: bool) -> dict[str, Any]:
    """Letters, bytes and a few words; a better score merges first, as SentencePiece ranks them."""
    special = ["<unk>", "<s>", "</s>"]
    byte_tokens = [f"<0x{value:02X}>" for value in range(256)]
    words = ["▁h", "el", "lo", "▁hel", "▁hello", "ll"]
    letters = list("▁helow")
    tokens = [*special, *byte_tokens, *words, *letters]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [-float(index) for index in range(len(tokens))],
        "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * (len(words) + len(letters))],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_space_prefix": prefix,
    }


def test_sentence_piece_merges_by_score_and_falls_back_to_bytes() -> None:
    tokenizer = build_tokenizer(_sentence_piece(prefix=True))
    assert tokenizer.encode("hello").tokens == ["<s>", "▁hello"]
    assert tokenizer.encode("hello é", add_special_tokens=False).tokens == ["▁hello", "▁", "<0xC3>", "<0xA9>"]


@pytest.mark.parametrize("prefix", [True, False])
def test_sentence_piece_gives_the_text_back(*, prefix: bool) -> None:
    tokenizer = build_tokenizer(_sentence_piece(prefix=prefix))
    for text in ("hello  hello", " lol 😀\n"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
