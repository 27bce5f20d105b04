"""What is guessed of a text, and how far."""

import pytest

from qserve.engine.drafter import Drafter


def propose(token_ids: list[int], *, right: int = 0, limit: int = 15) -> tuple[int, ...]:
    """Of a drafter that was right so many times before."""
    drafter = Drafter()
    for number in range(right):
        drafter.learn(num_proposed=2**number, num_right=2**number)
    return drafter.propose(token_ids, limit=limit)


@pytest.mark.parametrize(
    ("token_ids", "guess"),
    [
        ([], ()),
        ([1], ()),
        ([1, 2, 3], ()),
        ([1, 2, 3, 4, 5, 6, 2, 3], ()),  # two tokens are too few
        ([1, 2, 3, 4, 5, 6, 1, 2, 3], (4, 5, 6, 1)),
        ([1, 2, 3, 4, 0, 1, 2, 3, 5, 0, 1, 2, 3], (5, 0, 1, 2)),  # what came last
        ([9, 1, 2, 3, 4, 0, 1, 2, 3, 5, 9, 1, 2, 3], (4, 0, 1, 2)),  # but what was longer goes before
        ([7, 7, 7, 7], (7, 7, 7, 7)),
        ([1, 2, 3, 4, 2, 3, 4, 2, 3, 4], (2, 3, 4, 2)),  # round and round
        ([0x10FFFF, 0xD800, 3, 0, 0x10FFFF, 0xD800, 3], (0, 0x10FFFF, 0xD800, 3)),
    ],
)
def test_a_text_goes_on_as_it_did_before(token_ids: list[int], guess: tuple[int, ...]) -> None:
    assert propose(token_ids, right=2) == guess
    assert propose(token_ids, right=2, limit=3) == guess[:3]


def test_it_guesses_as_far_as_it_was_right_and_twice_as_far_after_no_mistake() -> None:
    text, drafter, lengths = [1, 2, 3] * 20, Drafter(), []
    for num_right in (1, 2, 4, 3, 3, 0, 1):
        lengths.append(len(drafter.propose(text, limit=15)))
        drafter.learn(num_proposed=lengths[-1], num_right=num_right)
    assert lengths == [1, 2, 4, 8, 3, 6, 1]


def test_a_limit_is_no_mistake() -> None:
    drafter = Drafter()
    for proposed in (1, 2, 4, 1, 2):
        drafter.learn(num_proposed=proposed, num_right=proposed)
    assert len(drafter.propose([1, 2, 3] * 20, limit=15)) == 8


def test_it_follows_a_text_that_grows_and_does_not_look_back_for_ever() -> None:
    drafter = Drafter()
    text = [1, 2, 3, 4]
    assert drafter.propose(text, limit=9) == ()
    text += [1, 2, 3]
    assert drafter.propose(text, limit=9) == (4,)
    text += [*range(10, 10_010), 1, 2, 3]
    assert drafter.propose(text, limit=9) == ()
