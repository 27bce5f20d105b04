"""docs/api.md, written from the requests' own models: `python -m qserve.api.document > docs/api.md`."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qserve.api.endpoints import ENDPOINTS, Endpoint
from qserve.api.not_served import BOOKKEEPING
from qserve.api.openapi import kinds_of, objects_of, request_schemas

_HEAD = """\
# The API

This file is written by `python -m qserve.api.document` from the models that requests are checked with, and a test says
when it is out of date. The same is served as `/openapi.json`.

`null` means "not given", for every field. A field with a wrong type or out of range is a 400 that names it. A field
that nobody knows is ignored and named in the header `x-qserve-ignored-fields`. A field that other servers have and this
one has not is refused, unless its value asks for nothing: none is accepted without effect.
"""
_BOUNDS = (
    ("minimum", "at least"),
    ("exclusiveMinimum", "more than"),
    ("maximum", "at most"),
    ("exclusiveMaximum", "less than"),
)


def document() -> str:
    """The whole file."""
    asked = [endpoint for endpoint in ENDPOINTS if endpoint.operation.body is not None]
    parts = [_HEAD, "## What is served\n", *_endpoints(), "\n## Which endpoint takes what\n", *_matrix(asked)]
    for endpoint in asked:
        parts += ["", f"## {endpoint.method} {endpoint.path}\n", *_details(endpoint)]
    return "\n".join(parts) + "\n"


def _endpoints() -> Iterator[str]:
    yield from _table(
        ("path", "what it does"),
        [
            (" ".join(f"`{path}`" for path in (f"{each.method} {each.path}", *each.also)), each.operation.title)
            for each in ENDPOINTS
        ],
    )


def _matrix(asked: Sequence[Endpoint]) -> Iterator[str]:
    yield "`x` is served; `refused` unless it asks for nothing; `-` is not known there.\n"
    names = sorted({name for endpoint in asked for name in _fields(endpoint)})
    columns = [endpoint.path.removeprefix("/v1") for endpoint in asked]
    rows = [(f"`{name}`", *(_standing(endpoint, name) for endpoint in asked)) for name in names]
    yield from _table(("parameter", *columns), rows)
    yield ""
    names = sorted(BOOKKEEPING)
    yield f"Everywhere taken, for no answer could depend on them: {', '.join(f'`{name}`' for name in names)}."


def _fields(endpoint: Endpoint) -> set[str]:
    body = endpoint.operation.body
    assert body is not None
    return body.model_fields.keys() | body.not_served.keys()


def _standing(endpoint: Endpoint, name: str) -> str:
    body = endpoint.operation.body
    assert body is not None
    return "x" if name in body.model_fields else "refused" if name in body.not_served else "-"


def _details(endpoint: Endpoint) -> Iterator[str]:
    operation = endpoint.operation
    assert operation.body is not None
    if operation.about:
        yield operation.about + "\n"
    schemas = request_schemas(operation.body)
    own = schemas[operation.body.__name__]
    served = {name: field for name, field in own["properties"].items() if name not in operation.body.not_served}
    rows = list(_rows({**own, "properties": served}, schemas))
    yield from _table(("parameter", "takes", "default"), rows)


def _rows(
    schema: Mapping[str, Any], schemas: Mapping[str, Any], *, path: str = "", note: str = ""
) -> Iterator[tuple[str, str, str]]:
    """A row for each field, and behind it those of the objects that it takes: `tools[].function.name`.

    `note` tells of which object a field is, where there are several in one place.
    """
    required = schema.get("required", ())
    for name, field in schema["properties"].items():
        yield f"`{path}{name}`{note}", _words(field), "required" if name in required else _default(field)
        inner = list(objects_of(field))
        for brackets, kind in inner:
            inner_note = f" of {kind.lstrip('_')}" if len(inner) > 1 else note
            yield from _rows(schemas[kind], schemas, path=f"{path}{name}{brackets}.", note=inner_note)


def _words(field: Mapping[str, Any]) -> str:
    return " or ".join(dict.fromkeys(map(_kind, kinds_of(field)))) or "`null`"


def _kind(kind: Mapping[str, Any]) -> str:
    if "$ref" in kind:
        (_, name), *_ = objects_of(kind)
        return f"{name.lstrip('_')} object"
    if "enum" in kind or "const" in kind:
        return ", ".join(f"`{json.dumps(value)}`" for value in kind.get("enum", [kind.get("const")]))
    if "anyOf" in kind or "oneOf" in kind:
        return _words(kind)
    name = {"array": "list"}.get(kind.get("type", ""), kind.get("type", "anything"))
    if kind.get("items"):
        name = f"list of ({_words(kind['items'])})"
    bounds = [f"{word} {kind[key]:,}" for key, word in _BOUNDS if key in kind]
    return ", ".join([name, *bounds])


def _default(field: Mapping[str, Any]) -> str:
    value = field.get("default")
    if isinstance(value, dict):
        value = {name: item for name, item in value.items() if item not in (None, [])}
    return "" if value is None else f"`{json.dumps(value)}`"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    for row in (head, ["---"] * len(head), *rows):
        yield f"| {' | '.join(row)} |"


if __name__ == "__main__":
    print(document(), end="")
