"""Chat templates: messages to the one string that the model was trained on.

Templates are code from strangers: they run in Jinja's immutable sandbox and see plain JSON values only. The
environment is the one that transformers gives templates, so that the same template writes the same string.
"""

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from qserve.errors import BrokenCheckpoint, InvalidRequest, UsageError
from qserve.text.tokenizer import SpecialTokens

Message = Mapping[str, Any]
_LONGEST_QUOTE = 500
# Written after the text to be continued, with a space behind it, and cut off with all that the template put there. When
# the space is gone the template trims messages, and so it would have trimmed the text before the mark.
_CONTINUE_HERE = "|continue-final-message|"


class ChatTemplate:
    """The templates of one model: a default one, and perhaps others by name (`tool_use`, `rag`)."""

    def __init__(self, sources: Mapping[str, str], special: SpecialTokens) -> None:
        environment = _make_environment()
        self.source = sources["default"]
        self.tool_source = sources.get("tool_use", self.source)  # the one that is used when there are tools
        self._templates = {name: _compile(environment, source) for name, source in sources.items()}
        roles = {"bos_token": special.bos, "eos_token": special.eos, "pad_token": special.pad}
        self._variables = {name: token for name, token in roles.items() if token is not None}

    @property
    def takes_tools(self) -> bool:
        """Whether tools that are given to it stand in the prompt."""
        return _names(self.tool_source, "tools")

    def takes(self, variable: str) -> bool:
        """Whether it makes a difference to the prompt what this variable is."""
        return _names(self.source, variable)

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt's text, special tokens written out in it: encode it without adding any."""
        template = self._templates.get("tool_use" if tools else "default", self._templates["default"])
        values = {**self._variables, "documents": None, **(variables or {}), "tools": tools}
        values["messages"] = _mark_end(messages) if continue_final_message else list(messages)
        values["add_generation_prompt"] = add_generation_prompt
        try:
            text = template.render(**values)
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError, ArithmeticError) as error:
            quote = str(error)[:_LONGEST_QUOTE] or type(error).__name__
            raise InvalidRequest(
                f"The model's chat template refuses these messages: {quote}", param="messages"
            ) from error
        return _cut_at_mark(text) if continue_final_message else text


def load_chat_template(directory: Path, special: SpecialTokens, *, file: str = "") -> ChatTemplate | None:
    """The template of a checkpoint: chat_template.jinja before what tokenizer_config.json holds; None without one.

    A file that is named takes the place of all of them.
    """
    if file:
        return ChatTemplate({"default": _read_given(file)}, special)
    sources = _read_sources(directory)
    if "default" not in sources:
        return None
    return ChatTemplate(sources, special)


def _read_sources(directory: Path) -> dict[str, str]:
    sources: dict[str, str] = {}
    settings = directory / "tokenizer_config.json"
    if settings.is_file():
        held = json.loads(settings.read_text(encoding="utf-8")).get("chat_template")
        if isinstance(held, str):
            sources["default"] = held
        elif isinstance(held, list):
            sources |= {entry["name"]: entry["template"] for entry in held}
    for path in sorted((directory / "additional_chat_templates").glob("*.jinja")):
        sources[path.stem] = path.read_text(encoding="utf-8")
    if (directory / "chat_template.jinja").is_file():
        sources["default"] = (directory / "chat_template.jinja").read_text(encoding="utf-8")
    return sources


def _names(source: str, variable: str) -> bool:
    return re.search(rf"\b{variable}\b", source) is not None


def _read_given(file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"The file of --chat-template, {file}, cannot be read: {error}.") from error


def _mark_end(messages: Sequence[Message]) -> list[Message]:
    """The messages with the mark behind the last one's text."""
    *earlier, last = messages
    content = last.get("content")
    if isinstance(content, str):
        return [*earlier, {**last, "content": content + _CONTINUE_HERE + " "}]
    if isinstance(content, list) and content and isinstance(content[-1].get("text"), str):
        final = {**content[-1], "text": content[-1]["text"] + _CONTINUE_HERE + " "}
        return [*earlier, {**last, "content": [*content[:-1], final]}]
    raise InvalidRequest("The final message has no text that could be continued.", param="continue_final_message")


def _cut_at_mark(text: str) -> str:
    position = text.rfind(_CONTINUE_HERE)
    if position < 0:
        raise InvalidRequest(
            "The model's chat template changes the end of the final message, so it cannot be continued.",
            param="continue_final_message",
        )
    mark_is_whole = text.startswith(_CONTINUE_HERE + " ", position)
    return text[:position] if mark_is_whole else text[:position].rstrip()


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}` marks what the assistant said, for training; in a prompt its body is plain text."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own declaration

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return list(parser.parse_statements(("name:endgeneration",), drop_needle=True))


class _Dict:
    """`dict` for templates, without the class's attributes."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def _make_environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now, "dict": _Dict()}
    return environment


def _compile(environment: jinja2.Environment, source: str) -> jinja2.Template:
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as error:
        raise BrokenCheckpoint(f"The model's chat template is not valid Jinja: {error}") from error


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes HTML, which no model was trained on."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
