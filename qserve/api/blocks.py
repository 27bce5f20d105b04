"""A reply in blocks, one after the other: reasoning, text, and calls; each is opened, grows, and is closed.

What the protocols that speak in items or in content blocks have in common. Knows none of them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from qserve.api.tools import ReplyForm
from qserve.engine.request import FinishReason
from qserve.generation import ScoredToken, TextDelta
from qserve.text.pieces import Part


@dataclass(slots=True, kw_only=True)
class Block:
    """A run of a reply, as far as it has come. Of a call, the text is its arguments."""

    kind: Literal["reasoning", "text", "call"]
    index: int
    name: str = ""
    call_id: str = ""
    text: str = ""
    tokens: list[ScoredToken] = field(default_factory=list)  # of text, where scores were asked for
    is_cut: bool = False  # whether the reply had to end in it


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What has happened to a block; `text` and `tokens` are what it grew by."""

    kind: Literal["open", "grow", "close"]
    block: Block
    text: str = ""
    tokens: Sequence[ScoredToken] = ()


class BlockReader:
    """Reads one reply; there is at least one block in it, if only an empty text."""

    def __init__(self, form: ReplyForm | None) -> None:
        self._form = form
        self._parser = None if form is None else form.make_parser()
        self._unplaced: list[ScoredToken] = []  # scores of tokens whose text is not certain yet
        self._is_open = False  # whether the last block is
        self.blocks: list[Block] = []

    def read(self, delta: TextDelta) -> Iterator[Change]:
        """What a delta changes, its end included. Read to the end before the next delta."""
        self._unplaced += delta.logprobs
        for part in self._parts(delta):
            yield from self._add(part)
        if delta.finish_reason is not None:
            yield from self._end(delta.finish_reason)

    def cut(self) -> None:
        """No more will come, though the reply was not at its end."""
        if self._is_open:
            self.blocks[-1].is_cut = True

    def _parts(self, delta: TextDelta) -> Iterator[Part]:
        if self._form is None or self._parser is None:
            if delta.text:
                yield Part(kind="text", text=delta.text)
            return
        found = self._parser.feed(delta.text)
        if delta.finish_reason is not None:
            found += self._parser.finish()
        yield from filter(self._form.shows, found)

    def _add(self, part: Part) -> Iterator[Change]:
        if not self._is_open or self.blocks[-1].kind != part.kind or part.name is not None:
            yield from self._close()
            yield self._open(part)
        yield from self._grow(part.text)

    def _open(self, part: Part) -> Change:
        call_id = self._form.make_id() if self._form and part.kind == "call" else ""
        self.blocks.append(Block(kind=part.kind, index=len(self.blocks), name=part.name or "", call_id=call_id))
        self._is_open = True
        return Change(kind="open", block=self.blocks[-1])

    def _grow(self, text: str) -> Iterator[Change]:
        block = self.blocks[-1]
        tokens, self._unplaced = self._unplaced if block.kind == "text" else [], []
        if text or tokens:
            block.text += text
            block.tokens += tokens
            yield Change(kind="grow", block=block, text=text, tokens=tokens)

    def _close(self) -> Iterator[Change]:
        if self._is_open:
            self._is_open = False
            yield Change(kind="close", block=self.blocks[-1])

    def _end(self, reason: FinishReason) -> Iterator[Change]:
        if not self.blocks:
            yield self._open(Part(kind="text", text=""))
        if self._is_open:
            yield from self._grow("")
            self.blocks[-1].is_cut = reason is FinishReason.LENGTH
        yield from self._close()
