"""Tools as clients offer them, and replies as clients read them: reasoning, text and calls apart."""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol, Self

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from qserve.api.wire import Wire
from qserve.errors import InvalidRequest
from qserve.generation import Prompt
from qserve.llm import LLM
from qserve.text.grammar import GrammarSource, from_grammar
from qserve.text.pieces import Part
from qserve.text.reasoning import ReasoningFormat, ReplyParser, find_reasoning_format
from qserve.text.tools import CallParser, ToolFormat, call_grammar, find_tool_format

FUNCTION_NAME = r"^[a-zA-Z0-9_.-]{1,64}$"
_MAX_TOOLS = 512
_ID_LENGTH = 24
_ANY_OBJECT: Mapping[str, Any] = {"type": "object"}
_CHOICES = ("none", "auto", "required")


class Function(Wire):
    """The template sees what was sent, unknown fields included."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True)

    name: str = Field(pattern=FUNCTION_NAME)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool = False


class _FunctionName(Wire):
    name: str


class Tool(Wire):
    model_config = ConfigDict(strict=True, extra="allow", frozen=True)

    type: Literal["function"]
    function: Function


class NamedTool(Wire):
    """A function that must be called."""

    type: Literal["function"]
    function: _FunctionName


def _check_choice(value: Any) -> Any:
    """A word, or the name of the function that must be called."""
    if isinstance(value, str) and value in _CHOICES:
        return value
    if isinstance(value, dict) and value.get("type") == "function" and isinstance(value.get("function"), dict):
        name = value["function"].get("name")
        if isinstance(name, str):
            return {"name": name}
    raise ValueError('expected "none", "auto", "required", or {"type": "function", "function": {"name": ...}}')


class ToolRequest(Wire):
    """The fields of a chat request that concern tools."""

    tools: list[Tool] = Field([], max_length=_MAX_TOOLS)
    tool_choice: Annotated[
        str | dict[str, str] | None,
        BeforeValidator(_check_choice, json_schema_input_type=Literal["none", "auto", "required"] | NamedTool | None),
    ] = None
    parallel_tool_calls: bool = True
    include_reasoning: bool = True

    @model_validator(mode="after")
    def _check_tools(self) -> Self:
        names = [tool.function.name for tool in self.tools]
        if len(set(names)) < len(names):
            raise InvalidRequest("Two tools have the same name.", param="tools")
        if self.tool_choice not in (None, "none", "auto") and not self.tools:
            raise InvalidRequest("tool_choice asks for a call, but there are no tools.", param="tool_choice")
        if isinstance(self.tool_choice, dict) and self.tool_choice["name"] not in names:
            message = f"tool_choice names {self.tool_choice['name'][:80]!r}, which is not among the tools."
            raise InvalidRequest(message, param="tool_choice")
        return self

    @property
    def offered(self) -> list[dict[str, Any]] | None:
        """The tools as a template wants them, where the model may call any."""
        if not self.tools or self.tool_choice == "none":
            return None
        return as_sent(self.tools)

    @property
    def forced(self) -> dict[str, Mapping[str, Any]]:
        """The schemas of the functions of which one must be called; none where the model is free."""
        if self.tool_choice in (None, "none", "auto"):
            return {}
        schemas = self._schemas
        if isinstance(self.tool_choice, dict):
            return {self.tool_choice["name"]: schemas[self.tool_choice["name"]]}
        return schemas

    @property
    def strict(self) -> dict[str, Mapping[str, Any]]:
        """All schemas, where a tool says that its calls must be under its own; none otherwise."""
        is_strict = self.offered and any(tool.function.strict for tool in self.tools)
        return self._schemas if is_strict else {}

    @property
    def _schemas(self) -> dict[str, Mapping[str, Any]]:
        return {tool.function.name: tool.function.parameters or _ANY_OBJECT for tool in self.tools}


def as_sent(tools: Sequence[Tool]) -> list[dict[str, Any]] | None:
    """Tools for a template, in which None stands for none."""
    return [tool.model_dump(exclude_unset=True) for tool in tools] or None


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplyForm:
    """How the replies to one request are written by the model: its tools' form, its reasoning's, or neither."""

    tools: ToolFormat | None
    names: frozenset[str]
    max_calls: int | None
    reasoning: ReasoningFormat | None
    is_reasoning_open: bool
    with_reasoning: bool

    def shown_ids(self, special_ids: Mapping[str, int]) -> frozenset[int]:
        """The special tokens that must stand in the text, or nobody could read it."""
        texts = [self.reasoning.begin, self.reasoning.end] if self.reasoning else []
        texts += [self.tools.begin, self.tools.end, self.tools.head] if self.tools else []
        return frozenset(token_id for token, token_id in special_ids.items() if any(token in text for text in texts))

    def call_source(self, wanted: ToolRequest, special_ids: Mapping[str, int]) -> GrammarSource | None:
        """The grammar of a reply that must be a call, or whose calls must be strictly under their schemas."""
        schemas = wanted.forced or wanted.strict
        if not schemas or self.tools is None:
            return None
        is_single = isinstance(wanted.tool_choice, dict) or not wanted.parallel_tool_calls
        thought_end = self.reasoning.end if self.reasoning and self.is_reasoning_open else None
        lark = call_grammar(
            self.tools,
            schemas,
            is_single=is_single,
            special_ids=special_ids,
            is_forced=bool(wanted.forced),
            thought_end=thought_end,
        )
        return from_grammar(lark, param="tools")

    def make_parser(self) -> ReplyParser:
        calls = None if self.tools is None else CallParser(self.tools, names=self.names)
        return ReplyParser(reasoning=self.reasoning, is_open=self.is_reasoning_open, calls=calls)

    def shows(self, part: Part) -> bool:
        """Whether the client is to see it."""
        if part.kind == "call":
            return self.max_calls is None or part.index < self.max_calls
        return part.kind == "text" or self.with_reasoning

    def make_id(self) -> str:
        """A call's. Some templates insist on a number of letters and digits; OpenAI's own begin with call_."""
        digits = secrets.token_hex(_ID_LENGTH)
        length = self.tools.id_length if self.tools else None
        return digits[:length] if length else f"call_{digits[:_ID_LENGTH]}"


def find_reply_form(llm: LLM, wanted: ToolRequest, prompt: Prompt, *, is_structured: bool) -> ReplyForm | None:
    """None where a reply is text and nothing else. A structured one leaves no room for reasoning."""
    source = "" if llm.template is None else llm.template.tool_source
    reasoning = None if is_structured else find_reasoning_format(source)
    if reasoning is None and wanted.offered is None:
        return None
    begin = reasoning.begin if reasoning else None
    return ReplyForm(
        tools=find_tool_format(source) if wanted.offered else None,
        names=frozenset(tool.function.name for tool in wanted.tools),
        max_calls=None if wanted.parallel_tool_calls else 1,
        reasoning=reasoning,
        is_reasoning_open=begin is not None and (prompt.text or "").rstrip().endswith(begin),
        with_reasoning=wanted.include_reasoning,
    )


class Reply(Protocol):
    """One choice's reply in OpenAI's words, whole or in deltas."""

    def delta(self, text: str, *, is_end: bool) -> dict[str, Any]: ...
    def message(self, text: str) -> dict[str, Any]: ...
    def finish_reason(self, reason: str | None) -> str | None: ...


class PlainReply:
    """Text and nothing else."""

    def delta(self, text: str, *, is_end: bool) -> dict[str, Any]:
        return {"content": text} if text else {}

    def message(self, text: str) -> dict[str, Any]:
        return {"role": "assistant", "content": text, "refusal": None}

    def finish_reason(self, reason: str | None) -> str | None:
        return reason


def make_reply(form: ReplyForm | None) -> Reply:
    return PlainReply() if form is None else ReplyWriter(form)


class ReplyWriter:
    """A reply that has reasoning or calls beside its text."""

    def __init__(self, form: ReplyForm) -> None:
        self._form = form
        self._parser = form.make_parser()

    def delta(self, text: str, *, is_end: bool) -> dict[str, Any]:
        """What the client is told when this text has arrived; nothing where it is not certain what the text is."""
        delta: dict[str, Any] = {}
        for part in filter(self._form.shows, self._parser.feed(text) + (self._parser.finish() if is_end else [])):
            if part.kind == "text":
                delta["content"] = delta.get("content", "") + part.text
            elif part.kind == "reasoning":
                delta["reasoning_content"] = delta.get("reasoning_content", "") + part.text
            else:
                self._add_call(delta.setdefault("tool_calls", []), part.index, part.name, part.text)
        return delta

    def message(self, text: str) -> dict[str, Any]:
        """The whole reply."""
        found = self.delta(text, is_end=True)
        calls = [{key: call[key] for key in ("id", "type", "function")} for call in found.get("tool_calls", ())]
        message = {"role": "assistant", "content": found.get("content", None if calls else ""), "refusal": None}
        if "reasoning_content" in found:
            message["reasoning_content"] = found["reasoning_content"]
        return {**message, "tool_calls": calls} if calls else message

    def finish_reason(self, reason: str | None) -> str | None:
        return "tool_calls" if reason == "stop" and self._parser.num_calls else reason

    def _add_call(self, calls: list[dict[str, Any]], index: int, name: str | None, text: str) -> None:
        if name is not None:
            function = {"name": name, "arguments": text}
            calls.append({"index": index, "id": self._form.make_id(), "type": "function", "function": function})
        elif calls and calls[-1]["index"] == index:
            calls[-1]["function"]["arguments"] += text
        else:
            calls.append({"index": index, "function": {"arguments": text}})
