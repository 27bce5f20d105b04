"""LLM: text in, text out. Where text meets tokens, and the whole of qserve as seen from Python.

Joins a tokenizer, a chat template and a running engine. Knows no HTTP (api/ is its caller) and no tensors (build.py
makes one). Every generation, streamed or not, is a `Generation`, and leaving its `with` block frees what it holds.
"""

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Self

from qserve.engine.loop import EngineLoop
from qserve.engine.request import FinishReason, Request, SamplingParams, TokenEvent, TokenLogprob
from qserve.errors import ContextLengthExceeded, InvalidRequest, NotReady, QserveError
from qserve.metrics import Metrics
from qserve.text.detokenizer import make_detokenizer
from qserve.text.stop import StopStrings
from qserve.text.templates import ChatTemplate, Message
from qserve.text.tokenizer import Tokenizer

_log = logging.getLogger("qserve.requests")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """What is served. `details` is what only some models have: recipe, bytes by kind, kernels."""

    name: str
    max_model_len: int
    vocabulary_size: int
    created: int
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """What a generation continues; `text` is what the caller wrote, where it was text."""

    ids: Sequence[int]
    text: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationOptions:
    """What is asked of a generation. `sampling.stop_token_ids` holds the caller's own; the model's are added here."""

    sampling: SamplingParams
    stop: tuple[str, ...] = ()
    include_stop: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    echo: bool = False
    priority: int = 0


@dataclass(frozen=True, slots=True)
class ScoredToken:
    """A token's log-probabilities, the token itself first, and where its text begins in the text that is returned.

    The first token of a prompt has nothing before it and so no log-probabilities.
    """

    token_id: int
    text_offset: int
    logprobs: tuple[TokenLogprob, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TextDelta:
    """Text that is safe to send, and the tokens made since the delta before. Only the last has a finish reason."""

    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[ScoredToken, ...] = ()
    prompt_logprobs: tuple[ScoredToken, ...] = ()  # on the first delta, when they were asked for
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None  # the stop string or the caller's stop token that ended it
    num_output_tokens: int = 0  # up to here
    num_cached_tokens: int = 0  # of the prompt


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

    @property
    def is_alive(self) -> bool:
        """Whether the engine's thread runs."""
        return self.loop.is_alive

    def encode(self, text: str, *, add_special_tokens: bool = True) -> Prompt:
        """A prompt from text. An empty one starts a new document, as OpenAI's default prompt does."""
        ids = self.tokenizer.encode(text, add_special_tokens=add_special_tokens)
        if not ids:
            start = self.tokenizer.bos_id if self.tokenizer.bos_id is not None else self.tokenizer.eos_id
            if start is None:
                raise InvalidRequest("The prompt is empty, and this model has no token to begin with.", param="prompt")
            ids = [start]
        return Prompt(ids=ids, text=text)

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

    def room_for(self, prompt: Prompt, max_tokens: int | None) -> int:
        """How many tokens may be made: those asked for, or by default all that fit."""
        limit, length = self.info.max_model_len, len(prompt.ids)
        asked = max(limit - length, 1) if max_tokens is None else max_tokens
        if length + asked > limit:
            raise ContextLengthExceeded(
                f"This model's context is {limit} tokens. The prompt has {length} and {asked} more were asked for. "
                "Shorten the prompt, or ask for fewer tokens.",
                param="prompt" if length >= limit else "max_tokens",
            )
        return asked

    def start(self, prompt: Prompt, options: GenerationOptions) -> "Generation":
        """Hands a request to the engine; raises QueueFull or EngineDead at once. Call it on a running event loop."""
        sampling = options.sampling
        self.check_vocabulary(sampling.logit_bias, param="logit_bias")
        self.check_vocabulary(sampling.stop_token_ids, param="stop_token_ids")
        ends = frozenset() if options.ignore_eos else self.tokenizer.end_token_ids
        sampling = replace(sampling, stop_token_ids=sampling.stop_token_ids | ends)
        request = Request(uuid.uuid4().hex, list(prompt.ids), sampling, priority=options.priority)
        return Generation(self, request, TextAssembler(self.tokenizer, prompt, options), self.loop.submit(request))

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

    def note_end(self, request: Request, finish_reason: FinishReason) -> None:
        """One log line and the metrics of a request that has ended; never what was said in it."""
        seconds = time.perf_counter() - request.created_at
        first = request.first_token_at - request.created_at if request.first_token_at else None
        self.metrics.observe(
            finish_reason=finish_reason, seconds=seconds, first_token=first, num_output_tokens=request.num_output_tokens
        )
        _log.info(
            "id=%s finish_reason=%s prompt_tokens=%d cached_tokens=%d output_tokens=%d first_token_s=%s total_s=%.3f",
            request.id,
            finish_reason,
            request.num_prompt_tokens,
            request.num_cached_tokens,
            request.num_output_tokens,
            "-" if first is None else f"{first:.3f}",
            seconds,
        )

    async def drain(self, seconds: float) -> None:
        """Take nothing new, and give what runs this long to finish."""
        await asyncio.to_thread(self.loop.drain, seconds)

    def close(self) -> None:
        """End the engine's thread; what still runs ends with NotReady."""
        self.loop.stop()


class Generation:
    """One running request as an iterator of text. Leave its `with` block, and the engine holds nothing of it."""

    def __init__(
        self, llm: LLM, request: Request, assembler: "TextAssembler", events: AsyncIterator[TokenEvent]
    ) -> None:
        self._llm = llm
        self._request = request
        self._assembler = assembler
        self._events = events
        self._finish_reason: FinishReason | None = None
        self._is_closed = False

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
        async for event in self._events:
            if event.finish_reason is FinishReason.ABORT:
                break
            delta = self._assembler.add(event)
            if delta is not None:
                self._finish_reason = delta.finish_reason
                return delta
        raise NotReady("The server is ending, and this request was cut short: send it again, elsewhere or later.")

    def close(self) -> None:
        """Abort the request if it still runs. A second call does nothing."""
        if self._is_closed:
            return
        self._is_closed = True
        self._llm.loop.abort(self._request.id)  # where it has ended, nothing happens
        self._llm.note_end(self._request, self._finish_reason or FinishReason.ABORT)


class TextAssembler:
    """One request's tokens on their way to text: whole characters, stop strings, log-probabilities with offsets."""

    def __init__(self, tokenizer: Tokenizer, prompt: Prompt, options: GenerationOptions) -> None:
        self._tokenizer = tokenizer
        self._options = options
        self._prompt_ids = prompt.ids
        self._detokenizer = make_detokenizer(tokenizer, prompt.ids, skip_special_tokens=options.skip_special_tokens)
        self._stops = StopStrings(options.stop, include_in_output=options.include_stop)
        self._prompt_offsets: list[int] = []
        self._prompt_logprobs: list[tuple[TokenLogprob, ...]] = [()]  # nothing comes before the first token
        self._text = self._echo(prompt) if options.echo else ""  # certain, and not sent
        self._num_characters = len(self._text)  # certain so far, sent or not, whatever a stop string cuts off
        self._token_ids: list[int] = []
        self._logprobs: list[ScoredToken] = []
        self._num_output_tokens = 0
        self._num_cached_tokens = 0

    def add(self, event: TokenEvent) -> TextDelta | None:
        """Takes in one event; the text that can be sent now, if there is any."""
        self._prompt_logprobs += event.prompt_logprobs
        self._num_cached_tokens = max(self._num_cached_tokens, event.num_cached_tokens)
        finish_reason: FinishReason | None = event.finish_reason
        if event.token_id is None and finish_reason is None:
            return None  # only scores of a part of the prompt; even an echo waits for all of them
        stop_reason: str | int | None = None
        if event.token_id is not None:
            stop_reason = self._add_token(event.token_id, event)
        if finish_reason is not None and self._stops.matched is None:
            self._add_text(self._detokenizer.finish())
            self._text += self._stops.finish()
        if self._stops.matched is not None:
            finish_reason, stop_reason = FinishReason.STOP, self._stops.matched
        if not self._text and finish_reason is None:
            return None
        return self._take(finish_reason, stop_reason)

    def _add_token(self, token_id: int, event: TokenEvent) -> int | None:
        """Takes in a token; its id when it is one of the caller's own stop tokens and ends the text."""
        self._num_output_tokens += 1
        self._token_ids.append(token_id)
        is_stop = event.finish_reason is FinishReason.STOP
        offset = self._num_characters
        if not is_stop or self._options.include_stop:
            piece = self._detokenizer.feed(token_id)
            self._num_characters += len(piece)
            offset = self._find_offset(token_id, piece, before=offset)
            self._add_text(piece)
        if event.logprobs:
            self._logprobs.append(ScoredToken(token_id, offset, event.logprobs))
        is_own = token_id in self._options.sampling.stop_token_ids
        return token_id if is_stop and is_own else None

    def _add_text(self, piece: str) -> None:
        can_stop = self._num_output_tokens > self._options.sampling.min_tokens
        self._text += self._stops.feed(piece, can_stop=can_stop)

    def _find_offset(self, token_id: int, piece: str, *, before: int) -> int:
        """Where a token's text begins, given the text that became certain with it.

        An incomplete character that it ended stands before its own text. A piece of a character begins where the
        character does.
        """
        try:
            own = self._tokenizer.token_bytes(token_id).decode()
        except UnicodeDecodeError:
            return before
        return before + max(len(piece) - len(own), 0)

    def _take(self, finish_reason: FinishReason | None, stop_reason: str | int | None) -> TextDelta:
        delta = TextDelta(
            text=self._text,
            token_ids=tuple(self._token_ids),
            logprobs=tuple(self._logprobs),
            prompt_logprobs=self._take_prompt_logprobs(),
            finish_reason=finish_reason,
            stop_reason=stop_reason,
            num_output_tokens=self._num_output_tokens,
            num_cached_tokens=self._num_cached_tokens,
        )
        self._text, self._token_ids, self._logprobs = "", [], []
        return delta

    def _take_prompt_logprobs(self) -> tuple[ScoredToken, ...]:
        if self._options.sampling.prompt_logprobs is None or not self._prompt_logprobs:
            return ()
        offsets = self._prompt_offsets or [0] * len(self._prompt_ids)
        scored = [ScoredToken(*row) for row in zip(self._prompt_ids, offsets, self._prompt_logprobs, strict=True)]
        self._prompt_logprobs = []
        return tuple(scored)

    def _echo(self, prompt: Prompt) -> str:
        """The prompt's text as it is sent back: what the caller wrote, or else the tokens' text."""
        detokenizer = make_detokenizer(self._tokenizer, skip_special_tokens=self._options.skip_special_tokens)
        text = ""
        for token_id in prompt.ids:
            piece = detokenizer.feed(token_id)
            self._prompt_offsets.append(self._find_offset(token_id, piece, before=len(text)))
            text += piece
        if prompt.text is not None:
            return prompt.text
        self._detokenizer = detokenizer  # a character that the prompt leaves unfinished is finished by what follows
        return text


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
