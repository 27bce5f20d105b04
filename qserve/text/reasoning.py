"""Reasoning that a model writes before its answer, told apart from it.

The forms are a table; which one a model has shows in its chat template. Knows no HTTP.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from qserve.text.detokenizer import Detokenizer
from qserve.text.pieces import Part, PieceReader, count_held
from qserve.text.tools import CallParser


@dataclass(frozen=True, slots=True, kw_only=True)
class ReasoningFormat:
    begin: str
    end: str


REASONING_FORMATS: tuple[ReasoningFormat, ...] = (
    ReasoningFormat(begin="<think>", end="</think>"),
    ReasoningFormat(begin="[THINK]", end="[/THINK]"),
    ReasoningFormat(begin="<|START_THINKING|>", end="<|END_THINKING|>"),
    ReasoningFormat(begin="<seed:think>", end="</seed:think>"),
)


def find_reasoning_format(template: str) -> ReasoningFormat | None:
    """The form that a chat template knows, if it knows one."""
    return next((form for form in REASONING_FORMATS if form.end in template), None)


class ReplyParser(PieceReader):
    """A whole reply: reasoning first, where there is any, then text and calls."""

    def __init__(self, *, reasoning: ReasoningFormat | None, is_open: bool, calls: CallParser | None) -> None:
        self._form = reasoning
        self._is_open = is_open  # the prompt has begun the reasoning already
        self._calls = calls
        self._has_thought = False
        super().__init__()

    @property
    def num_calls(self) -> int:
        return 0 if self._calls is None else self._calls.num_calls

    @property
    def is_thinking(self) -> bool:
        """Whether what comes next is reasoning, as far as can be told."""
        return self._state == self._read_thought

    @property
    def is_answering(self) -> bool:
        """Whether no reasoning can come any more."""
        return self._state in (self._skip_blanks, self._read_answer)

    def finish(self) -> list[Part]:
        return [*super().finish(), *(self._calls.finish() if self._calls else ())]

    def _first_state(self) -> Callable[[bool], bool]:
        if self._form is None:
            return self._read_answer
        return self._read_thought if self._is_open else self._read_start

    def _read_start(self, is_end: bool) -> bool:
        """A text that begins with anything but the marker has no reasoning."""
        assert self._form is not None
        start, begin = self._buffer.lstrip(), self._form.begin
        if start.startswith(begin):
            self._buffer, self._state = start.removeprefix(begin), self._read_thought
            return True
        if begin.startswith(start) and not is_end:
            return False
        self._state = self._read_answer
        return True

    def _read_thought(self, is_end: bool) -> bool:
        assert self._form is not None
        thought, marker, rest = self._buffer.partition(self._form.end)
        held = 0 if marker or is_end else count_held(thought, self._form.end)
        text = thought[: len(thought) - held]
        if not self._has_thought:
            text = text.lstrip()
        text = text.rstrip() if marker or is_end else text
        if text:
            self._has_thought = True
            self._parts.append(Part(kind="reasoning", text=text))
        self._buffer = rest if marker else thought[len(thought) - held :]
        if marker:
            self._state = self._skip_blanks
        return bool(marker)

    def _skip_blanks(self, is_end: bool) -> bool:
        self._buffer = self._buffer.lstrip()
        if self._buffer:
            self._state = self._read_answer
        return bool(self._buffer)

    def _read_answer(self, is_end: bool) -> bool:
        text, self._buffer = self._buffer, ""
        if text:
            self._parts += [Part(kind="text", text=text)] if self._calls is None else self._calls.feed(text)
        return False


class ReasoningCounter:
    """How many of a reply's tokens are reasoning: all that were made until its end was written, the markers included.

    It reads token by token, whatever pieces the text is sent in.
    """

    def __init__(self, form: ReasoningFormat, *, is_open: bool, detokenizer: Detokenizer) -> None:
        self._reader = ReplyParser(reasoning=form, is_open=is_open, calls=None)
        self._detokenizer = detokenizer
        self._num_tokens = 0
        self.num_reasoning_tokens = 0

    def take(self, token_ids: Iterable[int]) -> None:
        for token_id in token_ids:
            if self._reader.is_answering:
                return
            was_thinking = self._reader.is_thinking
            self._num_tokens += 1
            self._reader.feed(self._detokenizer.feed(token_id))
            if was_thinking or self._reader.is_thinking:
                self.num_reasoning_tokens = self._num_tokens
