"""A reply read in blocks: what is opened, how it grows, and that it does not matter how the text was cut."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qserve.api.blocks import Block, BlockReader, Change
from qserve.api.tools import ReplyForm
from qserve.engine.request import FinishReason, TokenLogprob
from qserve.generation import ScoredToken, TextDelta
from qserve.text.reasoning import REASONING_FORMATS
from qserve.text.tools import TOOL_FORMATS

CALL = '{"name": "stop", "arguments": {"now": "soon"}}'
REPLY = f"<think>Hm.</think>I stop.<tool_call>\n{CALL}\n</tool_call>\n<tool_call>\n{CALL}\n</tool_call> Done."


def form_of(*, max_calls: int | None = None, with_reasoning: bool = True) -> ReplyForm:
    return ReplyForm(
        tools=TOOL_FORMATS[0],
        names=frozenset({"stop"}),
        max_calls=max_calls,
        reasoning=REASONING_FORMATS[0],
        is_reasoning_open=False,
        with_reasoning=with_reasoning,
    )


def read(
    pieces: list[str], form: ReplyForm | None, *, reason: FinishReason = FinishReason.STOP
) -> tuple[BlockReader, list[Change]]:
    """One token a piece."""
    reader, changes = BlockReader(form), []
    for number, piece in enumerate(pieces, start=1):
        is_last = number == len(pieces)
        delta = TextDelta(text=piece, num_output_tokens=number, finish_reason=reason if is_last else None)
        changes += list(reader.read(delta))
    return reader, changes


def shown(blocks: list[Block]) -> list[tuple[str, str, str]]:
    return [(block.kind, block.name, block.text) for block in blocks]


@given(st.lists(st.integers(0, len(REPLY))))
def test_blocks_do_not_depend_on_the_cuts(cuts: list[int]) -> None:
    edges = [0, *sorted(cuts), len(REPLY)]
    pieces = [REPLY[start:end] for start, end in pairwise(edges)]
    reader, changes = read(pieces, form_of())
    assert shown(reader.blocks) == [
        ("reasoning", "", "Hm."),
        ("text", "", "I stop."),
        ("call", "stop", '{"now": "soon"}'),
        ("call", "stop", '{"now": "soon"}'),
        ("text", "", " Done."),
    ]
    told = [[change for change in changes if change.block.index == block.index] for block in reader.blocks]
    assert [change for of_block in told for change in of_block] == changes
    for block, (first, *middle, last) in zip(reader.blocks, told, strict=True):
        assert (first.kind, last.kind, {change.kind for change in middle}) == ("open", "close", {"grow"})
        assert "".join(change.text for change in middle) == block.text


def test_what_the_client_does_not_want_is_left_out() -> None:
    reader, _ = read([REPLY], form_of(max_calls=1, with_reasoning=False))
    assert [kind for kind, _, _ in shown(reader.blocks)] == ["text", "call", "text"]


def test_a_reply_without_a_form_is_text() -> None:
    reader, changes = read(["<think>", "Hm"], None)
    assert shown(reader.blocks) == [("text", "", "<think>Hm")]
    assert [change.kind for change in changes] == ["open", "grow", "grow", "close"]


@pytest.mark.parametrize("form", [None, form_of()])
def test_nothing_at_all_is_an_empty_text(form: ReplyForm | None) -> None:
    reader, changes = read([""], form)
    assert shown(reader.blocks) == [("text", "", "")]
    assert [change.kind for change in changes] == ["open", "close"]


def test_the_block_in_which_the_reply_had_to_end_is_cut() -> None:
    reader, _ = read([REPLY[:30]], form_of(), reason=FinishReason.LENGTH)
    assert [block.is_cut for block in reader.blocks] == [False, True]
    assert not any(block.is_cut for block in read([REPLY], form_of())[0].blocks)
    reader = BlockReader(None)
    list(reader.read(TextDelta(text="Half a")))
    reader.cut()
    assert reader.blocks[0].is_cut


def test_scores_go_to_the_text() -> None:
    def scored(token_id: int) -> tuple[ScoredToken, ...]:
        return (ScoredToken(token_id, 0, (TokenLogprob(token_id, -1.0, 1),)),)

    reader = BlockReader(form_of())
    pieces = ["<think>Hm</think>", "I", " stop", ""]
    for number, piece in enumerate(pieces):
        reason = FinishReason.STOP if number == 3 else None
        list(reader.read(TextDelta(text=piece, logprobs=scored(number), finish_reason=reason)))
    assert [[token.token_id for token in block.tokens] for block in reader.blocks] == [[], [1, 2, 3]]
