"""Content that is sent in parts, as one text: models that read text see it as if it had been sent so."""

from functools import partial
from typing import Any

from pydantic import BeforeValidator

from qserve.api.wire import Wire

_LONGEST_ECHO = 80


class TextPart(Wire):
    type: str
    text: str = ""


def texts_of(*kinds: str, optional: bool = False) -> BeforeValidator:
    """For a field that takes a string, or a list of parts of these types, and holds a string."""
    sent = str | list[TextPart] | None if optional else str | list[TextPart]
    return BeforeValidator(partial(_join, kinds=kinds), json_schema_input_type=sent)


def _join(value: Any, *, kinds: tuple[str, ...]) -> Any:
    if not isinstance(value, list):
        return value
    return "\n".join(_read(part, kinds=kinds) for part in value)


def _read(part: Any, *, kinds: tuple[str, ...]) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    text = part.get("text", "") if isinstance(part, dict) else None
    if not isinstance(kind, str) or not isinstance(text, str):
        raise ValueError(f'expected a string, or parts like {{"type": "{kinds[0]}", "text": "..."}}')
    if kind not in kinds:
        raise ValueError(f"this model reads text alone: a content part of type {kind[:_LONGEST_ECHO]!r} was sent")
    return text
