"""What a bench has found: a row for each target and load, with the figures of every repeat.

Knows not what the figures mean: each bench names its columns. `table.py` and `page.py` show it, and here it is made
into JSON and CSV.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from qserve.bench.estimate import Estimate, estimate, estimate_ratio
from qserve.bench.figures import Figures


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """A figure that the table shows."""

    figure: str
    title: str
    unit: str = ""
    digits: int = 1
    scale: float = 1.0  # what is shown is the figure times this
    more_is_better: bool = False
    is_minor: bool = False  # left out where a terminal is too narrow
    is_plotted: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One target under one load."""

    target: str
    load: str
    runs: tuple[Figures, ...] = ()  # one a repeat
    notes: tuple[str, ...] = ()  # what went wrong, and what is odd
    samples: Mapping[str, Sequence[float]] = field(default_factory=dict)  # by metric, of all repeats together
    totals: Mapping[str, Any] = field(default_factory=dict)  # over all repeats, for the JSON alone

    def values(self, figure: str) -> list[float]:
        """One a repeat, or none at all where a repeat lacks it."""
        found = [run.get(figure) for run in self.runs]
        return [float(value) for value in found if value is not None] if None not in found else []

    def estimate(self, figure: str) -> Estimate | None:
        values = self.values(figure)
        return estimate(values) if values else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """`compared` names the figure whose ratio to the first target's stands in the table."""

    bench: str
    circumstances: Mapping[str, Any]
    options: Mapping[str, Any]
    targets: Sequence[Mapping[str, Any]]
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    compared: str

    def ratio(self, row: Row, figure: str) -> Estimate | None:
        """To the first target under the same load, repeat by repeat; None for that one itself."""
        first = next(other for other in self.rows if other.load == row.load)
        values, references = row.values(figure), first.values(figure)
        if first is row or len(values) != len(references) or not values or min(*values, *references) <= 0:
            return None
        return estimate_ratio(values, references)

    def to_json(self) -> dict[str, Any]:
        return {
            "bench": self.bench,
            **self.circumstances,
            "options": self.options,
            "targets": list(self.targets),
            "rows": [self._row_to_json(row) for row in self.rows],
        }

    def _row_to_json(self, row: Row) -> dict[str, Any]:
        return {
            "target": row.target,
            "load": row.load,
            "summary": {
                column.figure: {
                    "estimate": _to_json(row.estimate(column.figure)),
                    "ratio_to_first": _to_json(self.ratio(row, column.figure)),
                }
                for column in self.columns
            },
            **row.totals,
            "notes": list(row.notes),
            "repeats": list(row.runs),
        }

    def to_csv(self) -> str:
        """A line for each repeat, with every figure that is a plain number."""
        lines = [
            {"target": row.target, "load": row.load, "repeat": repeat, **_plain(run)}
            for row in self.rows
            for repeat, run in enumerate(row.runs)
        ]
        names = list(dict.fromkeys(name for line in lines for name in line))
        written = io.StringIO()
        writer = csv.DictWriter(written, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
        return written.getvalue()


def _to_json(found: Estimate | None) -> dict[str, Any] | None:
    return None if found is None else asdict(found)


def _plain(run: Figures) -> dict[str, Any]:
    return {name: value for name, value in run.items() if value is None or isinstance(value, int | float | str)}
