"""Stop strings in text that arrives in pieces: nothing of one leaks, and no text waits longer than it must.

Knows only text. How the pieces are cut makes no difference to what leaves in the end.
"""

from collections.abc import Sequence


class _Pattern:
    """One stop string and how much of it the text ends with (Knuth, Morris and Pratt, SIAM J. Comput. 6, 1977)."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.num_matched = 0
        self._borders = _borders(text)

    def advance(self, character: str) -> bool:
        """Takes the next character; says whether the text now ends with the whole stop string."""
        length = self.num_matched
        while length and self.text[length] != character:
            length = self._borders[length - 1]
        length += self.text[length] == character
        is_complete = length == len(self.text)
        self.num_matched = self._borders[-1] if is_complete else length
        return is_complete


def _borders(text: str) -> list[int]:
    """For each beginning of `text`: the length of its longest proper beginning that is also its end."""
    borders = [0] * len(text)
    for end in range(1, len(text)):
        length = borders[end - 1]
        while length and text[length] != text[end]:
            length = borders[length - 1]
        borders[end] = length + (text[length] == text[end])
    return borders


class StopStrings:
    """Watches one text for the stop string that is completed first; of several completed at once, the first listed.

    `matched` is that string once it was found; the text has ended there and is fed no further.
    """

    def __init__(self, stops: Sequence[str], *, include_in_output: bool = False) -> None:
        self._patterns = [_Pattern(stop) for stop in stops]
        self._include_in_output = include_in_output
        self._held = ""
        self.matched: str | None = None

    def feed(self, text: str, *, can_stop: bool = True) -> str:
        """The text that may be sent now. With `can_stop` false a stop string that ends here is text like any other."""
        if not self._patterns:
            return text
        buffer = self._held + text
        for position in range(len(self._held), len(buffer)):
            stop = self._advance(buffer[position])
            if stop is not None and can_stop:
                self.matched = stop
                self._held = ""
                return buffer[: position + 1] if self._include_in_output else buffer[: position + 1 - len(stop)]
        num_held = max(pattern.num_matched for pattern in self._patterns)
        self._held = buffer[len(buffer) - num_held :]
        return buffer[: len(buffer) - num_held]

    def finish(self) -> str:
        """What was held back and is text after all."""
        held, self._held = self._held, ""
        return held

    def _advance(self, character: str) -> str | None:
        completed = [pattern.text for pattern in self._patterns if pattern.advance(character)]
        return completed[0] if completed else None
