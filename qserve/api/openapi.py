"""The OpenAPI document, made from the requests' own models so that it says what is taken and nothing else."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from qserve import __version__
from qserve.api.not_served import Neutral
from qserve.api.wire import Wire

_SCHEMAS = "#/components/schemas/"
_JSON = "application/json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """What an endpoint does: its request, if it has one, and the fields that its answer always has.

    An answer of None is text.
    """

    title: str
    answer: tuple[str, ...] | None
    about: str = ""
    body: type[Wire] | None = None
    can_stream: bool = False


def describe_api(operations: Mapping[str, Operation]) -> dict[str, Any]:
    """The document, from each path's operation."""
    schemas: dict[str, Any] = {"Error": _error_schema()}
    paths = {}
    for path, operation in operations.items():
        method = "get" if operation.body is None else "post"
        paths[path] = {method: _describe(path, operation)}
        if operation.body is not None:
            schemas |= request_schemas(operation.body)
    return {
        "openapi": "3.1.0",
        "info": {"title": "qserve", "version": __version__, "license": {"name": "Apache-2.0"}},
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def request_schemas(body: type[Wire]) -> dict[str, Any]:
    """A request's schema and all that it refers to, by name. `null` is "not given" in every field."""
    own = body.model_json_schema(ref_template=_SCHEMAS + "{model}", mode="validation")
    inner = own.pop("$defs", {})
    own["properties"] |= {name: _neutral_schema(values) for name, values in body.not_served.items()}
    return {body.__name__: _with_nulls(own), **{name: _with_nulls(schema) for name, schema in inner.items()}}


def _describe(path: str, operation: Operation) -> dict[str, Any]:
    described: dict[str, Any] = {
        "operationId": path.strip("/").replace("/", "_").replace(".", "_").replace("{", "").replace("}", ""),
        "summary": operation.title,
        "responses": {
            "200": {"description": "The answer", "content": _answer(operation)},
            "default": {"description": "An error", "content": {_JSON: {"schema": {"$ref": _SCHEMAS + "Error"}}}},
        },
    }
    if operation.about:
        described["description"] = operation.about
    if "{name}" in path:
        described["parameters"] = [{"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}]
    if operation.body is not None:
        schema = {"$ref": _SCHEMAS + operation.body.__name__}
        described["requestBody"] = {"required": True, "content": {_JSON: {"schema": schema}}}
    return described


def _answer(operation: Operation) -> dict[str, Any]:
    if operation.answer is None:
        return {"text/plain": {"schema": {"type": "string"}}}
    content: dict[str, Any] = {_JSON: {"schema": {"type": "object", "required": list(operation.answer)}}}
    if operation.can_stream:
        content["text/event-stream"] = {"schema": {"type": "string"}}
    return content


def _error_schema() -> dict[str, Any]:
    optional = {"type": ["string", "null"]}
    fields = {"message": {"type": "string"}, "type": {"type": "string"}, "param": optional, "code": optional}
    error = {"type": "object", "required": list(fields), "properties": fields}
    return {"type": "object", "required": ["error"], "properties": {"error": error}}


def _neutral_schema(values: Neutral) -> dict[str, Any]:
    """A field that is not served may only say so."""
    return {"enum": [*values, None], "description": "Not served: only what asks for nothing is taken."}


def _with_nulls(schema: dict[str, Any]) -> dict[str, Any]:
    required = schema.get("required", ())
    fields = {
        name: field if name in required else _nullable(field) for name, field in schema.get("properties", {}).items()
    }
    return {**schema, "properties": fields} if fields else schema


def _nullable(field: dict[str, Any]) -> dict[str, Any]:
    if any(kind.get("type") == "null" for kind in (field, *field.get("anyOf", ()))) or None in field.get("enum", ()):
        return field
    about: dict[str, Any] = {key: field[key] for key in ("title", "description", "default") if key in field}
    rest = {key: value for key, value in field.items() if key not in about}
    kinds = rest["anyOf"] if set(rest) == {"anyOf"} else [rest] if rest else []
    return {**about, "anyOf": [*kinds, {"type": "null"}]} if kinds else field


def kinds_of(field: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The alternatives of a field, but for null."""
    for kind in field.get("anyOf") or field.get("oneOf") or (field,):
        if kind.get("type") != "null":
            yield kind


def objects_of(field: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The names of the objects that a field takes, behind as many brackets as they stand in lists."""
    for kind in kinds_of(field):
        if "$ref" in kind:
            yield "", kind["$ref"].removeprefix(_SCHEMAS)
        for brackets, name in objects_of(kind["items"]) if kind.get("items") else ():
            yield f"[]{brackets}", name
