"""Guesses of how a text goes on: as it did the last time. Prompt lookup, or n-gram speculation, without a second model.

A guess is computed in the step of the token before it and kept if it is what the model says there, so it changes how
soon a token comes and never which. Knows no requests.
"""

from collections.abc import Sequence

_SHORTEST, _LONGEST = 3, 5  # how many tokens at a text's end are looked for further up
_REACH = 8192  # tokens


class Drafter:
    """Follows one text. Where it was right it guesses twice as far the next time, and else as far as it was right."""

    __slots__ = ("_text", "_width")

    def __init__(self) -> None:
        self._text = ""  # a character for each token: strings are searched faster than lists
        self._width = 1

    def propose(self, token_ids: Sequence[int], *, limit: int) -> tuple[int, ...]:
        """Up to `limit` tokens that may come next; none where the end has not occurred before.

        `token_ids` goes on from where it was at the last call.
        """
        self._text += "".join(map(chr, token_ids[len(self._text) :]))
        place = _find_last(self._text)
        if place is None:
            return ()
        period = len(token_ids) - place  # a text that repeats itself goes on to do so
        return tuple(token_ids[place + index % period] for index in range(min(self._width, limit)))

    def learn(self, *, num_proposed: int, num_right: int) -> None:
        """What came of the last guess that was computed."""
        is_right = num_right == num_proposed
        self._width = max(self._width, 2 * num_proposed) if is_right else max(num_right, 1)


def _find_last(text: str) -> int | None:
    """Where it goes on after the last place at which the text's end occurred before, the longest that did."""
    place = None
    for length in range(_SHORTEST, min(_LONGEST, len(text) - 1) + 1):
        start = text.rfind(text[-length:], max(len(text) - _REACH, 0), len(text) - 1)
        if start < 0:
            break
        place = start + length
    return place
