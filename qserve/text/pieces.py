"""Text that is read while it arrives: the pieces that a reply is made of, and what all readers have in common."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A piece of a reply. Of a call, `index` numbers it, `name` comes with its first piece, `text` is of arguments."""

    kind: Literal["text", "reasoning", "call"]
    text: str
    index: int = 0
    name: str | None = None


class PieceReader(ABC):
    """Reads by states. What comes out, joined, does not depend on how the text was cut when it came in.

    A state takes what it can from the buffer, adds parts, perhaps names the next state, and says whether that one can
    go on at once. It is told when no more text will come.
    """

    def __init__(self) -> None:
        self._buffer = ""
        self._parts: list[Part] = []
        self._state = self._first_state()

    @abstractmethod
    def _first_state(self) -> Callable[[bool], bool]: ...

    def feed(self, text: str) -> list[Part]:
        self._buffer += text
        return self._read(is_end=False)

    def finish(self) -> list[Part]:
        return self._read(is_end=True)

    def _read(self, *, is_end: bool) -> list[Part]:
        while self._state(is_end):
            pass
        taken, self._parts = self._parts, []
        return taken


def count_held(text: str, marker: str) -> int:
    """How many characters at the end could be the beginning of a marker, and the blanks before them."""
    longest = min(len(marker) - 1, len(text))
    partial = next((size for size in range(longest, 0, -1) if marker.startswith(text[-size:])), 0)
    kept = text[: len(text) - partial]
    return partial + len(kept) - len(kept.rstrip())
