"""What is asked of a prompt without making text of it: the requests of /v1/embeddings and /v1/score, and their answers.

Both run as generations that make no token, or one that nobody sees.
"""

import asyncio
import base64
import math
from array import array
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, Literal, Self

from pydantic import Field, model_validator
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from qserve.api.access_log import note_generations
from qserve.api.limits import check_num_prompts, find_deadline
from qserve.api.protocol import Prompts, parse
from qserve.api.reply import name_unknown_fields, unless_gone
from qserve.api.service import Service
from qserve.api.wire import Wire
from qserve.engine.request import SamplingParams
from qserve.errors import InvalidRequest
from qserve.generation import GenerationOptions, Prompt, TextDelta
from qserve.llm import LLM, merge

_MAX_LABELS = 1024
_LOWEST_NORM = 1e-12


class EmbeddingRequest(Wire):
    model: str | None = None
    input: Prompts
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, ge=1)
    pooling: Literal["mean", "last"] = "mean"
    normalize: bool = True
    add_special_tokens: bool = True
    truncate_prompt_tokens: int | None = Field(None, ge=1)
    priority: int = Field(0, ge=-(2**31), lt=2**31)


class ScoreRequest(Wire):
    """How likely each label is to come next, after a query and an item."""

    model: str | None = None
    query: str | list[int] = ""
    items: Prompts
    label_token_ids: list[int] = Field(min_length=1, max_length=_MAX_LABELS)
    apply_softmax: bool = False
    item_first: bool = False
    add_special_tokens: bool = True
    priority: int = Field(0, ge=-(2**31), lt=2**31)

    @model_validator(mode="after")
    def _check_kinds(self) -> Self:
        if self.query and isinstance(self.query, str) is not isinstance(self.items[0], str):
            raise InvalidRequest("query and items must both be text, or both token ids.", param="items")
        return self


async def embeddings(request: Request) -> Response:
    wanted, unknown = parse(EmbeddingRequest, await request.body())
    llm = _find(request, wanted.model)
    check_num_prompts(wanted.input, request.app.state.limits, param="input")
    prompts = await asyncio.to_thread(_read_inputs, llm, wanted)
    asked = [_pooling_options(wanted, prompt) for prompt in prompts]
    pooled = [delta.pooled for delta in await _measure(request, llm, prompts, asked)]
    vectors = [
        _finish(wanted, sums, 1 if wanted.pooling == "last" else len(prompt.ids))
        for sums, prompt in zip(pooled, prompts, strict=True)
    ]
    rows = [
        {"object": "embedding", "index": index, "embedding": _encode(wanted, vector)}
        for index, vector in enumerate(vectors)
    ]
    body = {"object": "list", "data": rows, "model": llm.info.name, "usage": _usage(prompts)}
    return JSONResponse(body, headers=name_unknown_fields(unknown))


async def score(request: Request) -> Response:
    wanted, unknown = parse(ScoreRequest, await request.body())
    llm = _find(request, wanted.model)
    check_num_prompts(wanted.items, request.app.state.limits, param="items")
    llm.check_vocabulary(wanted.label_token_ids, param="label_token_ids")
    prompts = await asyncio.to_thread(lambda: [_join(llm, wanted, item) for item in wanted.items])
    sampling = SamplingParams(
        max_tokens=1, temperature=0.0, logprobs=0, logprob_token_ids=tuple(wanted.label_token_ids)
    )
    options = GenerationOptions(sampling=sampling, priority=wanted.priority)
    for prompt in prompts:
        llm.room_for(prompt, 1)
    deltas = await _measure(request, llm, prompts, [options] * len(prompts))
    scores = [_weigh([entry.logprob for entry in delta.logprobs[0].logprobs[1:]], wanted) for delta in deltas]
    body = {"object": "scoring", "scores": scores, "model": llm.info.name, "usage": _usage(prompts)}
    return JSONResponse(body, headers=name_unknown_fields(unknown))


async def _measure(
    request: Request, llm: LLM, prompts: Sequence[Prompt], options: Sequence[GenerationOptions]
) -> list[TextDelta]:
    """The one delta of each generation, in their order."""
    deadline = find_deadline(None, request.app.state.limits)
    with ExitStack() as held:
        generations = [
            held.enter_context(llm.start(prompt, asked, deadline=deadline))
            for prompt, asked in zip(prompts, options, strict=True)
        ]
        note_generations(request.scope, generations)

        async def collect() -> list[TextDelta]:
            found = {index: delta async for index, delta in merge(generations)}
            return [found[index] for index in range(len(generations))]

        return await unless_gone(request.receive, collect())


def _find(request: Request, model: str | None) -> LLM:
    service: Service = request.app.state.service
    return service.find(model)


def _read_inputs(llm: LLM, wanted: EmbeddingRequest) -> list[Prompt]:
    limit = wanted.truncate_prompt_tokens
    prompts = [_read(llm, given, add_special_tokens=wanted.add_special_tokens) for given in wanted.input]
    prompts = [prompt if limit is None else Prompt(ids=prompt.ids[-limit:]) for prompt in prompts]
    for prompt in prompts:
        llm.room_for(prompt, 0)
    return prompts


def _read(llm: LLM, given: str | list[int], *, add_special_tokens: bool) -> Prompt:
    if isinstance(given, str):
        return llm.encode(given, add_special_tokens=add_special_tokens)
    return llm.check_ids(given)


def _join(llm: LLM, wanted: ScoreRequest, item: str | list[int]) -> Prompt:
    query = wanted.query or type(item)()
    parts: list[Any] = [item, query] if wanted.item_first else [query, item]
    return _read(llm, parts[0] + parts[1], add_special_tokens=wanted.add_special_tokens)


def _pooling_options(wanted: EmbeddingRequest, prompt: Prompt) -> GenerationOptions:
    first = len(prompt.ids) - 1 if wanted.pooling == "last" else 0
    return GenerationOptions(sampling=SamplingParams(max_tokens=0, pooled_from=first), priority=wanted.priority)


def _finish(wanted: EmbeddingRequest, sums: Sequence[float], num_positions: int) -> list[float]:
    """The mean, cut to what was asked for, and then brought to length one, as OpenAI's are."""
    size = wanted.dimensions or len(sums)
    if size > len(sums):
        raise InvalidRequest(f"This model's embeddings have {len(sums)} dimensions, not {size}.", param="dimensions")
    vector = [value / num_positions for value in sums[:size]]
    norm = max(math.hypot(*vector), _LOWEST_NORM) if wanted.normalize else 1.0
    return [value / norm for value in vector]


def _encode(wanted: EmbeddingRequest, vector: Sequence[float]) -> list[float] | str:
    values = array("f", vector)
    return list(values) if wanted.encoding_format == "float" else base64.b64encode(values.tobytes()).decode()


def _weigh(logprobs: Sequence[float], wanted: ScoreRequest) -> list[float]:
    """Probabilities over the whole vocabulary, or over the labels alone."""
    if not wanted.apply_softmax:
        return [math.exp(logprob) for logprob in logprobs]
    highest = max(logprobs)
    weights = [math.exp(logprob - highest) for logprob in logprobs]
    return [weight / math.fsum(weights) for weight in weights]


def _usage(prompts: Sequence[Prompt]) -> dict[str, int]:
    total = sum(len(prompt.ids) for prompt in prompts)
    return {"prompt_tokens": total, "completion_tokens": 0, "total_tokens": total}
