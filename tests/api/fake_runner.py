"""A device of a few lines: the next token depends on all tokens before it, and every token has its log-probability.

Its text is that of a random model, multi-byte characters and special tokens among it. Sampling is left out but for
what the protocol needs to see: the seed, and the bias.
"""

import math
import threading
import time
from zlib import crc32

from qserve.engine.request import Chunk, Request, Sampled, TokenLogprob


class FakeRunner:
    """A step waits while `gate` is shut."""

    def __init__(self, vocabulary_size: int) -> None:
        self._size = vocabulary_size
        self.gate = threading.Event()
        self.gate.set()
        self.fault: Exception | None = None
        self.num_steps = 0
        self.seconds = 0.0  # that a step takes

    def run(self, chunks: list[Chunk]) -> list[Sampled]:
        self.gate.wait()
        if self.fault is not None:
            raise self.fault
        self.num_steps += 1
        time.sleep(self.seconds)
        return [self._sample(chunk) for chunk in chunks]

    def _sample(self, chunk: Chunk) -> Sampled:
        request, params = chunk.request, chunk.request.params
        prompt: list[tuple[TokenLogprob, ...]] = []
        if params.prompt_logprobs is not None:
            end = min(chunk.end + 1, request.num_prompt_tokens)
            positions = range(chunk.start + 1, end)
            prompt = [self._score(request, p, request.token_ids[p], params.prompt_logprobs) for p in positions]
        if not chunk.is_last:
            return Sampled(prompt_logprobs=tuple(prompt))
        token_ids: list[int] = []
        scores: list[tuple[TokenLogprob, ...]] = []
        for number, guess in enumerate((*chunk.draft_ids, None)):
            supposed = request.supposing(chunk.draft_ids[:number]) if number else request
            token_ids.append(self._choose(supposed))
            if params.logprobs is not None:
                scores.append(self._score(supposed, supposed.num_tokens, token_ids[-1], params.logprobs))
            if token_ids[-1] != guess:
                break
        return Sampled(token_ids=tuple(token_ids), logprobs=tuple(scores), prompt_logprobs=tuple(prompt))

    def _choose(self, request: Request) -> int:
        params = request.params
        forced = [token_id for token_id, bias in params.logit_bias.items() if bias >= 100]
        if forced:
            return forced[0]
        token_id = self._best(request, len(request.token_ids), seed=params.seed or 0)
        must_go_on = request.num_output_tokens < params.min_tokens and token_id in params.stop_token_ids
        return token_id + 1 if must_go_on else token_id

    def _best(self, request: Request, position: int, *, seed: int = 0) -> int:
        seen = ",".join(map(str, request.token_ids[:position]))
        return crc32(f"{seed}:{seen}".encode()) % self._size

    def _score(self, request: Request, position: int, token_id: int, num_top: int) -> tuple[TokenLogprob, ...]:
        best = self._best(request, position)
        ranked = [(best + offset) % self._size for offset in range(num_top)]
        entries = [self._entry(token_id, best)] + [self._entry(other, best) for other in ranked]
        return tuple(entries)

    def _entry(self, token_id: int, best: int) -> TokenLogprob:
        distance = (token_id - best) % self._size
        return TokenLogprob(token_id, -math.log(1.5) - 0.37 * distance, distance + 1)
