"""The blocks of the key-value cache: who holds them, and which prompt beginnings can be found in them again.

Knows no tensors: a block is a number. Called by the scheduler alone.

One request, blocks of four positions, ten tokens, six of them computed, its chunk [6, 10) being scheduled:

    positions    0 1 2 3 | 4 5 6 7 | 8 9 . .
    block_ids       7    |    2    |    5          slots for [0, 12)
    computed     [0,        6)                     keys and values stand in the cache
    chunk                  [6,       10)           stored in this step, before anything attends to it
    published    [0,             8)                full blocks below the chunk's end: others may share them

A block is published when the chunk that fills it is scheduled, so that requests which arrive together share at once.
Nobody writes below a published block's end again: a request that finds it starts its first chunk behind it. The last
token of a request is never looked up, so there is always a position that gives logits.

Every block is in one of three states:

    blank     no holder, nothing to find in it     in `_blank`
    cached    no holder, published                 in `_cached`, the least recently used first
    held      held by one request or more, published or not
"""

from collections import OrderedDict
from collections.abc import Collection, Iterable
from itertools import count

from qserve.engine.request import Request

NO_PREFIX = 0  # the prefix id of a request's beginning

# What a full block is found by: the prefix that it continues, and its own tokens. Prefix ids are never used twice and
# token ids are compared whole, so two different texts can never be taken for each other.
Key = tuple[int, tuple[int, ...]]


class BlockPool:
    """All blocks of the cache. `prefix_caching` False shares nothing."""

    def __init__(self, num_blocks: int, block_size: int, *, prefix_caching: bool = True) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._prefix_caching = prefix_caching
        self._blank = list(reversed(range(num_blocks)))  # taken from the end
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._num_holders = [0] * num_blocks
        self._keys: list[Key | None] = [None] * num_blocks  # of published blocks
        self._prefix_ids = [NO_PREFIX] * num_blocks  # the prefix that ends with the block, if it is published
        self._published: dict[Key, int] = {}
        self._next_prefix_id = count(NO_PREFIX + 1)

    @property
    def num_available(self) -> int:
        """Blocks that no request holds."""
        return len(self._blank) + len(self._cached)

    @property
    def num_held(self) -> int:
        return self.num_blocks - self.num_available

    def num_needed(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def admit(self, request: Request, *, num_spare: int) -> bool:
        """Give a request blocks for all its tokens, shared ones as far as its beginning is found.

        False, and nothing given, when fewer than `num_spare` blocks would stay available.
        """
        shared = self._find(request)
        num_new = self.num_needed(request.num_tokens) - len(shared)
        num_revived = sum(self._num_holders[block] == 0 for block in shared)
        if num_new + num_revived + num_spare > self.num_available:
            return False
        for block in shared:
            self._hold(block)
        request.block_ids = shared + [self._take() for _ in range(num_new)]
        request.num_computed_tokens = len(shared) * self.block_size
        request.num_published_blocks = len(shared)
        request.prefix_id = self._prefix_ids[shared[-1]] if shared else NO_PREFIX
        return True

    def extend(self, request: Request, *, num_ahead: int = 0, num_spare: int = 0) -> bool:
        """Give a request the blocks that its newest tokens lack, and so many tokens ahead.

        False, and nothing given, when it lacks some and fewer than `num_spare` blocks would stay available.
        """
        num_new = self.num_needed(len(request.token_ids) + num_ahead) - len(request.block_ids)
        if num_new > max(self.num_available - num_spare, 0):
            return False
        request.block_ids += [self._take() for _ in range(num_new)]
        return True

    def trim(self, request: Request) -> None:
        """Take back the blocks that a request had for more tokens than came."""
        while len(request.block_ids) > self.num_needed(request.num_tokens):
            self._let_go(request.block_ids.pop())

    def publish(self, request: Request, *, end: int) -> None:
        """Let others find the request's full blocks below position `end`."""
        if not self._prefix_caching:
            return
        size = self.block_size
        for index in range(request.num_published_blocks, end // size):
            key = (request.prefix_id, tuple(request.token_ids[index * size : (index + 1) * size]))
            # When another block holds the same beginning already, that one stays the one to be found.
            block = self._published.setdefault(key, request.block_ids[index])
            if self._keys[block] is None:
                self._keys[block] = key
                self._prefix_ids[block] = next(self._next_prefix_id)
            request.prefix_id = self._prefix_ids[block]
            request.num_published_blocks += 1

    def release(self, request: Request) -> None:
        """Take a request's blocks back; published ones can still be found until they are needed."""
        # Backwards, so that a prefix outlives what continues it: without its prefix a block cannot be found.
        for block in reversed(request.block_ids):
            self._let_go(block)
        request.block_ids = []
        request.num_computed_tokens = 0
        request.num_published_blocks = 0
        request.prefix_id = NO_PREFIX

    def _find(self, request: Request) -> list[int]:
        """The published blocks of the request's beginning, short of what must be computed."""
        if not self._prefix_caching:
            return []
        found: list[int] = []
        prefix_id, size = NO_PREFIX, self.block_size
        for start in range(0, request.max_reused_tokens - size + 1, size):
            block = self._published.get((prefix_id, tuple(request.token_ids[start : start + size])))
            if block is None:
                break
            found.append(block)
            prefix_id = self._prefix_ids[block]
        return found

    def _take(self) -> int:
        """A block for one holder to write; what could be found in it is forgotten."""
        if self._blank:
            block = self._blank.pop()
        else:
            block, _ = self._cached.popitem(last=False)
            self._forget(block)
        self._num_holders[block] = 1
        return block

    def _hold(self, block: int) -> None:
        if self._num_holders[block] == 0:
            del self._cached[block]
        self._num_holders[block] += 1

    def _let_go(self, block: int) -> None:
        self._num_holders[block] -= 1
        if self._num_holders[block] > 0:
            return
        if self._keys[block] is None:
            self._blank.append(block)
        else:
            self._cached[block] = None

    def _forget(self, block: int) -> None:
        key = self._keys[block]
        assert key is not None
        del self._published[key]
        self._keys[block] = None
        self._prefix_ids[block] = NO_PREFIX

    def check(self, live: Collection[Request]) -> None:
        """Assert every invariant, given all requests that hold blocks."""
        self._check_holders(live)
        self._check_states()
        self._check_published()
        for request in live:
            self._check_request(request)

    def _check_holders(self, live: Iterable[Request]) -> None:
        num_holders = [0] * self.num_blocks
        for request in live:
            assert len(set(request.block_ids)) == len(request.block_ids), "a request holds a block twice"
            for block in request.block_ids:
                num_holders[block] += 1
        assert num_holders == self._num_holders, "the counts disagree with the requests"

    def _check_states(self) -> None:
        blank, cached = set(self._blank), set(self._cached)
        held = {block for block in range(self.num_blocks) if self._num_holders[block]}
        assert len(blank) == len(self._blank), "a block is blank twice"
        assert len(blank) + len(cached) + len(held) == self.num_blocks
        assert blank | cached | held == set(range(self.num_blocks)), "a block has no state, or two"
        assert all(self._keys[block] is None for block in blank)
        assert all(self._keys[block] is not None for block in cached)

    def _check_published(self) -> None:
        keyed = {key: block for block, key in enumerate(self._keys) if key is not None}
        assert keyed == self._published, "the table and the blocks disagree"
        prefix_ids = [self._prefix_ids[block] for block in self._published.values()]
        assert NO_PREFIX not in prefix_ids
        assert len(set(prefix_ids)) == len(prefix_ids), "two prefixes have one id"
        assert all(len(tokens) == self.block_size for _, tokens in self._published)

    def _check_request(self, request: Request) -> None:
        size = self.block_size
        assert request.num_published_blocks <= len(request.block_ids)
        for index in range(len(request.block_ids)):
            key = self._keys[request.block_ids[index]]
            if key is not None:
                assert index < request.num_published_blocks, "a block that is still written can be found"
                assert key[1] == tuple(request.token_ids[index * size : (index + 1) * size])
