"""LLM: text in, text out. Where text meets tokens, and the whole of qserve as seen from Python.

Joins a tokenizer, a chat template and a running engine. Knows no HTTP (api/ is its caller) and no tensors (build.py
makes one). Every generation, streamed or not, is a `Generation`, and leaving its `with` block frees what it holds.
"""

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Self

from qserve.engine.loop import EngineLoop
from qserve.engine.request import FinishReason, Request, SamplingParams, TokenEvent
from qserve.errors import (
    ContextLengthExceeded,
    DeadlineExceeded,
    InvalidRequest,
    NotReady,
    QserveError,
    QueueFull,
)
from qserve.generation import Deadline, GenerationOptions, Prompt, TextAssembler, TextDelta
from qserve.metrics import Metrics, Outcome
from qserve.text.grammar import Grammar, GrammarCompiler, GrammarSource
from qserve.text.infill import infill
from qserve.text.templates import ChatTemplate, Message
from qserve.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """What is served. `details` is what only some models have: recipe, bytes by kind, kernels."""

    name: str
    other_names: tuple[str, ...] = ()
    max_model_len: int
    vocabulary_size: int
    created: int
    details: Mapping[str, Any] = field(default_factory=dict)


class LLM:
    """A model that is loaded and running."""

    def __init__(
        self,
        *,
        info: ModelInfo,
        tokenizer: Tokenizer,
        template: ChatTemplate | None,
        loop: EngineLoop,
        metrics: Metrics,
    ) -> None:
        self.info = info
        self.tokenizer = tokenizer
        self.template = template
        self.loop = loop
        self.metrics = metrics
        self._grammars = GrammarCompiler(tokenizer, vocabulary_size=info.vocabulary_size)

    @property
    def is_alive(self) -> bool:
        """Whether the engine's thread runs."""
        return self.loop.is_alive

    def encode(self, text: str, *, add_special_tokens: bool = True) -> Prompt:
        """A prompt from text. An empty one starts a new document, as OpenAI's default prompt does."""
        self._check_length(text)
        ids = self.tokenizer.encode(text, add_special_tokens=add_special_tokens)
        if not ids:
            start = self.tokenizer.bos_id if self.tokenizer.bos_id is not None else self.tokenizer.eos_id
            if start is None:
                raise InvalidRequest("The prompt is empty, and this model has no token to begin with.", param="prompt")
            ids = [start]
        return Prompt(ids=ids, text=text)

    def _check_length(self, text: str) -> None:
        """Refuses what cannot fit before it is encoded: ten million characters take a minute and a gigabyte."""
        num_tokens = len(text) // self.tokenizer.longest_token
        if num_tokens > self.info.max_model_len:
            raise ContextLengthExceeded(
                f"This model's context is {self.info.max_model_len} tokens. The prompt has {len(text)} characters, "
                f"which are {num_tokens} tokens at the very least. Shorten it.",
                param="prompt",
            )

    def infill(self, prompt: Prompt, suffix: str) -> Prompt:
        """A prompt that asks for what stands between it and the suffix."""
        suffix_ids = self.tokenizer.encode(suffix, add_special_tokens=False)
        ids = infill(prompt.ids, suffix_ids, token_to_id=self.tokenizer.token_to_id)
        if ids is None:
            message = f"{self.info.name} has no tokens for a text to be filled in: leave suffix out."
            raise InvalidRequest(message, param="suffix")
        return Prompt(ids=ids)

    def check_ids(self, ids: Sequence[int]) -> Prompt:
        """A prompt from token ids, taken as they are."""
        if not ids:
            raise InvalidRequest("The prompt holds no token.", param="prompt")
        self.check_vocabulary(ids, param="prompt")
        return Prompt(ids=ids)

    def apply_template(self, messages: Sequence[Message], **options: Any) -> Prompt:
        """A prompt from messages; the template writes the special tokens itself. Options as ChatTemplate.render's."""
        if self.template is None:
            raise InvalidRequest(
                f"{self.info.name} has no chat template: use /v1/completions, or serve a model tuned for chat.",
                param="messages",
            )
        return self.encode(self.template.render(messages, **options), add_special_tokens=False)

    def room_for(self, prompt: Prompt, max_tokens: int | None, *, can_be_less: bool = False) -> int:
        """How many tokens may be made: those asked for, or by default all that fit.

        Where more are asked for than fit, it is an error, unless it can be less.
        """
        limit, length = self.info.max_model_len, len(prompt.ids)
        room = max(limit - length, 1)
        asked = room if max_tokens is None else min(max_tokens, room) if can_be_less else max_tokens
        if length + asked > limit:
            raise ContextLengthExceeded(
                f"This model's context is {limit} tokens. The prompt has {length} and {asked} more were asked for. "
                "Shorten the prompt, or ask for fewer tokens.",
                param="prompt" if length >= limit else "max_tokens",
            )
        return asked

    def start(self, prompt: Prompt, options: GenerationOptions, *, deadline: Deadline | None = None) -> "Generation":
        """Hands a request to the engine; raises QueueFull or EngineDead at once. Call it on a running event loop."""
        sampling = options.sampling
        self.check_vocabulary(sampling.logit_bias, param="logit_bias")
        self.check_vocabulary(sampling.stop_token_ids, param="stop_token_ids")
        self.check_vocabulary(sampling.allowed_token_ids or (), param="allowed_token_ids")
        stop_ids = options.stop_ids(self.tokenizer)
        sampling = replace(sampling, stop_token_ids=stop_ids)
        constraint = None if options.grammar is None else options.grammar.start(stop_ids=stop_ids)
        request = Request(
            uuid.uuid4().hex, list(prompt.ids), sampling, priority=options.priority, constraint=constraint
        )
        assembler = TextAssembler(self.tokenizer, prompt, options)
        with self._counting_rejections():
            events = self.loop.submit(request)
        return Generation(self, request, assembler, events, deadline=deadline)

    def compile(self, source: GrammarSource) -> Grammar:
        """What `GenerationOptions.grammar` takes; raises InvalidRequest. May take a second: call it in a thread."""
        return self._grammars.compile(source)

    def encode_words(self, words: Iterable[str]) -> tuple[tuple[int, ...], ...]:
        """What `SamplingParams.bad_words` takes: words as they stand at the start of a text, and after a space."""
        texts = [space + word.lstrip() for word in words for space in ("", " ")]
        runs = [tuple(self.tokenizer.encode(text, add_special_tokens=False)) for text in texts]
        return tuple(dict.fromkeys(run for run in runs if run))

    def check_room(self) -> None:
        """Raises QueueFull if nothing more is taken, so that nobody prepares a request in vain."""
        with self._counting_rejections():
            self.loop.check_room()

    @contextmanager
    def _counting_rejections(self) -> Iterator[None]:
        try:
            yield
        except QueueFull as error:
            self.metrics.observe_rejection(error.reason)
            raise

    def check_vocabulary(self, ids: Iterable[int], *, param: str) -> None:
        """Raises for an id that the model does not have, naming the field it came in."""
        last = self.info.vocabulary_size - 1
        unknown = next((i for i in ids if not 0 <= i <= last), None)
        if unknown is not None:
            raise InvalidRequest(f"Token id {unknown} is outside the vocabulary (0 to {last}).", param=param)

    async def stream(self, prompt: Prompt, options: GenerationOptions) -> AsyncIterator[TextDelta]:
        """One generation, as its text becomes certain."""
        with self.start(prompt, options) as generation:
            async for delta in generation:
                yield delta

    def generate(self, prompts: Sequence[str], **sampling: Any) -> list[str]:
        """Completes prompts and waits for all of them; for scripts, where no event loop runs."""
        params = SamplingParams(**{"max_tokens": 16, **sampling})
        return asyncio.run(self._generate([self.encode(text) for text in prompts], params))

    async def _generate(self, prompts: Sequence[Prompt], params: SamplingParams) -> list[str]:
        texts = [""] * len(prompts)
        with ExitStack() as running:
            options = GenerationOptions(sampling=params)
            generations = [running.enter_context(self.start(prompt, options)) for prompt in prompts]
            async for index, delta in merge(generations):
                texts[index] += delta.text
        return texts

    async def drain(self, seconds: float) -> None:
        """Take nothing new, and give what runs this long to finish."""
        await asyncio.to_thread(self.loop.drain, seconds)

    def close(self) -> None:
        """End the engine's thread; what still runs ends with NotReady."""
        self.loop.stop()


class Generation:
    """One running request as an iterator of text. Leave its `with` block, and the engine holds nothing of it."""

    def __init__(
        self,
        llm: LLM,
        request: Request,
        assembler: TextAssembler,
        events: AsyncIterator[TokenEvent],
        *,
        deadline: Deadline | None = None,
    ) -> None:
        self._llm = llm
        self._request = request
        self._assembler = assembler
        self._events = events
        self._deadline = deadline
        self._finish_reason: FinishReason | None = None
        self.outcome: Outcome | None = None  # once it is closed

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> TextDelta:
        if self._finish_reason is not None:
            raise StopAsyncIteration
        delta = await (self._next() if self._deadline is None else self._next_until(self._deadline))
        self._finish_reason = delta.finish_reason
        return delta

    async def _next(self) -> TextDelta:
        async for event in self._events:
            if event.finish_reason is FinishReason.ABORT:
                break
            if event.finish_reason is FinishReason.ERROR:
                raise InvalidRequest(
                    "No token was left that the request allows: its grammar grew too complex for what was said, or "
                    "it does not go together with allowed_token_ids, bad_words or min_tokens."
                )
            delta = self._assembler.add(event)
            if delta is not None:
                return delta
        raise NotReady("The server is ending, and this request was cut short: send it again, elsewhere or later.")

    async def _next_until(self, deadline: Deadline) -> TextDelta:
        try:
            async with asyncio.timeout_at(deadline.at):
                return await self._next()
        except TimeoutError as error:
            delta = None if deadline.is_error else self._assembler.cut(self._request.id)
            if delta is None:
                message = "The answer took longer than this server lets it take: ask for fewer tokens, or try later."
                raise DeadlineExceeded(message) from error
            return delta

    def close(self) -> None:
        """Abort the request if it still runs. A second call does nothing."""
        if self.outcome is not None:
            return
        self._llm.loop.abort(self._request.id)  # where it has ended, nothing happens
        self.outcome = _describe_end(self._request, self._finish_reason or FinishReason.ABORT)
        self._llm.metrics.observe(self.outcome)


def _describe_end(request: Request, finish_reason: FinishReason) -> Outcome:
    start = request.created_at
    return Outcome(
        finish_reason=finish_reason,
        num_prompt_tokens=request.num_prompt_tokens,
        num_cached_tokens=request.num_cached_tokens,
        num_output_tokens=request.num_output_tokens,
        max_tokens=request.params.max_tokens,
        num_preemptions=request.num_preemptions,
        total_seconds=(request.finished_at or time.perf_counter()) - start,
        queue_seconds=request.admitted_at - start if request.admitted_at else None,
        first_token_seconds=request.first_token_at - start if request.first_token_at else None,
        last_token_seconds=request.last_token_at - start if request.last_token_at else None,
    )


async def merge(generations: Sequence[Generation]) -> AsyncGenerator[tuple[int, TextDelta]]:
    """The deltas of several generations as they come, each with its generation's number."""
    if len(generations) == 1:
        async for delta in generations[0]:
            yield 0, delta
        return
    arrived: asyncio.Queue[tuple[int, TextDelta | QserveError]] = asyncio.Queue()

    async def pump(index: int, generation: Generation) -> None:
        try:
            async for delta in generation:
                arrived.put_nowait((index, delta))
        except QserveError as error:
            arrived.put_nowait((index, error))

    pumps = [asyncio.create_task(pump(*numbered)) for numbered in enumerate(generations)]
    try:
        num_running = len(pumps)
        while num_running:
            index, item = await arrived.get()
            if isinstance(item, QserveError):
                raise item
            num_running -= item.finish_reason is not None
            yield index, item
    finally:
        for task in pumps:
            task.cancel()
