"""A result as a table in the terminal."""

from dataclasses import replace

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from qserve.bench.estimate import Estimate
from qserve.bench.machine import Machine
from qserve.bench.result import Column, Result, Row

NOTHING = "-"
_UNBOUNDED = 10_000


def print_result(result: Result, console: Console) -> None:
    columns = shown_columns(result)
    tables = [_table(result, kept) for kept in (columns, tuple(column for column in columns if not column.is_minor))]
    console.print(next((table for table in tables if _needed_width(table, console) <= console.width), tables[-1]))
    for row in result.rows:
        for note in row.notes:
            console.print(f"{escape(row.target)}, {row.load}: {escape(note)}", style="yellow", highlight=False)
    console.print(headline(result), style="dim", highlight=False)


def headline(result: Result) -> str:
    """The machine, the version, and what the figures are."""
    machine = Machine(**result.circumstances["machine"])
    version = result.circumstances["qserve"]
    commit = f" ({version['commit']})" if version["commit"] else ""
    number = max((len(row.runs) for row in result.rows), default=0)
    kind = f"means of {number} interleaved repeats, with 95 % intervals" if number > 1 else "a single run"
    return f"{machine.line}; qserve {version['version']}{commit}; {kind}"


def show(column: Column, found: Estimate | None) -> str:
    """12.3 ±0.4"""
    if found is None:
        return NOTHING
    value = f"{found.mean * column.scale:,.{column.digits}f}"
    return value if found.half_width is None else f"{value} ±{found.half_width * column.scale:,.{column.digits}f}"


def show_ratio(found: Estimate | None) -> str:
    return NOTHING if found is None else f"{found.mean:.2f}"


def _needed_width(table: Table, console: Console) -> int:
    return console.measure(table, options=console.options.update(max_width=_UNBOUNDED)).minimum


def _table(result: Result, columns: tuple[Column, ...]) -> Table:
    """Intervals stand only where targets are compared, or the table would be wider than terminals are."""
    drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    drawn.add_column("target", overflow="fold")
    drawn.add_column("load", no_wrap=True)
    for column in columns:
        drawn.add_column("\n".join([*column.title.split(", "), column.unit]), justify="right", no_wrap=True)
        if column.figure == result.compared:
            drawn.add_column("ratio", justify="right", no_wrap=True)
    for row in result.rows:
        drawn.add_row(escape(row.target), row.load, *_cells(result, row, columns))
    return drawn


def _cells(result: Result, row: Row, columns: tuple[Column, ...]) -> list[str]:
    cells = []
    for column in columns:
        found = row.estimate(column.figure)
        if column.figure == result.compared:
            cells += [show(column, found), show_ratio(result.ratio(row, column.figure))]
        else:
            cells.append(show(column, found and replace(found, half_width=None)))
    return cells


def shown_columns(result: Result) -> tuple[Column, ...]:
    """Those that some row has a value for."""
    return tuple(column for column in result.columns if any(row.values(column.figure) for row in result.rows))
