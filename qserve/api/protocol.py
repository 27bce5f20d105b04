"""What clients may send: every field of every request, its type and its bounds. Past this module no JSON travels.

`null` means "not given". A field that nobody knows is ignored, and named in a response header. A field that OpenAI or
vLLM has and that is not served here is refused, unless its value asks for nothing.
"""

from dataclasses import replace
from typing import Annotated, Any, Literal, Self, TypeAlias, TypeVar

from pydantic import BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails, from_json

from qserve.api.content import texts_of
from qserve.api.not_served import (
    NOT_SERVED_IN_CHAT,
    NOT_SERVED_IN_COMPLETIONS,
    refuse_what_is_not_served,
)
from qserve.api.sampling import SamplingRequest, Stops
from qserve.api.structured import Rules, StructuredRequest
from qserve.api.tools import Tool, ToolRequest
from qserve.api.unknown import find_unknown
from qserve.api.wire import Wire
from qserve.engine.request import SamplingParams
from qserve.errors import InvalidRequest
from qserve.generation import GenerationOptions

_LONGEST_ECHO = 80
_MAX_PROMPTS = 1024


def _check_prompt(value: Any) -> Any:
    """OpenAI's four forms: a string, strings, token ids, lists of token ids; always returned as a list of prompts."""
    prompts = value if isinstance(value, list) and value and isinstance(value[0], str | list) else [value]
    if len(prompts) > _MAX_PROMPTS:
        raise ValueError(f"at most {_MAX_PROMPTS} prompts are taken, not {len(prompts)}")
    kind = type(prompts[0])
    for prompt in prompts:
        if type(prompt) is not kind or not (isinstance(prompt, str) or _is_id_list(prompt)):
            raise ValueError("expected a string, a list of strings, a list of token ids, or a list of such lists")
    return prompts


Prompts: TypeAlias = Annotated[
    list[str] | list[list[int]],
    BeforeValidator(_check_prompt, json_schema_input_type=str | list[str] | list[int] | list[list[int]]),
]


def _is_id_list(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int for item in value)


class StreamOptions(Wire):
    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: Literal[False] = False

    @model_validator(mode="after")
    def _check_running(self) -> Self:
        if not self.include_usage:
            self.refuse("continuous_usage_stats", because="without include_usage", param="stream_options.")
        return self


class GenerationRequest(SamplingRequest, StructuredRequest):
    """What completions and chat share."""

    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int = Field(1, ge=1, le=128)
    stop: Stops = Field([])
    include_stop_str_in_output: bool = False
    truncate_prompt_tokens: int | None = Field(None, ge=1)
    prompt_logprobs: int | None = Field(None, ge=0, le=20)
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False

    @model_validator(mode="after")
    def _check_streaming(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("stream_options needs stream to be true.", param="stream_options")
        if self.stream and self.prompt_logprobs is not None:
            raise InvalidRequest("prompt_logprobs cannot be streamed.", param="prompt_logprobs")
        return self

    def options(
        self,
        sampling: SamplingParams,
        rules: Rules,
        *,
        echo: bool = False,
        shown_ids: frozenset[int] = frozenset(),
    ) -> GenerationOptions:
        return GenerationOptions(
            sampling=replace(sampling, bad_words=rules.bad_words),
            stop=tuple(self.stop),
            include_stop=self.include_stop_str_in_output,
            ignore_eos=self.ignore_eos,
            skip_special_tokens=self.skip_special_tokens,
            shown_ids=shown_ids,
            echo=echo,
            priority=self.priority,
            grammar=rules.grammar,
        )


class CompletionRequest(GenerationRequest):
    not_served = NOT_SERVED_IN_COMPLETIONS

    prompt: Prompts
    max_tokens: int = Field(16, ge=0)
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=20)
    best_of: int | None = Field(None, ge=1, le=128)
    add_special_tokens: bool = True
    suffix: str = ""  # what the text is filled in before, where the model can

    @model_validator(mode="after")
    def _check_suffix(self) -> Self:
        if self.suffix and (self.echo or self.truncate_prompt_tokens is not None):
            raise InvalidRequest("suffix goes together with neither echo nor truncate_prompt_tokens.", param="suffix")
        return self

    @model_validator(mode="after")
    def _check_best_of(self) -> Self:
        if self.best_of is not None and self.best_of < self.n:
            raise InvalidRequest(f"best_of is {self.best_of}, less than n, {self.n}.", param="best_of")
        if self.best_of is not None and self.best_of > self.n and self.stream:
            raise InvalidRequest("best_of cannot be streamed: the best is known only at the end.", param="best_of")
        return self


def _read_arguments(value: Any) -> Any:
    """Templates want the arguments of earlier calls as objects; OpenAI's clients send them as text."""
    if not isinstance(value, str):
        return value
    try:
        return from_json(value, allow_inf_nan=False)
    except ValueError:
        return value  # a call that was cut short


class _CalledFunction(Wire):
    model_config = ConfigDict(strict=True, extra="allow", frozen=True)

    name: str
    arguments: Annotated[Any, BeforeValidator(_read_arguments)] = None


class _ToolCall(Wire):
    model_config = ConfigDict(strict=True, extra="allow", frozen=True)

    function: _CalledFunction


class ChatMessage(Wire):
    """A message; the template sees its other fields too (`name`, `tool_call_id`, ...)."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True)

    role: str = Field(min_length=1, max_length=100)
    content: Annotated[str | None, texts_of("text", optional=True)] = None
    tool_calls: list[_ToolCall] | None = None


Effort: TypeAlias = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class ChatRequest(ToolRequest, GenerationRequest):
    not_served = NOT_SERVED_IN_CHAT

    messages: list[ChatMessage] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=0)
    max_completion_tokens: int | None = Field(None, ge=0)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    add_generation_prompt: bool | None = None  # by default, unless the final message is to be continued
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] = Field({})
    reasoning_effort: Effort | None = None  # where the template can be told

    @model_validator(mode="after")
    def _check_chat(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequest("top_logprobs needs logprobs to be true.", param="top_logprobs")
        if self.continue_final_message and self.add_generation_prompt:
            message = "continue_final_message and add_generation_prompt cannot both be true."
            raise InvalidRequest(message, param="continue_final_message")
        return self

    @property
    def token_limit(self) -> int | None:
        """The newer name of the two goes first."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class TokenizeRequest(Wire):
    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] = Field([])
    add_special_tokens: bool | None = None  # by default with a prompt
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] = Field({})
    tools: list[Tool] = Field([])
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _check_one(self) -> Self:
        if (self.prompt is None) == (not self.messages):
            raise InvalidRequest("Send either prompt or messages.", param="prompt")
        if self.prompt is None and self.add_special_tokens:
            self.refuse("add_special_tokens", because="on messages, whose template writes them")
        if self.prompt is not None:
            self.refuse(
                *("add_generation_prompt", "continue_final_message", "chat_template_kwargs", "tools"),
                because="on a prompt, which no template sees",
            )
        if self.continue_final_message and self.add_generation_prompt:
            self.refuse("add_generation_prompt", because="beside continue_final_message")
        return self


class DetokenizeRequest(Wire):
    model: str | None = None
    tokens: list[int]
    skip_special_tokens: bool = False


T = TypeVar("T", bound=Wire)


def parse(kind: type[T], body: bytes) -> tuple[T, list[str]]:
    """A request of that kind from a body, and the names of the fields that nobody knows."""
    try:
        fields = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise InvalidRequest(f"The body is not valid JSON: {error}") from error
    if not isinstance(fields, dict):
        raise InvalidRequest(f"The body must be a JSON object, not {type(fields).__name__}.")
    refuse_what_is_not_served(fields, kind.not_served)
    return validate(kind, fields), sorted(find_unknown(kind, fields))


def validate(kind: type[T], fields: dict[str, Any]) -> T:
    """A request of that kind from its fields; raises InvalidRequest for the first that is not as it should be."""
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise _as_invalid_request(error.errors(include_url=False)[0]) from error


def _as_invalid_request(details: ErrorDetails) -> InvalidRequest:
    """pydantic's first complaint in one line, with the field's name as OpenAI writes it: messages[0].content."""
    path = [step for step in details["loc"] if not str(step).startswith(("function-", "list[", "dict[", "<"))]
    param = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path).lstrip(".")
    message = details["msg"].removeprefix("Value error, ")
    if details["type"] == "missing":
        return InvalidRequest(f"{param} is required.", param=param)
    return InvalidRequest(f"{param}: {message} (it was {_echo(details['input'])})", param=param)


def _echo(value: Any) -> str:
    """What was sent, cut short: a large body must not come back as a larger one."""
    if isinstance(value, list | dict):
        return f"{'a list' if isinstance(value, list) else 'an object'} of {len(value)}"
    text = repr(value[:_LONGEST_ECHO] if isinstance(value, str) else value)
    return text if len(text) <= _LONGEST_ECHO else text[:_LONGEST_ECHO] + "..."
