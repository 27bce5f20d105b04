"""Which tokens of which requests are computed next.

There are no phases: every request has a number of computed tokens that catches up with its tokens, and a step hands
out a budget of tokens. A prompt in pieces, a decoded token, a found prefix and a request that must start again are all
the same subtraction; guesses come on top of it where there is room. Deterministic: the same calls in the same order
give the same chunks.

Knows no device and no threads; driven by `engine.py`.
"""

import time
from bisect import insort
from dataclasses import replace
from itertools import count, repeat
from operator import add

from qserve.config import EngineConfig
from qserve.engine.blocks import BlockPool
from qserve.engine.drafter import Drafter
from qserve.engine.request import Chunk, FinishReason, Request, Sampled, TokenEvent, TokenLogprob
from qserve.engine.stats import Stats
from qserve.errors import ContextLengthExceeded, InvalidRequest, UsageError

_MAX_SAMPLED = 64  # rows of a step with guesses; more are no faster together than in turns, and take more memory


def _order(request: Request) -> tuple[int, int]:
    """Who comes first: the smallest; who is preempted first: the largest."""
    return request.priority, request.arrival


def _max_stored_tokens(request: Request) -> int:
    """The last token that is generated is never fed back, so it needs no place in the cache."""
    return request.num_prompt_tokens + max(request.params.max_tokens - 1, 0)


def _finish_reason(request: Request) -> FinishReason | None:
    params, num_output_tokens = request.params, request.num_output_tokens
    if num_output_tokens and num_output_tokens >= params.min_tokens and request.token_ids[-1] in params.stop_token_ids:
        return FinishReason.STOP
    if num_output_tokens and request.constraint is not None and request.constraint.is_finished:
        return FinishReason.STOP
    return FinishReason.LENGTH if num_output_tokens >= params.max_tokens else None


def _pool(chunk: Chunk, sums: tuple[float, ...]) -> None:
    """Adds a chunk's hidden states to those before; a request that starts again after a preemption starts from none."""
    request, first = chunk.request, chunk.request.params.pooled_from or 0
    goes_on = request.pooled and chunk.start > first
    request.pooled = tuple(map(add, request.pooled, sums)) if goes_on else sums


def _take_scores(chunk: Chunk, answer: Sampled) -> tuple[tuple[TokenLogprob, ...], ...]:
    """The prompt's log-probabilities that are news: after a preemption the device reports positions again."""
    request = chunk.request
    scores = answer.prompt_logprobs and answer.prompt_logprobs[request.next_prompt_logprob - chunk.start - 1 :]
    request.next_prompt_logprob += len(scores)
    return scores


class Scheduler:
    """The requests, those running and those waiting, and the cache blocks that they hold."""

    def __init__(self, config: EngineConfig, num_blocks: int) -> None:
        if config.max_step_tokens < config.max_running:
            raise UsageError(
                f"max_step_tokens is {config.max_step_tokens}, less than max_running, {config.max_running}: every "
                "running request takes at least one token of a step; raise the one or lower the other"
            )
        self.config = config
        self._blocks = BlockPool(num_blocks, config.block_size, prefix_caching=config.prefix_caching)
        self._requests: dict[str, Request] = {}
        self._running: list[Request] = []  # in order, as waiting
        self._waiting: list[Request] = []
        self._arrivals = count()
        self._drafters: dict[str, Drafter] = {}
        self._totals = Stats(num_blocks=num_blocks)

    @property
    def has_work(self) -> bool:
        return bool(self._requests)

    @property
    def stats(self) -> Stats:
        """A copy, of this moment; may be read from any thread."""
        return replace(
            self._totals,
            num_running=len(self._running),
            num_waiting=len(self._waiting),
            num_held_blocks=self._blocks.num_held,
        )

    def check_fits(self, request: Request) -> None:
        """Raise if the request could never run, even alone; may be called from any thread."""
        if request.num_prompt_tokens == 0:
            raise InvalidRequest("the prompt has no tokens: give at least one", param="prompt")
        num_slots = self._blocks.num_blocks * self._blocks.block_size
        if _max_stored_tokens(request) > num_slots:
            raise ContextLengthExceeded(
                f"the prompt has {request.num_prompt_tokens} tokens and max_tokens is {request.params.max_tokens}, but "
                f"the key-value cache holds {num_slots} tokens: ask for less, or serve with a larger kv_cache_mb"
            )

    def add(self, request: Request) -> None:
        """Queue a request; raises what `check_fits` raises."""
        assert request.id not in self._requests, f"two live requests are named {request.id}"
        self.check_fits(request)
        request.arrival = next(self._arrivals)
        self._requests[request.id] = request
        insort(self._waiting, request, key=_order)

    def abort(self, request_id: str) -> TokenEvent | None:
        """End a request now, between two steps; None when it has ended already."""
        request = self._requests.get(request_id)
        if request is None:
            return None
        (self._running if request in self._running else self._waiting).remove(request)
        self._totals.num_aborted += 1
        self._end(request, now=time.perf_counter())
        return TokenEvent(request_id=request_id, finish_reason=FinishReason.ABORT)

    def abort_all(self) -> list[TokenEvent]:
        events = [self.abort(request_id) for request_id in list(self._requests)]
        return [event for event in events if event is not None]

    def schedule(self) -> list[Chunk]:
        """The chunks of the next step: who runs already goes on, then who waits is admitted."""
        chunks: list[Chunk] = []
        budget = self.config.max_step_tokens
        max_drafted = _MAX_SAMPLED - min(len(self._requests), self.config.max_running)
        while len(chunks) < len(self._running):
            request = self._running[len(chunks)]
            if not self._extend(request):
                break
            # Everyone behind keeps a token of the budget: a long prompt never starves those who decode.
            num_behind = len(self._running) - len(chunks) - 1
            chunk = self._cut_chunk(request, max_tokens=budget - num_behind, max_drafted=max_drafted)
            max_drafted -= len(chunk.draft_ids)
            budget -= chunk.num_tokens
            chunks.append(chunk)
        while budget and (admitted := self._admit_next()):
            chunks.append(self._cut_chunk(admitted, max_tokens=budget))
            budget -= chunks[-1].num_tokens
        return chunks

    def update(self, chunks: list[Chunk], sampled: list[Sampled]) -> list[TokenEvent]:
        """Take in what the device answered: one event for every chunk that has news."""
        self._totals.num_steps += 1
        self._totals.step_tokens.add(sum(chunk.num_tokens for chunk in chunks))
        now = time.perf_counter()
        events: list[TokenEvent] = []
        for chunk, answer in zip(chunks, sampled, strict=True):
            events += self._advance(chunk, answer, now=now)
        if any(event.finish_reason for event in events):
            self._running = [request for request in self._running if request.id in self._requests]
        return events

    def _extend(self, request: Request) -> bool:
        """Blocks for a running request's newest tokens; False if it had to make room itself."""
        while not self._blocks.extend(request):
            last = self._running.pop()
            self._preempt(last)
            if last is request:
                return False
        return True

    def _preempt(self, request: Request) -> None:
        """Send a request back to its place in the queue; its tokens stay, and are computed again."""
        self._blocks.release(request)
        request.num_preemptions += 1
        self._totals.num_preemptions += 1
        insort(self._waiting, request, key=_order)

    def _admit_next(self) -> Request | None:
        """The first who waits, if there is room. Nobody overtakes it, or a long prompt might wait for ever."""
        if not self._waiting or len(self._running) >= self.config.max_running:
            return None
        request = self._waiting[0]
        # A block to spare for each who runs, or the newcomer would soon be preempted by their growth.
        if not self._blocks.admit(request, num_spare=len(self._running)):
            return None
        del self._waiting[0]
        insort(self._running, request, key=_order)
        if not request.num_preemptions:
            self._note_admission(request)
        return request

    def _note_admission(self, request: Request) -> None:
        request.admitted_at = time.perf_counter()
        request.num_cached_tokens = request.num_computed_tokens
        self._totals.num_prompt_tokens += request.num_prompt_tokens
        self._totals.num_cached_tokens += request.num_cached_tokens

    def _cut_chunk(self, request: Request, *, max_tokens: int, max_drafted: int = 0) -> Chunk:
        start = request.num_computed_tokens
        end = min(request.num_tokens, start + max_tokens)
        self._blocks.publish(request, end=end)
        is_decoding = end == request.num_tokens == start + 1
        draft_ids = self._draft(request, limit=min(max_drafted, max_tokens - 1)) if is_decoding else ()
        chunk = Chunk(request=request, start=start, end=end, block_ids=tuple(request.block_ids), draft_ids=draft_ids)
        self._totals.num_computed_tokens += chunk.num_tokens
        return chunk

    def _draft(self, request: Request, *, limit: int) -> tuple[int, ...]:
        """Guesses of what comes after the newest token, within what may come, in blocks that nobody else lacks."""
        num_left = request.params.max_tokens - request.num_output_tokens - 1
        limit = min(limit, num_left, self.config.speculative_tokens)
        if limit <= 0:
            return ()
        drafter = self._drafters.setdefault(request.id, Drafter())
        draft_ids = drafter.propose(request.token_ids, limit=limit)
        if request.constraint is not None:
            draft_ids = tuple(request.constraint.correct(draft_ids)[:limit])
        # A block to spare for each who runs, or somebody might be preempted for a guess.
        has_room = self._blocks.extend(request, num_ahead=len(draft_ids), num_spare=len(self._running))
        return draft_ids if has_room else ()

    def _advance(self, chunk: Chunk, answer: Sampled, *, now: float) -> list[TokenEvent]:
        request = chunk.request
        num_right = max(len(answer.token_ids) - 1, 0)
        request.num_computed_tokens = chunk.end + num_right
        if chunk.draft_ids:
            self._learn(chunk, num_right=num_right)
        if answer.pooled:
            _pool(chunk, answer.pooled)
        scores = _take_scores(chunk, answer)
        if not chunk.is_last:
            return [TokenEvent(request_id=request.id, prompt_logprobs=scores)] if scores else []

        events: list[TokenEvent] = []
        token_ids = answer.token_ids if request.params.max_tokens else ()
        for token_id, logprobs in zip(token_ids or (None,), answer.logprobs or repeat(()), strict=False):
            event = self._take_token(request, token_id, logprobs, scores=() if events else scores, now=now)
            if event.finish_reason is not None:
                return [*events, event]
            events.append(replace(event, has_more=True) if len(events) < num_right else event)
        self._blocks.trim(request)
        return events

    def _learn(self, chunk: Chunk, *, num_right: int) -> None:
        num_proposed = len(chunk.draft_ids)
        self._drafters[chunk.request.id].learn(num_proposed=num_proposed, num_right=num_right)
        self._totals.num_drafts += 1
        self._totals.num_draft_tokens += num_proposed
        self._totals.num_accepted_tokens += num_right

    def _take_token(
        self,
        request: Request,
        token_id: int | None,
        logprobs: tuple[TokenLogprob, ...],
        *,
        scores: tuple[tuple[TokenLogprob, ...], ...],
        now: float,
    ) -> TokenEvent:
        """The next token, if there is one, and the end, if this is it."""
        if token_id is not None:
            self._append(request, token_id, now=now)
        is_impasse = token_id is None and request.params.max_tokens > 0
        finish_reason = FinishReason.ERROR if is_impasse else _finish_reason(request)
        if finish_reason is not None:
            self._totals.num_finished += 1
            self._end(request, now=now)
        return TokenEvent(
            request_id=request.id,
            token_id=token_id,
            logprobs=logprobs if token_id is not None else (),
            prompt_logprobs=scores,
            finish_reason=finish_reason,
            num_cached_tokens=request.num_cached_tokens,
            pooled=request.pooled,
        )

    def _append(self, request: Request, token_id: int, *, now: float) -> None:
        if request.num_output_tokens == 0:
            request.first_token_at = now
        else:
            self._totals.token_gaps.add(now - request.last_token_at)
        request.last_token_at = now
        request.token_ids.append(token_id)
        if request.constraint is not None:
            request.constraint.accept(token_id)
        self._totals.num_generated_tokens += 1

    def _end(self, request: Request, *, now: float) -> None:
        request.finished_at = now
        del self._requests[request.id]
        self._drafters.pop(request.id, None)
        self._blocks.release(request)

    def check(self) -> None:
        """Assert every invariant, between two steps."""
        running, waiting = self._running, self._waiting
        assert sorted(running, key=_order) == running
        assert sorted(waiting, key=_order) == waiting
        assert len(running) <= self.config.max_running
        assert sorted(request.id for request in running + waiting) == sorted(self._requests)
        assert self._drafters.keys() <= self._requests.keys()
        for request in waiting:
            assert not request.block_ids
            assert request.num_computed_tokens == 0
        for request in running:
            num_slots = len(request.block_ids) * self.config.block_size
            assert request.num_computed_tokens < request.num_tokens, "a running request has nothing to compute"
            assert request.num_computed_tokens <= num_slots < request.num_tokens + self.config.block_size
        self._blocks.check(running)
