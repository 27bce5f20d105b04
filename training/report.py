"""The rows of a comparison: means over seeds with their spread, and what each method wins back of rounding's loss.

Knows no models: numbers in, a table out.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

FLOAT, CONTROL, RTN = "float", "control", "rtn"
_COLUMNS = (
    "method",
    "loss",
    "perplexity",
    "KL",
    "top-1",
    "KL recovered",
    "perplexity recovered",
    "MB",
    "bits/weight",
    "tokens/s",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Number:
    """A mean over seeds, and the lowest and highest of them."""

    mean: float
    low: float
    high: float

    def text(self, digits: int, *, scale: float = 1.0) -> str:
        half = (self.high - self.low) / 2 * scale
        around = f" ± {half:.{digits}f}" if self.high > self.low else ""
        return f"{self.mean * scale:.{digits}f}{around}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One method. What is recovered is of rounding's loss: 1 is the float model, 0 is rounding to nearest."""

    method: str
    seeds: int
    loss: Number
    kl: Number
    agreement: Number
    perplexity: Number
    recovered_kl: Number | None
    recovered_perplexity: Number | None
    bytes: int
    bits_per_weight: float
    tokens_per_second: Number | None


def aggregate(found: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Rows in the order in which their methods come first."""
    by_method: dict[str, list[Mapping[str, Any]]] = {}
    for entry in found:
        by_method.setdefault(entry["method"], []).append(entry)
    base, rounded = by_method[FLOAT][0], by_method[RTN][0]
    return [_row(method, entries, base, rounded) for method, entries in by_method.items()]


def markdown(rows: Sequence[Row]) -> str:
    """The table; where there are several seeds, ± is half of what lies between the lowest and the highest."""
    lines = [
        f"| {' | '.join(_COLUMNS)} |",
        f"| --- |{' ---: |' * (len(_COLUMNS) - 1)}",
    ]
    return "\n".join([*lines, *(_line(row) for row in rows)]) + "\n"


def _line(row: Row) -> str:
    cells = [
        row.method + (f" ({row.seeds} seeds)" if row.seeds > 1 else ""),
        row.loss.text(4),
        row.perplexity.text(3),
        row.kl.text(4),
        row.agreement.text(1, scale=100) + " %",
        _share(row.recovered_kl),
        _share(row.recovered_perplexity),
        f"{row.bytes / 1e6:.2f}",
        f"{row.bits_per_weight:.2f}",
        "" if row.tokens_per_second is None else row.tokens_per_second.text(0),
    ]
    return f"| {' | '.join(cells)} |"


def _share(number: Number | None) -> str:
    return "" if number is None else number.text(1, scale=100) + " %"


def _row(method: str, entries: Sequence[Mapping[str, Any]], base: Mapping[str, Any], rounded: Mapping[str, Any]) -> Row:
    is_between = method not in (FLOAT, CONTROL, RTN)
    gap = rounded["perplexity"] - base["perplexity"]
    speeds = [entry["tokens_per_second"] for entry in entries if "tokens_per_second" in entry]
    return Row(
        method=method,
        seeds=len(entries),
        loss=_number([entry["loss"] for entry in entries]),
        kl=_number([entry["kl"] for entry in entries]),
        agreement=_number([entry["agreement"] for entry in entries]),
        perplexity=_number([entry["perplexity"] for entry in entries]),
        recovered_kl=_number([1 - entry["kl"] / rounded["kl"] for entry in entries]) if is_between else None,
        recovered_perplexity=_number([(rounded["perplexity"] - entry["perplexity"]) / gap for entry in entries])
        if is_between and gap > 0
        else None,
        bytes=entries[0]["bytes"],
        bits_per_weight=entries[0]["bits_per_weight"],
        tokens_per_second=_number(speeds) if speeds else None,
    )


def _number(values: Sequence[float]) -> Number:
    return Number(mean=statistics.fmean(values), low=min(values), high=max(values))
