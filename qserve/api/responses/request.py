"""What /v1/responses takes: items in place of messages, translated into a chat."""

from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from qserve.api.content import texts_of
from qserve.api.conversation import Conversation
from qserve.api.not_served import NOT_SERVED_IN_RESPONSES
from qserve.api.protocol import ChatRequest, Effort, validate
from qserve.api.sampling import SamplingRequest, Stops
from qserve.api.tools import Function
from qserve.api.wire import Wire
from qserve.errors import InvalidRequest

_LOGPROBS = "message.output_text.logprobs"
_SAID_BY = {
    "user": Conversation.ask,
    "assistant": Conversation.say,
    "system": Conversation.instruct,
    "developer": Conversation.instruct,
}


class MessageItem(Wire):
    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Annotated[str, texts_of("input_text", "output_text", "text")]

    def add_to(self, chat: Conversation) -> None:
        _SAID_BY[self.role](chat, self.content)


class CallItem(Wire):
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str

    def add_to(self, chat: Conversation) -> None:
        chat.call(self.call_id, self.name, self.arguments)


class CallOutputItem(Wire):
    type: Literal["function_call_output"]
    call_id: str
    output: Annotated[str, texts_of("input_text", "output_text", "text")]

    def add_to(self, chat: Conversation) -> None:
        chat.answer(self.call_id, self.output)


class ReasoningItem(Wire):
    """As an earlier answer held it."""

    type: Literal["reasoning"]
    content: Annotated[str, texts_of("reasoning_text")] = ""
    encrypted_content: None = None  # none is ever made here

    def add_to(self, chat: Conversation) -> None:
        if self.content:
            chat.think(self.content)


def _kind_of_item(value: Any) -> str | None:
    kind = value.get("type", "message") if isinstance(value, dict) else None
    return f"<{kind}>" if isinstance(kind, str) else None


Item: TypeAlias = Annotated[
    Annotated[MessageItem, Tag("<message>")]
    | Annotated[CallItem, Tag("<function_call>")]
    | Annotated[CallOutputItem, Tag("<function_call_output>")]
    | Annotated[ReasoningItem, Tag("<reasoning>")],
    Discriminator(
        _kind_of_item,
        custom_error_type="unknown_item",
        custom_error_message="an item here is a message, a function_call, a function_call_output or a reasoning",
    ),
]


def _as_items(value: Any) -> Any:
    return [{"type": "message", "role": "user", "content": value}] if isinstance(value, str) else value


class FunctionTool(Function):
    type: Literal["function"]
    defer_loading: Literal[False] = False

    @model_validator(mode="before")
    @classmethod
    def _check_type(cls, value: Any) -> Any:
        """First of all, for other tools have other fields."""
        if isinstance(value, dict) and value.get("type") != "function":
            raise ValueError(f"only tools of type function are served, not {str(value.get('type'))[:80]!r}")
        return value

    def for_chat(self) -> dict[str, Any]:
        function = self.model_dump(exclude_unset=True, exclude={"type", "defer_loading"})
        return {"type": "function", "function": function}


class AllowedTool(Wire):
    type: Literal["function"]
    name: str


class ToolChoice(Wire):
    """A word stands for the type alone."""

    type: Literal["none", "auto", "required", "function", "allowed_tools"]
    name: str | None = None
    mode: Literal["auto", "required"] | None = None
    tools: list[AllowedTool] = Field(default=[])

    @model_validator(mode="after")
    def _check_parts(self) -> Self:
        if self.type == "function" and self.name is None:
            raise InvalidRequest("A tool_choice of type function needs name.", param="tool_choice.name")
        if self.type == "allowed_tools" and (self.mode is None or not self.tools):
            raise InvalidRequest("A tool_choice of type allowed_tools needs mode and tools.", param="tool_choice")
        others = {"function": ("mode", "tools"), "allowed_tools": ("name",)}.get(self.type, ("name", "mode", "tools"))
        self.refuse(*others, because=f"in a tool_choice of type {self.type}", param="tool_choice.")
        return self

    def for_chat(self) -> Any:
        if self.type == "function":
            return {"type": "function", "function": {"name": self.name}}
        return self.mode if self.type == "allowed_tools" else self.type

    def as_sent(self) -> Any:
        return self.type if self.type in ("none", "auto", "required") else self.model_dump(exclude_unset=True)


def _as_choice(value: Any) -> Any:
    return {"type": value} if isinstance(value, str) else value


class TextFormat(Wire):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    strict: bool | None = None  # the answer is always under the schema
    wanted: dict[str, Any] | None = Field(default=None, alias="schema")

    def for_chat(self) -> dict[str, Any]:
        if self.type != "json_schema":
            return {"type": self.type}
        if self.wanted is None:
            raise InvalidRequest("A format of type json_schema needs schema.", param="text.format.schema")
        return {"type": "json_schema", "json_schema": {"schema": self.wanted}}


class TextConfig(Wire):
    format: TextFormat = TextFormat(type="text")
    verbosity: Literal["medium"] = "medium"


class Reasoning(Wire):
    """A summary is never made: reasoning comes as it is."""

    effort: Effort | None = None
    summary: Literal["auto"] | None = None
    generate_summary: Literal["auto"] | None = None
    context: Literal["auto"] | None = None
    mode: Literal["standard"] | None = None


class ResponseRequest(SamplingRequest):
    not_served = NOT_SERVED_IN_RESPONSES

    input: Annotated[
        list[Item], Field(min_length=1), BeforeValidator(_as_items, json_schema_input_type=str | list[Item])
    ]
    instructions: str | None = None
    stream: bool = False
    max_output_tokens: int | None = Field(None, ge=1)
    stop: Stops = Field([])
    text: TextConfig = TextConfig()
    reasoning: Reasoning = Reasoning()
    tools: list[FunctionTool] = Field([])
    tool_choice: Annotated[
        ToolChoice,
        BeforeValidator(_as_choice, json_schema_input_type=Literal["none", "auto", "required"] | ToolChoice),
    ] = ToolChoice(type="auto")
    parallel_tool_calls: bool = True
    include: list[Literal["message.output_text.logprobs"]] = Field([])
    top_logprobs: int | None = Field(None, ge=0, le=20)
    metadata: dict[str, str] = Field({})
    chat_template_kwargs: dict[str, Any] = Field({})

    @model_validator(mode="after")
    def _check_logprobs(self) -> Self:
        if self.top_logprobs and not self.with_logprobs:
            raise InvalidRequest(f"top_logprobs needs include to have {_LOGPROBS!r}.", param="top_logprobs")
        return self

    @property
    def with_logprobs(self) -> bool:
        return _LOGPROBS in self.include

    def as_chat(self) -> ChatRequest:
        """The same as a chat."""
        chat = Conversation()
        if self.instructions is not None:
            chat.instruct(self.instructions)
        for item in self.input:
            item.add_to(chat)
        asked = {
            "model": self.model,
            "messages": chat.messages,
            "stream": self.stream,
            "max_tokens": self.max_output_tokens,
            "stop": self.stop,
            "response_format": self.text.format.for_chat(),
            "reasoning_effort": self.reasoning.effort,
            "tools": [tool.for_chat() for tool in self._allowed],
            "tool_choice": self.tool_choice.for_chat(),
            "parallel_tool_calls": self.parallel_tool_calls,
            "logprobs": self.with_logprobs,
            "top_logprobs": self.top_logprobs if self.with_logprobs else None,
            "chat_template_kwargs": self.chat_template_kwargs,
        }
        return validate(ChatRequest, {**self.model_dump(include=set(SamplingRequest.model_fields)), **asked})

    @property
    def _allowed(self) -> list[FunctionTool]:
        """The tools that may be called: those that stand in the prompt."""
        if self.tool_choice.type != "allowed_tools":
            return self.tools
        names = {tool.name for tool in self.tool_choice.tools}
        missing = names - {tool.name for tool in self.tools}
        if missing:
            message = f"tool_choice allows {min(missing)[:80]!r}, which is not among the tools."
            raise InvalidRequest(message, param="tool_choice")
        return [tool for tool in self.tools if tool.name in names]
