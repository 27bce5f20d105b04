"""The command line made from config dataclasses: a flag for every field, its help from the field.

A flag goes before the environment (QSERVE_ and the field's name), the environment before the file (TOML, the same
names), the file before the default. Knows nothing of what the options mean.
"""

import argparse
import dataclasses
import difflib
import os
import tomllib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar, get_type_hints

from qserve.errors import UsageError

C = TypeVar("C")
_TRUE, _FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off")
_TEXTS = tuple[str, ...]
_KIND_NAMES: dict[Any, str] = {_TEXTS: "list of str"}
PRECEDENCE = """\
Every option can also be set by an environment variable, or in a file: --config FILE, TOML, lines such as
`max-running = 8`. A flag goes before the environment, that before the file, and that before the default."""


def add_options(parser: argparse.ArgumentParser, config: type[Any]) -> None:
    """A flag for every field of the dataclass, in a group named by its docstring. A flag that is not given is None."""
    group = parser.add_argument_group((config.__doc__ or "").partition("\n")[0].rstrip("."))
    types = get_type_hints(config)
    for field in dataclasses.fields(config):
        help_text = f"{field.metadata['help']} ({_show_default(field.default)}env {_variable(field.name)})"
        flag = _flag(field.name)
        if types[field.name] is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, help=help_text)
        elif types[field.name] == _TEXTS:
            group.add_argument(flag, action="append", metavar="TEXT", help=help_text)
        else:
            choices = field.metadata.get("choices")
            metavar = None if choices else types[field.name].__name__.upper()
            group.add_argument(flag, type=types[field.name], choices=choices, metavar=metavar, help=help_text)


def add_file_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="FILE", help="TOML file with options (env QSERVE_CONFIG)")


def read_file(
    arguments: argparse.Namespace, configs: Iterable[type[Any]], *, environment: Mapping[str, str] = os.environ
) -> Mapping[str, object]:
    """What the file of `--config` sets, if there is one. A key that none of the dataclasses has is refused."""
    path = arguments.config or environment.get("QSERVE_CONFIG")
    if not path:
        return {}
    try:
        with open(path, "rb") as file:
            found = {key.replace("-", "_"): value for key, value in tomllib.load(file).items()}
    except OSError as error:
        raise UsageError(f"The config file {path} cannot be read: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"The config file {path} is not TOML: {error}.") from error
    known = [field.name for config in configs for field in dataclasses.fields(config)]
    for name in found.keys() - set(known):
        raise UsageError(f"The config file {path} sets {name!r}, which is no option.{_suggest(name, known)}")
    return found


def read_options(
    arguments: argparse.Namespace,
    config: type[C],
    *,
    environment: Mapping[str, str] = os.environ,
    file: Mapping[str, object] | None = None,
) -> C:
    """The dataclass that the flags, the environment, the file and the defaults make together."""
    types = get_type_hints(config)
    values = {}
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        name, kind = field.name, types[field.name]
        flag, text = getattr(arguments, name), environment.get(_variable(name))
        if flag is not None:
            values[name] = _check(tuple(flag) if kind == _TEXTS else flag, kind, field, where=_flag(name))
        elif text is not None and not _is_service_link(text):
            values[name] = _check(_parse(text, kind, name), kind, field, where=_variable(name))
        elif file is not None and name in file:
            values[name] = _check(_from_file(file[name], kind), kind, field, where=f"{name} in the config file")
    return config(**values)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _variable(name: str) -> str:
    return "QSERVE_" + name.upper()


def _is_service_link(text: str) -> bool:
    """Kubernetes sets QSERVE_PORT=tcp://... beside a service that is named qserve; it is not meant for us."""
    return text.startswith("tcp://")


def _show_default(default: object) -> str:
    return "" if default in ("", ()) else f"default {default}, "


def _suggest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f" Did you mean {close[0]!r}?" if close else " `qserve serve --help` lists them."


def _check(value: Any, kind: Any, field: "dataclasses.Field[Any]", *, where: str) -> Any:
    """The value, if it is of that type and among those that the field may have."""
    if type(value) is not kind and not (kind == _TEXTS and _is_texts(value)):
        raise UsageError(f"{where} is {value!r}: expected {_kind_name(kind)}.")
    choices = field.metadata.get("choices")
    if choices and value not in choices:
        raise UsageError(f"{where} is {value!r}: expected one of {', '.join(choices)}.")
    least, most = field.metadata.get("least"), field.metadata.get("most")
    # Written so that a NaN fails.
    if (least is not None and not value >= least) or (most is not None and not value <= most):
        bounds = f"{least} or more" if most is None else f"{least} to {most}"
        raise UsageError(f"{where} is {value}: expected {bounds}.")
    return value


def _is_texts(value: object) -> bool:
    return isinstance(value, tuple) and all(isinstance(item, str) for item in value)


def _kind_name(kind: Any) -> str:
    return _KIND_NAMES.get(kind) or str(kind.__name__)


def _from_file(value: object, kind: Any) -> object:
    """TOML knows types; what is left is a whole number for a float, and one text for a list of one."""
    if kind is float and type(value) is int:
        return float(value)
    if kind == _TEXTS:
        return tuple(value) if isinstance(value, list) else (value,)
    return value


def _parse(text: str, kind: Any, name: str) -> Any:
    parse: Callable[[str], Any] = _PARSERS.get(kind, kind)
    try:
        return parse(text)
    except ValueError as error:
        raise UsageError(f"{_variable(name)} is {text!r}: expected {_kind_name(kind)}.") from error


def _parse_bool(text: str) -> bool:
    if text.lower() in _TRUE:
        return True
    if text.lower() in _FALSE:
        return False
    raise ValueError(text)


def _parse_texts(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


_PARSERS: dict[Any, Callable[[str], Any]] = {bool: _parse_bool, _TEXTS: _parse_texts}
