"""What /v1/responses answers: a response of items, event by event or whole."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qserve.api.answer import Plan
from qserve.api.blocks import Block, BlockReader, Change
from qserve.api.events import Event
from qserve.api.responses.request import ResponseRequest
from qserve.engine.request import FinishReason
from qserve.errors import InvalidRequest, QserveError
from qserve.generation import ScoredToken, TextDelta


@dataclass(frozen=True, slots=True, kw_only=True)
class _Form:
    """How a kind of block is called in events: its item, what grows of it, and the part that holds this."""

    id_prefix: str
    growing: str
    field: str
    part: str | None


_FORMS: Mapping[str, _Form] = {
    "text": _Form(id_prefix="msg", growing="response.output_text", field="text", part="output_text"),
    "reasoning": _Form(id_prefix="rs", growing="response.reasoning_text", field="text", part="reasoning_text"),
    "call": _Form(id_prefix="fc", growing="response.function_call_arguments", field="arguments", part=None),
}


class ResponseAnswer:
    """One response, from its first event to its last."""

    def __init__(self, wanted: ResponseRequest, plan: Plan, *, identity: str) -> None:
        self._repeated = _repeat(wanted)
        self._plan = plan
        self._identity = identity
        self._created = int(time.time())
        self._reader = BlockReader(plan.reply)
        self._counter = plan.make_counter()
        self._num_events = 0
        self._last: TextDelta | None = None
        self._error: QserveError | None = None

    def begin(self) -> Iterator[Event]:
        yield self._event("response.created", response=self.whole())
        yield self._event("response.in_progress", response=self.whole())

    def take(self, delta: TextDelta) -> Iterator[Event]:
        if self._counter is not None:
            self._counter.take(delta.token_ids)
        for change in self._reader.read(delta):
            yield from self._tell(change)
        if delta.finish_reason is not None:
            self._last = delta
            yield self._event(f"response.{self._status}", response=self.whole())

    def fail(self, error: QserveError) -> Iterator[Event]:
        self._error = error
        self._reader.cut()
        yield self._event("response.failed", response=self.whole())

    def whole(self) -> dict[str, Any]:
        """The response as it stands."""
        status = self._status
        return {
            "id": f"resp_{self._identity}",
            "object": "response",
            "created_at": self._created,
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "background": False,
            "error": None if self._error is None else _describe(self._error),
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "model": self._plan.llm.info.name,
            "output": [self._item(block) for block in self._reader.blocks],
            "usage": None if self._last is None else self._usage(self._last),
            **self._repeated,
        }

    @property
    def _status(self) -> str:
        if self._error is not None:
            return "failed"
        if self._last is None:
            return "in_progress"
        return "incomplete" if self._last.finish_reason is FinishReason.LENGTH else "completed"

    def _event(self, name: str, /, **fields: Any) -> Event:
        self._num_events += 1
        return {"type": name, "sequence_number": self._num_events - 1, **fields}

    def _tell(self, change: Change) -> Iterator[Event]:
        block, form = change.block, _FORMS[change.block.kind]
        item = {"output_index": block.index}
        place = {**item, "item_id": self._item_id(block)}
        if form.part is not None:
            place["content_index"] = 0
        scored = {"logprobs": self._logprobs(change.tokens)} if block.kind == "text" else {}
        match change.kind:
            case "open":
                opened = self._item(block, status="in_progress")
                yield self._event("response.output_item.added", **item, item=opened)
                if form.part is not None:
                    yield self._event("response.content_part.added", **place, part=self._part(block))
            case "grow":
                yield self._event(f"{form.growing}.delta", **place, delta=change.text, **scored)
            case "close":
                done = {form.field: block.text, **({"name": block.name} if block.kind == "call" else {})}
                if scored:
                    scored = {"logprobs": self._logprobs(block.tokens)}
                yield self._event(f"{form.growing}.done", **place, **done, **scored)
                if form.part is not None:
                    yield self._event("response.content_part.done", **place, part=self._part(block))
                yield self._event("response.output_item.done", **item, item=self._item(block))

    def _item(self, block: Block, *, status: str = "") -> dict[str, Any]:
        status = status or ("incomplete" if block.is_cut else "completed")
        item: dict[str, Any] = {"id": self._item_id(block), "status": status}
        parts = [self._part(block)] if status != "in_progress" else []
        match block.kind:
            case "text":
                return {**item, "type": "message", "role": "assistant", "content": parts}
            case "reasoning":
                return {**item, "type": "reasoning", "summary": [], "content": parts}
            case "call":
                called = {"call_id": block.call_id, "name": block.name, "arguments": block.text}
                return {**item, "type": "function_call", **called}

    def _item_id(self, block: Block) -> str:
        return f"{_FORMS[block.kind].id_prefix}_{self._identity}_{block.index}"

    def _part(self, block: Block) -> dict[str, Any]:
        part: dict[str, Any] = {"type": _FORMS[block.kind].part, "text": block.text}
        if block.kind == "text":
            part |= {"annotations": [], "logprobs": self._logprobs(block.tokens)}
        return part

    def _logprobs(self, tokens: Sequence[ScoredToken]) -> list[Any]:
        writer = self._plan.logprobs
        return [] if writer is None else list(writer.chat(tokens)["content"])

    def _usage(self, last: TextDelta) -> dict[str, Any]:
        num_prompt_tokens = len(self._plan.prompts[0].ids)
        return {
            "input_tokens": num_prompt_tokens,
            "input_tokens_details": {"cached_tokens": last.num_cached_tokens, "cache_write_tokens": 0},
            "output_tokens": last.num_output_tokens,
            "output_tokens_details": {
                "reasoning_tokens": self._counter.num_reasoning_tokens if self._counter is not None else 0
            },
            "total_tokens": num_prompt_tokens + last.num_output_tokens,
        }


def _repeat(wanted: ResponseRequest) -> dict[str, Any]:
    """What was asked, which a response tells again, and what is never in force here."""
    return {
        "instructions": wanted.instructions,
        "max_output_tokens": wanted.max_output_tokens,
        "max_tool_calls": None,
        "metadata": wanted.metadata,
        "parallel_tool_calls": wanted.parallel_tool_calls,
        "previous_response_id": None,
        "reasoning": {"effort": wanted.reasoning.effort, "summary": None},
        "store": False,
        "temperature": wanted.temperature,
        "text": wanted.text.model_dump(by_alias=True, exclude_none=True),
        "tool_choice": wanted.tool_choice.as_sent(),
        "tools": [tool.model_dump(exclude={"defer_loading"}) for tool in wanted.tools],
        "top_logprobs": wanted.top_logprobs or 0,
        "top_p": wanted.top_p,
        "truncation": "disabled",
    }


def _describe(error: QserveError) -> dict[str, str]:
    """In one of the words that clients know for the code."""
    return {"code": "invalid_prompt" if isinstance(error, InvalidRequest) else "server_error", "message": str(error)}
