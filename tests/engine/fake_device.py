"""A device of ten lines: what it stores at a position depends on all that stands before, as keys and values do.

The next token is a hash of all that the cache says. A wrong block, one overwritten too early or a position never
computed changes the text, so every schedule must give what `expected_tokens` gives, which knows no blocks.
"""

from itertools import accumulate
from zlib import crc32

from qserve.engine.request import Chunk, FinishReason, Request, Sampled, SamplingParams, TokenLogprob

VOCABULARY_SIZE = 13
_OFTEN = (7, 8, 9, 9, 9, 9, 9, 9)  # so that texts repeat themselves, and guesses are right now and then


def store(before: int, token_id: int) -> int:
    return crc32(bytes([token_id]), before)


def sample(cells: list[int]) -> int:
    number = crc32(repr(cells).encode())
    return number % VOCABULARY_SIZE if number & 0x300 else _OFTEN[number & 7]


def next_token(token_ids: list[int]) -> int:
    return sample(list(accumulate(token_ids, store, initial=0))[1:])


def expected_pool(token_ids: list[int], first: int) -> tuple[float, ...]:
    cells = list(accumulate(token_ids, store, initial=0))[1:][first:]
    return (float(sum(cells)), float(len(cells)))


def prompt_logprob(token_ids: list[int], position: int) -> tuple[TokenLogprob, ...]:
    return (TokenLogprob(token_ids[position], -float(next_token(token_ids[:position])), 1),)


class FakeDevice:
    """Stores all chunks and then reads, or goes chunk by chunk; both are allowed to a Runner."""

    def __init__(self, num_blocks: int, block_size: int, *, is_batched: bool = True) -> None:
        self.block_size = block_size
        self.is_batched = is_batched
        self.cache = [-1] * (num_blocks * block_size)
        self.steps: list[list[tuple[str, int, int]]] = []

    def run(self, chunks: list[Chunk]) -> list[Sampled]:
        self.steps.append([(chunk.request.id, chunk.start, chunk.stored_end) for chunk in chunks])
        batches = [chunks] if self.is_batched else [[chunk] for chunk in chunks]
        return [sampled for batch in batches for sampled in self._run_batch(batch)]

    def _run_batch(self, chunks: list[Chunk]) -> list[Sampled]:
        for chunk in chunks:
            token_ids = [*chunk.request.token_ids[chunk.start : chunk.end], *chunk.draft_ids]
            for position, token_id in enumerate(token_ids, start=chunk.start):
                before = self.cache[self._slot(chunk, position - 1)] if position else 0
                self.cache[self._slot(chunk, position)] = store(before, token_id)
        return [self._sample(chunk) for chunk in chunks]

    def _sample(self, chunk: Chunk) -> Sampled:
        request = chunk.request
        cells = [self.cache[self._slot(chunk, position)] for position in range(chunk.stored_end)]
        is_scored = request.params.prompt_logprobs is not None
        scored = range(chunk.start + 1, min(chunk.end + 1, request.num_prompt_tokens)) if is_scored else ()
        return Sampled(
            token_ids=self._follow(chunk, cells) if chunk.is_last else (),
            prompt_logprobs=tuple((TokenLogprob(request.token_ids[p], -float(sample(cells[:p])), 1),) for p in scored),
            pooled=self._pool(chunk, cells),
        )

    def _follow(self, chunk: Chunk, cells: list[int]) -> tuple[int, ...]:
        token_ids: list[int] = []
        for end, guess in enumerate((*chunk.draft_ids, None), start=chunk.end):
            token_ids.append(sample(cells[:end]))
            if token_ids[-1] != guess:
                break
        return tuple(token_ids)

    def _pool(self, chunk: Chunk, cells: list[int]) -> tuple[float, ...]:
        """A cell is the hidden state of its position, and a one beside it counts the positions."""
        first = chunk.request.params.pooled_from
        pooled = [] if first is None else cells[max(first, chunk.start) : chunk.request.num_prompt_tokens]
        return (float(sum(pooled)), float(len(pooled))) if pooled else ()

    def _slot(self, chunk: Chunk, position: int) -> int:
        return chunk.block_ids[position // self.block_size] * self.block_size + position % self.block_size


def expected_tokens(prompt_ids: list[int], params: SamplingParams) -> tuple[list[int], FinishReason]:
    """The oracle: one request, one token at a time."""
    output: list[int] = []
    while len(output) < params.max_tokens:
        output.append(next_token(prompt_ids + output))
        if output[-1] in params.stop_token_ids and len(output) >= params.min_tokens:
            return output, FinishReason.STOP
    return output, FinishReason.LENGTH


def make_request(request_id: str, prompt_ids: list[int], *, max_tokens: int = 4, priority: int = 0) -> Request:
    return Request(request_id, prompt_ids, SamplingParams(max_tokens=max_tokens), priority=priority)
