"""What /v1/messages answers: a message of content blocks, event by event or whole."""

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic_core import from_json

from qserve.api.answer import Plan
from qserve.api.blocks import Block, BlockReader, Change
from qserve.api.errors import anthropic_body
from qserve.api.events import Event
from qserve.engine.request import FinishReason
from qserve.errors import QserveError
from qserve.generation import TextDelta

# Of each kind of block: its type, the type of what it grows by, and the field that this stands in.
_GROWING: Mapping[str, tuple[str, str]] = {
    "text": ("text_delta", "text"),
    "reasoning": ("thinking_delta", "thinking"),
    "call": ("input_json_delta", "partial_json"),
}


class MessageAnswer:
    """One message, from its first event to its last. `max_tokens` is what was asked for, which may not have fit."""

    def __init__(self, plan: Plan, *, identity: str, max_tokens: int) -> None:
        self._plan = plan
        self._identity = identity
        self._is_shortened = plan.options[0].sampling.max_tokens < max_tokens
        self._reader = BlockReader(plan.reply)
        self._last = TextDelta(text="")

    def begin(self) -> Iterator[Event]:
        yield {"type": "message_start", "message": self.whole()}

    def take(self, delta: TextDelta) -> Iterator[Event]:
        self._last = delta
        for change in self._reader.read(delta):
            yield self._tell(change)
        if delta.finish_reason is not None:
            yield {"type": "message_delta", "delta": self._end(), "usage": self._usage()}
            yield {"type": "message_stop"}

    def fail(self, error: QserveError) -> Iterator[Event]:
        yield anthropic_body(error)

    def whole(self) -> dict[str, Any]:
        """The message as it stands."""
        return {
            "id": f"msg_{self._identity}",
            "type": "message",
            "role": "assistant",
            "model": self._plan.llm.info.name,
            "content": [_write(block) for block in self._reader.blocks],
            **self._end(),
            "usage": self._usage(),
        }

    def _tell(self, change: Change) -> Event:
        index = change.block.index
        match change.kind:
            case "open":
                return {"type": "content_block_start", "index": index, "content_block": _write(change.block)}
            case "grow":
                kind, field = _GROWING[change.block.kind]
                return {"type": "content_block_delta", "index": index, "delta": {"type": kind, field: change.text}}
            case "close":
                return {"type": "content_block_stop", "index": index}

    def _end(self) -> dict[str, Any]:
        """Why it ended, if it has, and at which of the caller's own stop sequences."""
        stop = self._last.stop_reason
        return {"stop_reason": self._reason(), "stop_sequence": stop if isinstance(stop, str) else None}

    def _reason(self) -> str | None:
        match self._last.finish_reason:
            case None:
                return None
            case FinishReason.LENGTH:
                return "model_context_window_exceeded" if self._is_shortened else "max_tokens"
        if isinstance(self._last.stop_reason, str):
            return "stop_sequence"
        return "tool_use" if any(block.kind == "call" for block in self._reader.blocks) else "end_turn"

    def _usage(self) -> dict[str, int]:
        """What was found in the cache is not counted among the input."""
        num_cached_tokens = self._last.num_cached_tokens
        return {
            "input_tokens": len(self._plan.prompts[0].ids) - num_cached_tokens,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": num_cached_tokens,
            "output_tokens": self._last.num_output_tokens,
        }


def _write(block: Block) -> dict[str, Any]:
    match block.kind:
        case "text":
            return {"type": "text", "text": block.text}
        case "reasoning":
            return {"type": "thinking", "thinking": block.text, "signature": ""}
        case "call":
            return {"type": "tool_use", "id": block.call_id, "name": block.name, "input": _read(block.text)}


def _read(arguments: str) -> dict[str, Any]:
    """Arguments as the object that they are, or that they were going to be when they were cut short."""
    try:
        found = from_json(arguments, allow_partial=True)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
