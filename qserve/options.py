"""The command line made from config dataclasses: a flag for every field, its help from the field.

A flag goes before the environment (QSERVE_ and the field's name), the environment before the default.
"""

import argparse
import dataclasses
import os
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, get_type_hints

from qserve.errors import UsageError

C = TypeVar("C")
_TRUE, _FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off")


def add_options(parser: argparse.ArgumentParser, config: type[Any]) -> None:
    """A flag for every field of the dataclass, in a group named by its docstring. A flag that is not given is None."""
    group = parser.add_argument_group((config.__doc__ or "").partition("\n")[0].rstrip("."))
    types = get_type_hints(config)
    for field in dataclasses.fields(config):
        help_text = f"{field.metadata['help']} ({_show_default(field.default)}env {_variable(field.name)})"
        flag = "--" + field.name.replace("_", "-")
        if types[field.name] is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, help=help_text)
        elif types[field.name] == tuple[str, ...]:
            group.add_argument(flag, action="append", metavar="TEXT", help=help_text)
        else:
            choices = field.metadata.get("choices")
            metavar = None if choices else types[field.name].__name__.upper()
            group.add_argument(flag, type=types[field.name], choices=choices, metavar=metavar, help=help_text)


def read_options(arguments: argparse.Namespace, config: type[C], *, environment: Mapping[str, str] = os.environ) -> C:
    """The dataclass that the flags, the environment and the defaults make together."""
    types = get_type_hints(config)
    values = {}
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        given = getattr(arguments, field.name)
        text = environment.get(_variable(field.name))
        if given is not None:
            values[field.name] = tuple(given) if isinstance(given, list) else given
        elif text is not None:
            values[field.name] = _parse(text, types[field.name], field)
    return config(**values)


def _variable(name: str) -> str:
    return "QSERVE_" + name.upper()


def _show_default(default: object) -> str:
    return "" if default in ("", ()) else f"default {default}, "


def _parse(text: str, kind: Any, field: "dataclasses.Field[Any]") -> Any:
    parse: Callable[[str], Any] = _PARSERS.get(kind, kind)
    choices = field.metadata.get("choices")
    try:
        value = parse(text)
    except ValueError as error:
        raise UsageError(f"{_variable(field.name)} is {text!r}: expected {kind.__name__}.") from error
    if choices and value not in choices:
        raise UsageError(f"{_variable(field.name)} is {text!r}: expected one of {', '.join(choices)}.")
    return value


def _parse_bool(text: str) -> bool:
    if text.lower() in _TRUE:
        return True
    if text.lower() in _FALSE:
        return False
    raise ValueError(text)


def _parse_texts(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


_PARSERS: dict[Any, Callable[[str], Any]] = {bool: _parse_bool, tuple[str, ...]: _parse_texts}
