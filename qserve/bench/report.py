"""Where a result goes: the terminal, and files of JSON, CSV and HTML."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from qserve.bench.page import write_page
from qserve.bench.result import Result
from qserve.bench.table import print_result
from qserve.config import option
from qserve.errors import UsageError

_STANDARD_OUTPUT = "-"
_WIDTH_OF_FILES = 140


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportConfig:
    """The report; the table is always printed."""

    json: str = option("", "a file for the whole result; - is standard output, and the table then goes to stderr")
    csv: str = option("", "a file for the figures, a line for each repeat")
    html: str = option("", "a file for a page with tables and plots, which needs no other file")


_WRITERS: dict[str, Callable[[Result], str]] = {
    "json": lambda result: json.dumps(result.to_json(), indent=2) + "\n",
    "csv": Result.to_csv,
    "html": write_page,
}


def report(result: Result, config: ReportConfig) -> int:
    """The exit status: 1 when a row has no figures, so that a script notices."""
    names = {kind: getattr(config, kind) for kind in _WRITERS if getattr(config, kind)}
    console = make_console(is_error=_STANDARD_OUTPUT in names.values())
    print_result(result, console)
    for kind, name in names.items():
        _write(name, _WRITERS[kind](result))
        if name != _STANDARD_OUTPUT:
            console.print(f"{kind} is in {name}", highlight=False, soft_wrap=True)
    return 0 if all(row.runs and row.values(result.compared) for row in result.rows) else 1


def make_console(*, is_error: bool) -> Console:
    is_terminal = (sys.stderr if is_error else sys.stdout).isatty()
    return Console(stderr=is_error, width=None if is_terminal else _WIDTH_OF_FILES)


def check_files(config: ReportConfig) -> None:
    """Before anything is measured: a folder that is not there would cost the whole run."""
    for kind in _WRITERS:
        name = getattr(config, kind)
        if name and name != _STANDARD_OUTPUT and not Path(name).absolute().parent.is_dir():
            raise UsageError(f"--{kind} is {name}, and the folder it names does not exist.")


def _write(name: str, text: str) -> None:
    if name == _STANDARD_OUTPUT:
        sys.stdout.write(text)
        return
    try:
        Path(name).write_text(text)
    except OSError as error:
        raise UsageError(f"{name} cannot be written: {error.strerror}.") from error
