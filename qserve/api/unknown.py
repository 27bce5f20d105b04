"""Fields of a request that nobody knows, wherever in it they stand: they are ignored, and the client is told which."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from qserve.api.not_served import BOOKKEEPING
from qserve.api.openapi import objects_of, request_schemas
from qserve.api.wire import Wire


@dataclass(frozen=True, slots=True, kw_only=True)
class _Known:
    """What an object may have: its fields, with what those that are objects may have."""

    fields: Mapping[str, "_Known | None"]
    takes_others: bool


def find_unknown(body: type[Wire], fields: Mapping[str, Any]) -> Iterator[str]:
    """The names of a valid request's unknown fields: `model`, `stream_options.include_usage`, `tools[0].strict`."""
    return _find(fields, _known(body), "")


def _find(value: Any, known: _Known, path: str) -> Iterator[str]:
    if isinstance(value, list):
        for number, item in enumerate(value):
            yield from _find(item, known, f"{path}[{number}]")
    elif isinstance(value, dict):
        for name, item in value.items():
            place = f"{path}.{name}" if path else name
            inner = known.fields.get(name)
            if inner is not None:
                yield from _find(item, inner, place)
            elif not known.takes_others and name not in known.fields and name not in BOOKKEEPING:
                yield place


@cache
def _known(body: type[Wire]) -> _Known:
    schemas = request_schemas(body)
    return _read([body.__name__], schemas)


def _read(names: list[str], schemas: Mapping[str, Any]) -> _Known:
    """Of several objects that may stand in one place, what any of them may have."""
    found = [schemas[name] for name in names]
    fields = {name: field for schema in found for name, field in schema["properties"].items()}
    inner = {name: [kind for _, kind in objects_of(field)] for name, field in fields.items()}
    return _Known(
        fields={name: _read(kinds, schemas) if kinds else None for name, kinds in inner.items()},
        takes_others=any(schema.get("additionalProperties") for schema in found),
    )
