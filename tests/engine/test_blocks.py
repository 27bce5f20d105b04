"""Which blocks are shared, which are found again, which are forgotten first."""

import pytest

from qserve.engine.blocks import BlockPool
from qserve.engine.request import Request, SamplingParams
from tests.engine.fake_device import make_request


def admit(pool: BlockPool, token_ids: list[int]) -> Request:
    """A request whose prompt is computed whole at once."""
    request = make_request("r", token_ids)
    assert pool.admit(request, num_spare=0)
    pool.publish(request, end=request.num_tokens)
    return request


@pytest.mark.parametrize(
    ("num_tokens", "num_found"),
    [(3, 0), (4, 0), (5, 4), (8, 4), (9, 8), (11, 8)],  # the last token is always computed
)
def test_a_beginning_is_found_in_whole_blocks(num_tokens: int, num_found: int) -> None:
    pool = BlockPool(16, 4)
    first = admit(pool, list(range(num_tokens)))
    second = admit(pool, list(range(num_tokens)))
    assert second.num_computed_tokens == num_found
    assert second.block_ids[: num_found // 4] == first.block_ids[: num_found // 4]
    pool.check([first, second])


def test_a_block_is_found_only_behind_its_own_prefix() -> None:
    pool = BlockPool(16, 2)
    first = admit(pool, [1, 1, 2, 2, 3, 3])
    second = admit(pool, [9, 9, 2, 2, 3, 3])
    third = admit(pool, [2, 2, 3, 3])
    assert second.num_computed_tokens == third.num_computed_tokens == 0
    assert pool.num_held == 3 + 3 + 2
    pool.check([first, second, third])


def test_generated_tokens_are_found_by_the_next_turn() -> None:
    pool = BlockPool(16, 2)
    request = admit(pool, [1, 2, 3])
    for token_id in (4, 5, 6):
        request.token_ids.append(token_id)
        assert pool.extend(request)
        pool.publish(request, end=request.num_tokens)
    pool.release(request)
    assert admit(pool, [1, 2, 3, 4, 5, 6, 7]).num_computed_tokens == 6


def test_scoring_a_prompt_reads_no_cached_block_but_leaves_them_for_others() -> None:
    pool = BlockPool(16, 2)
    for _ in range(2):
        scored = Request("s", [1, 2, 3, 4, 5], SamplingParams(max_tokens=0, prompt_logprobs=0))
        assert pool.admit(scored, num_spare=0)
        assert scored.num_computed_tokens == 0
        pool.publish(scored, end=5)
        pool.release(scored)
        pool.check([])
    assert admit(pool, [1, 2, 3, 4, 5]).num_computed_tokens == 4


def test_nothing_is_shared_without_prefix_caching() -> None:
    pool = BlockPool(16, 2, prefix_caching=False)
    first, second = admit(pool, [1, 2, 3]), admit(pool, [1, 2, 3])
    assert second.num_computed_tokens == 0
    assert not set(first.block_ids) & set(second.block_ids)


def test_the_longest_unused_goes_first_and_a_prefix_outlives_what_continues_it() -> None:
    pool = BlockPool(6, 2)
    for token_ids in ([1, 1, 1, 1, 1, 1], [2, 2, 2, 2, 2, 2]):
        pool.release(admit(pool, token_ids))
    pool.release(admit(pool, [1, 1, 1, 1, 3]))  # used again, so that the twos are now the oldest
    taken = admit(pool, [4, 4, 4, 4, 4, 4])
    pool.check([taken])
    pool.release(taken)
    assert admit(pool, [2, 2, 2, 2, 2, 2]).num_computed_tokens == 2  # the tail is gone, the beginning is left
    pool = BlockPool(3, 2)
    pool.release(admit(pool, [1, 1, 1, 1, 1, 1]))
    pool.release(admit(pool, [5, 5]))
    assert admit(pool, [1, 1, 1, 1, 1, 1]).num_computed_tokens == 4


def test_shared_blocks_stay_while_one_holder_is_left() -> None:
    pool = BlockPool(4, 2)
    first, second = admit(pool, [1, 1, 1]), admit(pool, [1, 1, 2])
    assert pool.num_held == 3
    pool.release(first)
    assert pool.num_held == 2
    pool.check([second])
    pool.release(second)
    assert pool.num_held == 0
    pool.check([])


def test_nothing_is_given_where_not_all_can_be() -> None:
    pool = BlockPool(4, 2)
    holder = admit(pool, [1, 1, 1])
    request = make_request("big", [2] * 5)
    assert not pool.admit(request, num_spare=0)
    assert pool.admit(make_request("small", [3] * 4), num_spare=0)
    assert not request.block_ids
    holder.token_ids += [1, 1]
    assert not pool.extend(holder)
    assert len(holder.block_ids) == 2


def test_blocks_that_are_found_unheld_are_not_counted_as_room() -> None:
    pool = BlockPool(4, 2)
    pool.release(admit(pool, [1, 1, 1, 1, 1, 1]))
    assert pool.num_available == 4
    assert not pool.admit(make_request("r", [1] * 7), num_spare=1)
    assert pool.admit(make_request("r", [1] * 7), num_spare=0)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda pool, request: pool._blank.append(request.block_ids[0]),
        lambda pool, request: pool._blank.pop(),
        lambda pool, request: request.block_ids.pop(),
        lambda pool, request: request.block_ids.append(request.block_ids[0]),
        lambda pool, request: request.token_ids.__setitem__(0, 99),
        lambda pool, request: pool._published.clear(),
        lambda pool, request: pool._num_holders.__setitem__(0, 5),
    ],
)
def test_check_finds_what_is_wrong(spoil: object) -> None:
    pool = BlockPool(8, 2)
    request = admit(pool, [1, 2, 3, 4, 5])
    pool.check([request])
    assert callable(spoil)
    spoil(pool, request)
    with pytest.raises(AssertionError):
        pool.check([request])
