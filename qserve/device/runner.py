"""The device's side of a step: chunks in, sampled tokens out.

Knows no policy: which chunks run together, and in which blocks, was decided before. `Model` is what it needs of one.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from qserve.device.batch import DecodeBatches, make_batch
from qserve.device.kv_cache import CacheShape, KVCache, block_bytes
from qserve.device.logprobs import logprobs_at, logprobs_of
from qserve.device.sampler import Sampler
from qserve.engine.request import Chunk, Request, Sampled, SamplingParams, TokenLogprob
from qserve.kernels.ops import Batch

# Prompt positions whose logits stand at once. The kernels keep memory for as many; more would be new memory each time,
# some 60 MiB, which malloc does not give back, and no faster.
_NUM_SCORED = 64

Score: TypeAlias = tuple[TokenLogprob, ...]  # of one position, the token's own first
Scores: TypeAlias = tuple[Score, ...]


class Model(Protocol):
    """A causal language model over a paged cache: the decoder, or the fallback."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def cache_shapes(self) -> tuple[CacheShape, ...]: ...
    @property
    def num_bytes(self) -> int: ...
    def forward(self, batch: Batch, cache: KVCache) -> Tensor: ...  # (tokens, hidden)
    def logits(self, hidden: Tensor) -> Tensor: ...  # (rows, vocabulary) float32
    def finish(self, hidden: Tensor) -> Tensor: ...  # (rows, hidden): what the head multiplies, after the last norm


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryFacts:
    """Bytes on the device, for reports."""

    weights: int
    cache: int
    block: int


class ModelRunner:
    """Runs steps. Called by one thread."""

    def __init__(self, model: Model, cache: KVCache, *, device: torch.device, sampler: Sampler) -> None:
        self._model = model
        self._cache = cache
        self._device = device
        self._sampler = sampler
        self._decode_batches = DecodeBatches(block_size=cache.block_size)

    @property
    def memory(self) -> MemoryFacts:
        dtype = self._cache.layers[0].keys.dtype
        return MemoryFacts(
            weights=self._model.num_bytes,
            cache=self._cache.num_bytes,
            block=block_bytes(self._model.cache_shapes, block_size=self._cache.block_size, dtype=dtype),
        )

    @property
    def num_blocks(self) -> int:
        return self._cache.num_blocks

    @property
    def vocab_size(self) -> int:
        return self._model.vocab_size

    @torch.inference_mode()
    def run(self, chunks: list[Chunk]) -> list[Sampled]:
        """Compute the chunks, and what follows each that reaches its request's end; answers in the same order."""
        batch = self._make_batch(chunks)
        hidden = self._model.forward(batch, self._cache)
        following = iter(self._sample(hidden, batch, [chunk for chunk in chunks if chunk.is_last]))
        answers = []
        row = 0
        for chunk in chunks:
            token_ids, logprobs = next(following) if chunk.is_last else ((), ())
            prompt, pooled = self._score(chunk, hidden, row)
            answers.append(Sampled(token_ids=token_ids, logprobs=logprobs, prompt_logprobs=prompt, pooled=pooled))
            row += chunk.num_tokens
        return answers

    def _make_batch(self, chunks: list[Chunk]) -> Batch:
        is_decode = bool(chunks) and all(chunk.start + 1 == chunk.end and chunk.is_last for chunk in chunks)
        if is_decode and self._device.type == "cpu":
            return self._decode_batches.make(chunks)
        return make_batch(chunks, block_size=self._cache.block_size, device=self._device)

    def warm_up(self, sizes: Sequence[int]) -> None:
        """A chunk of each of these numbers of tokens, so that the first request finds all in place that it needs.

        Writes to the first blocks of the cache; call it before anything is served.
        """
        most = self._cache.num_blocks * self._cache.block_size
        for num_tokens in (min(size, most) for size in sizes):
            request = Request("warm-up", [0] * num_tokens, SamplingParams(max_tokens=1, temperature=0.0))
            blocks = tuple(range(-(-num_tokens // self._cache.block_size)))
            self.run([Chunk(request=request, start=0, end=num_tokens, block_ids=blocks)])

    def _sample(self, hidden: Tensor, batch: Batch, chunks: Sequence[Chunk]) -> list[tuple[tuple[int, ...], Scores]]:
        """What follows each of these chunks, all of which reach their request's end: tokens, and log-probabilities."""
        if not chunks:
            return []
        requests = [request for chunk in chunks for request in _suppose(chunk)]
        logits = self._model.logits(hidden if len(requests) == len(hidden) else _take(hidden, batch.sample_rows))
        kept = list(_keep_right(chunks, self._sampler.sample(logits, requests)))
        reported = {row: token for tokens in kept for row, token in tokens.items() if _is_reported(requests[row])}
        scores = _score_rows(logits, requests, reported) if reported else {}
        return [(tuple(each.values()), tuple(scores[row] for row in each if row in scores)) for each in kept]

    def _score(self, chunk: Chunk, hidden: Tensor, row: int) -> tuple[Scores, tuple[float, ...]]:
        """The prompt's log-probabilities and the pooled states, where they are asked for."""
        params = chunk.request.params
        if params.prompt_logprobs is None and params.pooled_from is None:
            return (), ()
        rows = hidden[row : row + chunk.end - chunk.start]
        return self._prompt_logprobs(chunk, rows), self._pool(chunk, rows)

    def _pool(self, chunk: Chunk, hidden: Tensor) -> tuple[float, ...]:
        first, end = chunk.request.params.pooled_from, min(chunk.end, chunk.request.num_prompt_tokens)
        if first is None or first >= end:
            return ()
        rows = self._model.finish(hidden[max(first - chunk.start, 0) : end - chunk.start])
        return tuple(rows.sum(dim=0, dtype=torch.float64).tolist())

    def _prompt_logprobs(self, chunk: Chunk, hidden: Tensor) -> Scores:
        """Row i predicts position start + i + 1; computed in pieces, for positions x vocabulary is too much at once."""
        request = chunk.request
        num_top = request.params.prompt_logprobs
        num_rows = min(chunk.end + 1, request.num_prompt_tokens) - (chunk.start + 1)
        if num_top is None or num_rows <= 0:
            return ()
        targets = request.token_ids[chunk.start + 1 : chunk.start + 1 + num_rows]
        found: list[Score] = []
        for start in range(0, num_rows, _NUM_SCORED):
            end = min(start + _NUM_SCORED, num_rows)
            found += logprobs_of(self._model.logits(hidden[start:end]), targets[start:end], num_top=num_top)
        return tuple(found)


def _take(hidden: Tensor, rows: Tensor) -> Tensor:
    """These rows. Many of them torch would take with threads, that then wait spinning beside those of the kernels."""
    if hidden.device.type != "cpu":
        return hidden[rows]
    return torch.from_numpy(hidden.numpy()[rows.numpy()])


def _suppose(chunk: Chunk) -> list[Request]:
    """For each row that is sampled the request as it is there, if the guesses before it are right."""
    request, draft_ids = chunk.request, chunk.draft_ids
    if request.takes_likeliest:
        return [request] * (1 + len(draft_ids))
    return [request, *(request.supposing(draft_ids[:number]) for number in range(1, len(draft_ids) + 1))]


def _keep_right(chunks: Sequence[Chunk], tokens: Sequence[int | None]) -> Iterator[dict[int, int]]:
    """For each chunk the tokens that come next, by row: as far as the guesses before them are right."""
    start = 0
    for chunk in chunks:
        kept = {}
        for row, guess in enumerate((*chunk.draft_ids, None), start):
            token = tokens[row]
            if token is None:
                break
            kept[row] = token
            if token != guess:
                break
        yield kept
        start += 1 + len(chunk.draft_ids)


def _is_reported(request: Request) -> bool:
    return request.params.logprobs is not None


def _score_rows(logits: Tensor, requests: Sequence[Request], tokens: Mapping[int, int]) -> dict[int, Score]:
    """By row, for those of which tokens are given."""
    counts = [requests[row].params.logprobs or 0 for row in tokens]
    found = logprobs_of(logits[list(tokens)], list(tokens.values()), num_top=max(counts))
    named = (logprobs_at(logits[row], requests[row].params.logprob_token_ids) for row in tokens)
    each = zip(tokens, counts, found, named, strict=True)
    return {row: score[: count + 1] + others for row, count, score, others in each}
