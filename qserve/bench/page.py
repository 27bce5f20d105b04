"""A result as one HTML page that needs nothing else: tables, plots, circumstances, and the JSON document itself."""

import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from qserve.bench.plots import NUM_COLORS, Point, Series, draw, draw_distributions
from qserve.bench.result import Column, Result, Row
from qserve.bench.table import headline, show, show_ratio, shown_columns

_MAX_DISTRIBUTIONS = 6  # loads that get plots of their own
_TITLES = {
    "ttft": "Time to the first chunk",
    "itl": "Between chunks",
    "tpot": "Time of a token",
    "e2el": "Whole answer",
}

# Okabe and Ito's colours, which the colour-blind can tell apart, the first one for the reference.
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#b8a900")
_STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1c; --soft: #6b6b6b; --rule: #dcdcdc; --page: #ffffff; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e8e8; --soft: #a0a0a0; --rule: #3a3a3a; --page: #161616; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page); margin: 2rem auto;
       max-width: 1120px; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2.2rem; } h3 { font-size: .95rem; margin: 0 0 .3rem; }
p.soft, figcaption { color: var(--soft); } .scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--rule); text-align: right; white-space: nowrap; }
th { font-weight: 600; vertical-align: bottom; } th small { display: block; font-weight: 400; color: var(--soft); }
th:nth-child(-n+2), td:nth-child(-n+2) { text-align: left; }
.notes li { color: #b33a00; } @media (prefers-color-scheme: dark) { .notes li { color: #ff9d66; } }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(420px, 1fr)); gap: 1.5rem 2rem; }
figure { margin: 0; }
svg { width: 100%; height: auto; } svg text { font: 12px system-ui, sans-serif; fill: var(--soft); }
svg text.name, svg text.value { fill: var(--ink); } .grid { stroke: var(--rule); fill: none; }
.line { fill: none; stroke-width: 2.2; } .thin { stroke-width: 1.2; } .legend { list-style: none; padding: 0; }
.legend li { display: inline-block; margin-right: 1.2rem; } .legend i { display: inline-block; width: .8em;
height: .8em; border-radius: 2px; margin-right: .4em; } details pre { overflow-x: auto; font-size: 12px; }
"""


def write_page(result: Result) -> str:
    colors = {label: number % NUM_COLORS for number, label in enumerate(dict.fromkeys(r.target for r in result.rows))}
    loads = list(dict.fromkeys(row.load for row in result.rows))
    plots = "".join(_figure_of(column, result, colors, loads) for column in shown_columns(result) if column.is_plotted)
    parts = [
        f"<h1>qserve bench {escape(result.bench)}</h1>",
        f'<p class="soft">{escape(result.circumstances["date"])}; {escape(headline(result))}</p>',
        f'<div class="scroll">{_table(result)}</div>',
        _notes(result.rows),
        f"<h2>Figures</h2>{_legend(colors)}",
        f'<div class="plots">{plots}</div>',
        *(_distributions(result, load, colors) for load in loads[:_MAX_DISTRIBUTIONS]),
        f"<h2>Targets and options</h2>{_facts(result.targets)}{_facts([result.options])}",
        f"<h2>Document</h2><details><summary>JSON</summary><pre>{escape(_document(result, indent=1))}</pre></details>",
        f'<script type="application/json" id="result">{_document(result).replace("<", chr(92) + "u003c")}</script>',
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>qserve bench {escape(result.bench)}</title>"
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}{_color_rules()}</style></head>\n'
        f"<body>\n{chr(10).join(part for part in parts if part)}\n</body></html>\n"
    )


def _table(result: Result) -> str:
    columns = shown_columns(result)
    heads = "".join(f"<th>{escape(column.title)}<small>{escape(column.unit)}</small></th>" for column in columns)
    rows = "".join(
        f"<tr><td>{escape(row.target)}</td><td>{escape(row.load)}</td>"
        f"<td>{show_ratio(result.ratio(row, result.compared))}</td>"
        + "".join(f"<td>{show(column, row.estimate(column.figure))}</td>" for column in columns)
        + "</tr>"
        for row in result.rows
    )
    compared = next((column.title for column in columns if column.figure == result.compared), "")
    ratio = f"<th>ratio<small>{escape(compared)}, to the first</small></th>"
    return f"<table><thead><tr><th>target</th><th>load</th>{ratio}{heads}</tr></thead><tbody>{rows}</tbody></table>"


def _notes(rows: Iterable[Row]) -> str:
    items = [f"<li>{escape(row.target)}, {escape(row.load)}: {escape(note)}</li>" for row in rows for note in row.notes]
    return f'<ul class="notes">{"".join(items)}</ul>' if items else ""


def _figure_of(column: Column, result: Result, colors: Mapping[str, int], loads: Sequence[str]) -> str:
    by_place = {(row.target, row.load): row for row in result.rows}
    series = [
        Series(label=label, color=color, points=[_point(by_place.get((label, load)), load, column) for load in loads])
        for label, color in colors.items()
    ]
    better = "more is better" if column.more_is_better else "less is better"
    caption = f"{column.unit}; {better}" if column.unit else better
    return _figure(column.title, draw(series, unit=f"{column.title}, {column.unit}"), caption)


def _point(row: Row | None, load: str, column: Column) -> Point:
    found = row.estimate(column.figure) if row else None
    if found is None:
        return Point(label=load, value=None)
    half_width = None if found.half_width is None else found.half_width * column.scale
    return Point(label=load, value=found.mean * column.scale, half_width=half_width)


def _distributions(result: Result, load: str, colors: Mapping[str, int]) -> str:
    """How the times of single requests and chunks are spread, over all repeats."""
    rows = [row for row in result.rows if row.load == load]
    drawn = []
    for metric, title in _TITLES.items():
        samples = [
            (row.target, colors[row.target], [1e3 * value for value in row.samples.get(metric, ())]) for row in rows
        ]
        if svg := draw_distributions(samples, unit="ms"):
            drawn.append(_figure(title, svg, "share of the values below"))
    return f'<h2>Spread, {escape(load)}</h2>{_legend(colors)}<div class="plots">{"".join(drawn)}</div>' if drawn else ""


def _figure(title: str, svg: str, caption: str) -> str:
    return f"<figure><h3>{escape(title)}</h3>{svg}<figcaption>{escape(caption)}</figcaption></figure>"


def _legend(colors: Mapping[str, int]) -> str:
    items = "".join(
        f'<li><i style="background:{_COLORS[number]}"></i>{escape(label)}</li>' for label, number in colors.items()
    )
    return f'<ul class="legend">{items}</ul>'


def _facts(objects: Sequence[Mapping[str, Any]]) -> str:
    return "".join(f"<pre>{escape(json.dumps(each, indent=1))}</pre>" for each in objects)


def _document(result: Result, indent: int | None = None) -> str:
    return json.dumps(result.to_json(), indent=indent)


def _color_rules() -> str:
    return "".join(
        f".line.s{number}{{stroke:{color}}}.bar.s{number},.dot.s{number}{{fill:{color}}}"
        for number, color in enumerate(_COLORS)
    )
