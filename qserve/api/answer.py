"""From a request to its answer, streamed or whole; both are made of the same deltas.

`completions.py` and `chat.py` make the plans; the packages `responses` and `messages` write what comes of them in
other words.
"""

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from qserve.api.access_log import note_generations
from qserve.api.limits import find_deadline
from qserve.api.logprobs import LogprobWriter
from qserve.api.protocol import GenerationRequest, parse
from qserve.api.reply import name_unknown_fields, unless_gone
from qserve.api.sampling import SamplingRequest
from qserve.api.stream import Envelope, EventStream, StreamForm, UsageCounter, write_frames
from qserve.api.tools import ReplyForm, make_reply
from qserve.config import LimitsConfig
from qserve.generation import Deadline, GenerationOptions, Prompt, ScoredToken, TextDelta
from qserve.llm import LLM, Generation, merge
from qserve.text.detokenizer import make_detokenizer
from qserve.text.reasoning import ReasoningCounter

_SEEDS = 2**63


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """An answer that is about to be made: everything is checked and nothing is started."""

    llm: LLM
    wanted: GenerationRequest
    is_chat: bool
    prompts: Sequence[Prompt]
    options: Sequence[GenerationOptions]  # one a prompt
    num_samples: int  # generations a prompt; the best `wanted.n` of them are returned
    logprobs: LogprobWriter | None
    reply: ReplyForm | None = None  # how to read a chat's replies, where they are more than text

    def start(self, held: ExitStack, *, deadline: Deadline | None) -> list[Generation]:
        """A generation for every sample of every prompt, in the order of OpenAI's choice index."""
        return [
            held.enter_context(self.llm.start(prompt, _for_sample(options, number), deadline=deadline))
            for prompt, options in zip(self.prompts, self.options, strict=True)
            for number in range(self.num_samples)
        ]

    def envelope(self, *, is_stream: bool) -> Envelope:
        """The answer's id and the rest of what every part of it carries."""
        kind = "text_completion"
        if self.is_chat:
            kind = "chat.completion.chunk" if is_stream else "chat.completion"
        prefix = "chatcmpl" if self.is_chat else "cmpl"
        return Envelope(
            id=f"{prefix}-{uuid.uuid4().hex}", kind=kind, created=int(time.time()), model=self.llm.info.name
        )

    def count_usage(self) -> UsageCounter:
        lengths = [len(prompt.ids) for prompt in self.prompts]
        counters = [self.make_counter() for _ in range(len(lengths) * self.num_samples)]
        return UsageCounter(lengths, counters)

    def make_counter(self) -> ReasoningCounter | None:
        """For one generation of a chat, where reasoning is told apart."""
        form = self.reply
        if form is None or form.reasoning is None:
            return None
        tokenizer, (prompt,), (options,) = self.llm.tokenizer, self.prompts, self.options
        detokenizer = make_detokenizer(tokenizer, prompt.ids, skipped=options.skipped_ids(tokenizer))
        return ReasoningCounter(form.reasoning, is_open=form.is_reasoning_open, detokenizer=detokenizer)

    def write_logprobs(self, tokens: Sequence[ScoredToken]) -> object:
        if self.logprobs is None or not tokens:
            return None
        return self.logprobs.chat(tokens) if self.is_chat else self.logprobs.completion(tokens)


@dataclass(slots=True)
class _Collected:
    """One generation, whole."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[ScoredToken] = field(default_factory=list)
    prompt_logprobs: list[ScoredToken] = field(default_factory=list)
    last: TextDelta = field(default_factory=lambda: TextDelta(text=""))

    def add(self, delta: TextDelta) -> None:
        self.text += delta.text
        self.token_ids += delta.token_ids
        self.logprobs += delta.logprobs
        self.prompt_logprobs += delta.prompt_logprobs
        self.last = delta

    @property
    def mean_logprob(self) -> float:
        """What the best of several is chosen by, as OpenAI does."""
        return sum(token.logprobs[0].logprob for token in self.logprobs) / max(len(self.logprobs), 1)


class Writer(Protocol):
    """Writes what comes of a plan, in frames or whole."""

    def stream(self, generations: Sequence[Generation]) -> AsyncGenerator[bytes]: ...
    async def collect(self, generations: Sequence[Generation]) -> dict[str, Any]: ...


W = TypeVar("W", bound=SamplingRequest)


async def answer(
    request: Request,
    kind: type[W],
    *,
    plan: Callable[[LLM, W, LimitsConfig], Plan],
    write: Callable[[W, Plan], Writer],
) -> Response:
    """What every endpoint does that generates: a request of that kind is read, planned and answered."""
    wanted, unknown_fields = parse(kind, await request.body())
    llm = request.app.state.service.find(wanted.model)
    llm.check_room()
    # In a thread: a long prompt takes long to encode, and streams must not stand still for it.
    planned = await asyncio.to_thread(plan, llm, wanted, request.app.state.limits)
    return await _start(request, planned, write(wanted, planned), headers=name_unknown_fields(unknown_fields))


async def _start(request: Request, plan: Plan, writer: Writer, *, headers: Mapping[str, str]) -> Response:
    """Errors up to here have a status; later ones in a stream are frames."""
    with ExitStack() as held:
        generations = plan.start(held, deadline=find_deadline(plan.wanted.timeout, request.app.state.limits))
        note_generations(request.scope, generations)
        if plan.wanted.stream:
            ping_seconds = request.app.state.ping_seconds
            return EventStream(writer.stream(generations), held.pop_all(), headers, ping_seconds=ping_seconds)
        return JSONResponse(await unless_gone(request.receive, writer.collect(generations)), headers=dict(headers))


class ChoiceWriter:
    """Completions and chats: choices, in chunks or whole."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan

    def stream(self, generations: Sequence[Generation]) -> AsyncGenerator[bytes]:
        plan, asked = self._plan, self._plan.wanted.stream_options
        form = StreamForm(
            envelope=plan.envelope(is_stream=True),
            replies=[make_reply(plan.reply) for _ in generations] if plan.is_chat else None,
            write_logprobs=plan.write_logprobs,
            with_usage=asked is not None and asked.include_usage,
            with_running_usage=asked is not None and asked.include_usage and asked.continuous_usage_stats,
            with_token_ids=plan.wanted.return_token_ids,
        )
        return write_frames(generations, form, plan.count_usage())

    async def collect(self, generations: Sequence[Generation]) -> dict[str, Any]:
        return await _collect(self._plan, generations)


async def _collect(plan: Plan, generations: Sequence[Generation]) -> dict[str, Any]:
    collected = [_Collected() for _ in generations]
    usage = plan.count_usage()
    async for index, delta in merge(generations):
        collected[index].add(delta)
        usage.take(index, delta)
    chosen = [(prompt, one) for prompt, some in _by_prompt(plan, collected) for one in some]
    envelope = plan.envelope(is_stream=False)
    return {
        "id": envelope.id,
        "object": envelope.kind,
        "created": envelope.created,
        "model": envelope.model,
        "choices": [_write_choice(plan, index, prompt, one) for index, (prompt, one) in enumerate(chosen)],
        "usage": usage.report(),
    }


def _by_prompt(plan: Plan, collected: Sequence[_Collected]) -> Iterator[tuple[Prompt, list[_Collected]]]:
    """Each prompt's samples, or the best of them when more were made than are returned."""
    for number, prompt in enumerate(plan.prompts):
        samples = list(collected[number * plan.num_samples : (number + 1) * plan.num_samples])
        if plan.num_samples > plan.wanted.n:
            samples.sort(key=lambda sample: sample.mean_logprob, reverse=True)
        yield prompt, samples[: plan.wanted.n]


def _write_choice(plan: Plan, index: int, prompt: Prompt, one: _Collected) -> dict[str, Any]:
    echoed = one.prompt_logprobs if plan.options[0].echo else []
    choice: dict[str, Any] = {"index": index}
    finish_reason: str | None = one.last.finish_reason
    if plan.is_chat:
        replying = make_reply(plan.reply)
        choice["message"] = replying.message(one.text)
        finish_reason = replying.finish_reason(finish_reason)
    else:
        choice["text"] = one.text
    choice["logprobs"] = plan.write_logprobs(echoed + one.logprobs)
    choice["finish_reason"] = finish_reason
    choice["stop_reason"] = one.last.stop_reason
    if plan.wanted.prompt_logprobs is not None:
        writer = LogprobWriter(plan.llm.tokenizer, num_top=plan.wanted.prompt_logprobs, as_token_ids=False)
        choice["prompt_logprobs"] = writer.prompt(one.prompt_logprobs)
    if plan.wanted.return_token_ids:
        choice |= {"token_ids": one.token_ids, "prompt_token_ids": list(prompt.ids)}
    return choice


def _for_sample(options: GenerationOptions, number: int) -> GenerationOptions:
    """Samples of one prompt differ by their seeds, so that each can be made again."""
    seed = options.sampling.seed
    if seed is None or number == 0:
        return options
    return replace(options, sampling=replace(options.sampling, seed=(seed + number + _SEEDS) % (2 * _SEEDS) - _SEEDS))
