"""Streamed text is the text decoded at once, whatever the tokens; the oracle is the tokenizers library's own decode."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qserve.text.detokenizer import make_detokenizer
from qserve.text.tokenizer import Tokenizer

EXAMPLES = settings(max_examples=300, deadline=None)
UNICODE = "naïve café — Grüße, 東京 👩‍👩‍👧‍👦 🇫🇷\u2028 e\u0301\x85\n\ttab ﬁ"


def pieces(tokenizer: Tokenizer, ids: list[int], *, prompt: list[int] | None = None, skip: bool = True) -> list[str]:
    detokenizer = make_detokenizer(tokenizer, prompt or [], skipped=None if skip else frozenset())
    return [*(detokenizer.feed(token_id) for token_id in ids), detokenizer.finish()]


def random_ids(size: int) -> st.SearchStrategy[list[int]]:
    # The first ids are special tokens and bytes, so that runs of incomplete characters are common; some ids beyond
    # the vocabulary stand for the padding that models have at the end of theirs.
    return st.lists(st.one_of(st.integers(0, 260), st.integers(0, size + 3)), max_size=40)


@EXAMPLES
@given(data=st.data(), skip=st.booleans())
def test_pieces_joined_are_the_whole_text(tokenizer: Tokenizer, data: st.DataObject, skip: bool) -> None:
    ids = data.draw(random_ids(tokenizer.vocabulary_size))
    assert "".join(pieces(tokenizer, ids, skip=skip)) == tokenizer.decode(ids, skip_special_tokens=skip)


@EXAMPLES
@given(data=st.data())
def test_after_a_prompt_the_first_word_keeps_its_space(tokenizer: Tokenizer, data: st.DataObject) -> None:
    words = st.text("abc de,é東", min_size=1, max_size=12)
    prompt = tokenizer.encode(data.draw(words), add_special_tokens=False)
    ids = tokenizer.encode(data.draw(words), add_special_tokens=False)
    if tokenizer.is_byte_token(prompt[-1]) and tokenizer.is_byte_token(ids[0]):
        return  # one run of bytes over both: what is before it cannot be told from what is behind
    whole, before = tokenizer.decode(prompt + ids), tokenizer.decode(prompt)
    assert "".join(pieces(tokenizer, ids, prompt=prompt)) == whole[len(before) :]


@EXAMPLES
@given(data=st.data())
def test_no_piece_is_repaired_later(tokenizer: Tokenizer, data: st.DataObject) -> None:
    """What left is the beginning of the whole text at every moment, so no U+FFFD has to be taken back."""
    ids = data.draw(random_ids(tokenizer.vocabulary_size))
    sent, whole = "", tokenizer.decode(ids)
    for piece in pieces(tokenizer, ids):
        sent += piece
        assert whole.startswith(sent)


@given(text=st.text(max_size=30))
@EXAMPLES
def test_any_text_survives_byte_level_streaming(byte_level: Tokenizer, text: str) -> None:
    assert "".join(pieces(byte_level, byte_level.encode(text, add_special_tokens=False))) == text


@pytest.mark.parametrize("name", ["byte_level", "sentencepiece"])
def test_a_character_arrives_whole(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(name)
    ids = tokenizer.encode(UNICODE, add_special_tokens=False)
    found = pieces(tokenizer, ids)
    assert "".join(found) == UNICODE
    assert not any("\ufffd" in piece for piece in found)
    assert len([piece for piece in found if piece]) > 20  # streamed, not held back to the end


def test_a_prompt_that_ends_inside_a_character_is_completed(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("👩", add_special_tokens=False)
    assert len(ids) > 1
    assert "".join(pieces(byte_level, ids[1:], prompt=ids[:1])) == "👩"


def test_a_character_left_incomplete_is_one_replacement(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("a👩", add_special_tokens=False)
    assert pieces(byte_level, ids[:-1])[-1] == "\ufffd"


def test_special_tokens_are_left_out_only_when_asked(byte_level: Tokenizer) -> None:
    end = byte_level.token_to_id("<|im_end|>")
    assert end is not None
    ids = [*byte_level.encode("hi", add_special_tokens=False), end]
    assert "".join(pieces(byte_level, ids)) == "hi"
    assert "".join(pieces(byte_level, ids, skip=False)) == "hi<|im_end|>"
