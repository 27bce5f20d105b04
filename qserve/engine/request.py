"""What the engine and the device say to each other: requests, the chunks of a step, and what was sampled.

Plain Python on token ids: knows no tensors, no text and no HTTP.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol


class FinishReason(StrEnum):
    """Why a request ended, in OpenAI's words where OpenAI has one."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"  # nothing that the request allows could come next


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the next token is chosen, and when to end; everything here is in token ids.

    Penalties as OpenAI defines presence and frequency (over generated tokens), and as the CTRL paper (arXiv
    1909.05858, section 4.1) defines repetition (over prompt and generated tokens).
    """

    max_tokens: int
    min_tokens: int = 0
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 is off
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    typical_p: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    allowed_token_ids: frozenset[int] | None = None  # None allows all
    bad_words: tuple[tuple[int, ...], ...] = ()  # runs of tokens that may not be generated
    seed: int | None = None
    stop_token_ids: frozenset[int] = frozenset()  # end-of-sequence ids among them, unless they are to be ignored
    logprobs: int | None = None  # how many alternatives to report beside the chosen token; None reports nothing
    logprob_token_ids: tuple[int, ...] = ()  # tokens to report beside these, likely or not
    prompt_logprobs: int | None = None  # as logprobs, for every position of the prompt
    pooled_from: int | None = None  # the prompt's final hidden states from this position on are summed up

    @property
    def changes_logits(self) -> bool:
        is_penalized = self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1.0
        return bool(is_penalized or self.logit_bias)

    @property
    def forbids_tokens(self) -> bool:
        """At any time; the first `min_tokens` may not be stop tokens besides."""
        return self.allowed_token_ids is not None or bool(self.bad_words)


class Constraint(Protocol):
    """What structured output allows one request to say next. The scheduler tells it of every token, once."""

    @property
    def is_finished(self) -> bool: ...  # what was said is complete, and nothing can be added
    def accept(self, token_id: int) -> None: ...
    def allowed(self) -> bytes: ...  # one bit for each token id, the lowest bit of the first byte for id 0
    def find_allowed(self, token_ids: Sequence[int]) -> int | None: ...  # the first of these that is, for far less
    def correct(self, guess: Sequence[int]) -> Sequence[int]: ...  # what must come next; else of the guess what may
    def supposing(self, token_ids: Sequence[int]) -> "Constraint": ...  # as it will be if these come next


class Request:
    """One generation, as ids. The scheduler alone changes it; the device reads it.

    The times are of `time.perf_counter`; 0.0 stands for what has not happened yet.
    """

    __slots__ = (
        "admitted_at",
        "arrival",
        "block_ids",
        "constraint",
        "created_at",
        "finished_at",
        "first_token_at",
        "id",
        "last_token_at",
        "next_prompt_logprob",
        "num_cached_tokens",
        "num_computed_tokens",
        "num_preemptions",
        "num_prompt_tokens",
        "num_published_blocks",
        "params",
        "pooled",
        "prefix_id",
        "priority",
        "token_ids",
    )

    def __init__(
        self,
        request_id: str,
        prompt_ids: list[int],
        params: SamplingParams,
        *,
        priority: int = 0,
        constraint: Constraint | None = None,
    ) -> None:
        self.id = request_id
        self.params = params
        self.constraint = constraint
        self.priority = priority  # a lower number is served first
        self.token_ids = list(prompt_ids)  # the prompt and all that was generated
        self.num_prompt_tokens = len(prompt_ids)
        self.num_computed_tokens = 0  # keys and values of this many leading tokens stand in the cache
        self.num_cached_tokens = 0  # of the prompt, found in the cache when the request was first admitted
        self.num_preemptions = 0
        self.next_prompt_logprob = 1  # the prompt position to report next; position 0 follows nothing
        self.pooled: tuple[float, ...] = ()  # the sum of final hidden states so far, where it is asked for
        self.arrival = 0  # the scheduler numbers its requests, so that equal priorities keep their order
        self.block_ids: list[int] = []
        self.num_published_blocks = 0  # see blocks.py, as for prefix_id
        self.prefix_id = 0
        self.created_at = time.perf_counter()
        self.admitted_at = 0.0
        self.first_token_at = 0.0
        self.last_token_at = 0.0
        self.finished_at = 0.0

    @property
    def takes_likeliest(self) -> bool:
        """Whether nothing but the logits counts for its next token, and of them the largest."""
        params = self.params
        is_bound = self.constraint is not None or params.min_tokens or params.forbids_tokens
        return params.temperature == 0 and not is_bound and not params.changes_logits

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_uncomputed_tokens(self) -> int:
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    def supposing(self, token_ids: Sequence[int]) -> "Request":
        """As it will be if these come next, for whoever chooses what comes then."""
        constraint = None if self.constraint is None else self.constraint.supposing(token_ids)
        supposed = Request(self.id, [*self.token_ids, *token_ids], self.params, constraint=constraint)
        supposed.num_prompt_tokens = self.num_prompt_tokens
        return supposed

    @property
    def max_reused_tokens(self) -> int:
        """How many leading tokens may come from the cache: what is reported of a position must be computed."""
        if self.params.prompt_logprobs is not None:
            return 0
        first_pooled = self.params.pooled_from
        return self.num_tokens - 1 if first_pooled is None else min(first_pooled, self.num_tokens - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """The tokens [start, end) of one request, to be computed in this step, and guesses of those from `end` on.

    Guesses are made for a request's end alone. `block_ids` holds the request's cache blocks for all of them at least:
    position p lives in slot block_ids[p // block_size] * block_size + p % block_size.
    """

    request: Request
    start: int
    end: int
    block_ids: tuple[int, ...]
    draft_ids: tuple[int, ...] = ()

    @property
    def stored_end(self) -> int:
        """Where the positions end that are computed, those of guesses among them."""
        return self.end + len(self.draft_ids)

    @property
    def num_tokens(self) -> int:
        return self.stored_end - self.start

    @property
    def is_last(self) -> bool:
        """Whether the chunk reaches the request's end, so that a token is to be sampled."""
        return self.end == self.request.num_tokens


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """The log-probability of one token under the model's own distribution, and its rank (1 is most likely)."""

    token_id: int
    logprob: float
    rank: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """What the device answers for one chunk.

    `token_ids` are the tokens that come next: one, and after each guess that was right one more. There is none when the
    chunk was not its request's last, and when nothing that the request allows is left.
    `logprobs` holds for each of them, if the request asks for it, the chosen token and then the most likely ones, best
    first (the chosen one among them again when it is one of them), and then those of `logprob_token_ids`.
    `prompt_logprobs` has one such tuple for each prompt position in [start + 1, min(end + 1, num_prompt_tokens)), since
    the logits of position p speak of position p + 1; it is empty where the request does not ask for them.
    `pooled` is the sum of the chunk's final hidden states from position `pooled_from` on, empty where there are none.
    """

    token_ids: tuple[int, ...] = ()
    logprobs: tuple[tuple[TokenLogprob, ...], ...] = ()
    prompt_logprobs: tuple[tuple[TokenLogprob, ...], ...] = ()
    pooled: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenEvent:
    """News of one request: a token, its end, or both. The last event alone has a finish reason."""

    request_id: str
    token_id: int | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[tuple[TokenLogprob, ...], ...] = ()
    finish_reason: FinishReason | None = None
    has_more: bool = False  # another token of the same step follows
    num_cached_tokens: int = 0  # of the prompt, found in the prefix cache
    pooled: tuple[float, ...] = ()  # the whole sum, with the last event


class Runner(Protocol):
    """What the engine needs of a device: one call a step, an answer for each chunk in the same order.

    A chunk may attend to blocks that an earlier chunk of the same step fills (requests that arrive together share
    their prefix at once): in each layer store all keys and values before any chunk attends, or go chunk by chunk.
    """

    def run(self, chunks: list[Chunk]) -> list[Sampled]: ...
