"""What /v1/messages takes: turns of content blocks, translated into a chat."""

from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from qserve.api.content import texts_of
from qserve.api.conversation import Conversation
from qserve.api.not_served import NOT_SERVED_IN_MESSAGES, NOT_SERVED_IN_TOKEN_COUNTS
from qserve.api.protocol import ChatRequest, Effort, validate
from qserve.api.sampling import SamplingRequest, Stops
from qserve.api.tools import FUNCTION_NAME
from qserve.api.wire import Wire
from qserve.errors import InvalidRequest

_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


class TextBlock(Wire):
    type: Literal["text"]
    text: str

    def add_to(self, chat: Conversation, role: str) -> None:
        _SAID_BY[role](chat, self.text)


class ThinkingBlock(Wire):
    """As an earlier answer held it."""

    type: Literal["thinking"]
    thinking: str

    def add_to(self, chat: Conversation, role: str) -> None:
        _check_role(self.type, role, "assistant")
        chat.think(self.thinking)


class ToolUseBlock(Wire):
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]

    def add_to(self, chat: Conversation, role: str) -> None:
        _check_role(self.type, role, "assistant")
        chat.call(self.id, self.name, self.input)


class ToolResultBlock(Wire):
    type: Literal["tool_result"]
    tool_use_id: str
    content: Annotated[str, texts_of("text")] = ""
    is_error: bool = False

    def add_to(self, chat: Conversation, role: str) -> None:
        _check_role(self.type, role, "user")
        chat.answer(self.tool_use_id, f"Error: {self.content}" if self.is_error else self.content)


_SAID_BY = {"user": Conversation.ask, "assistant": Conversation.say, "system": Conversation.instruct}


def _check_role(kind: str, role: str, expected: str) -> None:
    if role != expected:
        message = f"A block of type {kind} stands in a message of the {expected}, not of the {role}."
        raise InvalidRequest(message, param="messages")


def _kind_of_block(value: Any) -> str | None:
    kind = value.get("type") if isinstance(value, dict) else None
    return f"<{kind}>" if isinstance(kind, str) else None


ContentBlock: TypeAlias = Annotated[
    Annotated[TextBlock, Tag("<text>")]
    | Annotated[ThinkingBlock, Tag("<thinking>")]
    | Annotated[ToolUseBlock, Tag("<tool_use>")]
    | Annotated[ToolResultBlock, Tag("<tool_result>")],
    Discriminator(
        _kind_of_block,
        custom_error_type="unknown_block",
        custom_error_message="this model reads text alone: a block here is text, thinking, a tool_use or a tool_result",
    ),
]


def _as_blocks(value: Any) -> Any:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


class Turn(Wire):
    role: Literal["user", "assistant", "system"]
    content: Annotated[
        list[ContentBlock],
        Field(min_length=1),
        BeforeValidator(_as_blocks, json_schema_input_type=str | list[ContentBlock]),
    ]


class MessageTool(Wire):
    type: Literal["custom"] = "custom"
    name: str = Field(pattern=FUNCTION_NAME)
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool = False
    defer_loading: Literal[False] = False

    def for_chat(self) -> dict[str, Any]:
        function = {
            "name": self.name,
            "description": self.description,
            "parameters": self.input_schema,
            "strict": self.strict,
        }
        return {"type": "function", "function": function}


class MessageToolChoice(Wire):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool = False

    @model_validator(mode="after")
    def _check_name(self) -> Self:
        if self.type == "tool" and self.name is None:
            raise InvalidRequest("A tool_choice of type tool needs name.", param="tool_choice.name")
        if self.type != "tool":
            self.refuse("name", because=f"in a tool_choice of type {self.type}", param="tool_choice.")
        return self

    def for_chat(self) -> Any:
        return _CHOICES.get(self.type) or {"type": "function", "function": {"name": self.name}}


def _refuse_budget(kind: Any) -> Any:
    if kind == "enabled":
        raise ValueError("a budget for thinking is not supported; send adaptive, and thoughts count among max_tokens")
    return kind


class Thinking(Wire):
    """Without it, and when adaptive, the model thinks as its template has it. There is no budget of its own for it."""

    type: Annotated[Literal["adaptive", "disabled"], BeforeValidator(_refuse_budget)]
    display: Literal["summarized", "omitted"] = "summarized"  # it is never summarized, but shown as it is


class OutputFormat(Wire):
    type: Literal["json_schema"]
    wanted: dict[str, Any] = Field(alias="schema")


class OutputConfig(Wire):
    effort: Effort | None = None
    format: OutputFormat | None = None


class MessagePrompt(Wire):
    """What makes the prompt."""

    not_served = NOT_SERVED_IN_TOKEN_COUNTS

    model: str | None = None
    messages: list[Turn] = Field(min_length=1)
    system: Annotated[str | None, texts_of("text", optional=True)] = None
    tools: list[MessageTool] = Field([])
    tool_choice: MessageToolChoice = MessageToolChoice(type="auto")
    thinking: Thinking = Thinking(type="adaptive")
    output_config: OutputConfig = OutputConfig()
    chat_template_kwargs: dict[str, Any] = Field({})

    def as_chat(self) -> ChatRequest:
        """The same as a chat. A final message of the assistant is what the answer goes on with."""
        return validate(ChatRequest, self._chat_fields())

    def _chat_fields(self) -> dict[str, Any]:
        chat = Conversation()
        if self.system is not None:
            chat.instruct(self.system)
        for turn in self.messages:
            for block in turn.content:
                block.add_to(chat, turn.role)
        wanted = self.output_config.format
        return {
            "model": self.model,
            "messages": chat.messages,
            "continue_final_message": bool(chat.messages) and chat.messages[-1]["role"] == "assistant",
            "tools": [tool.for_chat() for tool in self.tools],
            "tool_choice": self.tool_choice.for_chat(),
            "parallel_tool_calls": not self.tool_choice.disable_parallel_tool_use,
            "reasoning_effort": "none" if self.thinking.type == "disabled" else self.output_config.effort,
            "include_reasoning": self.thinking.display != "omitted",
            "response_format": wanted and {"type": "json_schema", "json_schema": {"schema": wanted.wanted}},
            "chat_template_kwargs": self.chat_template_kwargs,
        }


class MessageRequest(MessagePrompt, SamplingRequest):
    not_served = NOT_SERVED_IN_MESSAGES

    max_tokens: int = Field(ge=1)
    stop_sequences: Stops = Field([])
    stream: bool = False

    def _chat_fields(self) -> dict[str, Any]:
        return {
            **super()._chat_fields(),
            **self.model_dump(include=set(SamplingRequest.model_fields)),
            "max_tokens": self.max_tokens,
            "stop": self.stop_sequences,
            "stream": self.stream,
        }
