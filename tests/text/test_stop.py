"""Stop strings against a plain oracle, over every way to cut the text."""

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from qserve.text.stop import StopStrings

# Few letters, so that stop strings overlap themselves and each other.
TEXT = st.text("aab", max_size=24)
STOPS = st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=4)


def oracle(text: str, stops: list[str], *, armed_from: int = 0) -> tuple[int, str] | None:
    """Where the first match ends and which it is: tried at every end, the stop strings in their order."""
    for end in range(armed_from + 1, len(text) + 1):
        for stop in stops:
            if text[:end].endswith(stop):
                return end, stop
    return None


def cut(text: str, places: list[int]) -> list[str]:
    ends = sorted({min(place, len(text)) for place in places} | {0, len(text)})
    return [text[start:end] for start, end in pairwise(ends)]


@settings(max_examples=500, deadline=None)
@given(text=TEXT, stops=STOPS, places=st.lists(st.integers(0, 24)), include=st.booleans())
def test_output_ends_before_the_first_match_however_the_text_is_cut(
    text: str, stops: list[str], places: list[int], include: bool
) -> None:
    watcher, sent = StopStrings(stops, include_in_output=include), ""
    found = oracle(text, stops)
    for piece in cut(text, places):
        sent += watcher.feed(piece)
        if watcher.matched is not None:
            break
    else:
        sent += watcher.finish()
    if found is None:
        assert (sent, watcher.matched) == (text, None)
    else:
        end, stop = found
        assert watcher.matched == stop
        assert sent == (text[:end] if include else text[: end - len(stop)])


@settings(max_examples=500, deadline=None)
@given(text=TEXT, stops=STOPS)
def test_text_waits_only_while_its_tail_may_become_a_stop_string(text: str, stops: list[str]) -> None:
    watcher, sent = StopStrings(stops), ""
    for end in range(1, len(text) + 1):
        sent += watcher.feed(text[end - 1])
        if watcher.matched is not None:
            return
        beginnings = [stop[:length] for stop in stops for length in range(1, len(stop))]
        held = max((len(tail) for tail in beginnings if text[:end].endswith(tail)), default=0)
        assert sent == text[: end - held]


@settings(max_examples=300, deadline=None)
@given(before=TEXT, after=TEXT, stops=STOPS)
def test_a_match_that_ends_too_early_is_text(before: str, after: str, stops: list[str]) -> None:
    watcher = StopStrings(stops)
    sent = watcher.feed(before, can_stop=False) + watcher.feed(after)
    found = oracle(before + after, stops, armed_from=len(before))
    if found is None:
        assert sent + watcher.finish() == before + after
    else:
        assert sent == (before + after)[: found[0] - len(found[1])]


def test_without_stop_strings_nothing_waits() -> None:
    assert StopStrings([]).feed("anything") == "anything"


def test_of_two_completed_at_once_the_first_listed_counts() -> None:
    watcher = StopStrings(["b", "ab"])
    assert watcher.feed("xab") == "xa"
    assert watcher.matched == "b"
