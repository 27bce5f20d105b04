"""`qserve bench serve`: servers that run already, measured over HTTP."""

import argparse
import asyncio
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import uvloop
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from qserve.bench.figures import METRICS, Figures
from qserve.bench.load import make_loads
from qserve.bench.machine import describe_circumstances
from qserve.bench.measure import Plan, measure
from qserve.bench.report import ReportConfig, check_files, report
from qserve.bench.result import Column, Result, Row
from qserve.bench.target import Server, Target, connect
from qserve.bench.work import Work, WorkConfig
from qserve.config import option
from qserve.errors import UsageError
from qserve.options import add_options, read_options

_DEFAULT_VOCABULARY = 8192
_DESCRIPTION = """\
Measure servers of OpenAI's API: throughput, time to the first token, time between tokens. Several targets
take turns in one run, so that what is compared ran under the same conditions."""

COLUMNS = (
    Column(figure="completed", title="done", unit="requests", digits=0, is_minor=True, is_plotted=False),
    Column(figure="output_throughput", title="output", unit="tok/s", more_is_better=True),
    Column(figure="median_ttft_ms", title="first, median", unit="ms"),
    Column(figure="p99_ttft_ms", title="first, p99", unit="ms", is_minor=True),
    Column(figure="median_tpot_ms", title="token, median", unit="ms", digits=2),
    Column(figure="median_itl_ms", title="gap, median", unit="ms", digits=2, is_minor=True),
    Column(figure="p99_itl_ms", title="gap, p99", unit="ms", digits=2),
    Column(figure="median_e2el_ms", title="whole, median", unit="ms", digits=0, is_minor=True),
    Column(figure="request_goodput", title="goodput", unit="req/s", digits=2, more_is_better=True),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadConfig:
    """The load, and how it is measured."""

    concurrency: str = option(
        "", "requests under way at once; several with commas are a sweep (1,8 if nothing is said)"
    )
    request_rate: str = option("", "requests a second; several with commas are a sweep")
    burstiness: float = option(1.0, "of the arrivals at a rate: 1 is a Poisson process, less is burstier")
    repeats: int = option(3, "how often everything is measured; with 2 and more there are intervals")
    num_warmups: int = option(-1, "requests that go before, for each load; -1 takes one for each client")
    metric_percentiles: str = option("90,99", "which percentiles of the times are in the result")
    timeout: float = option(600.0, "seconds after which a request has failed")
    save_detailed: bool = option(False, "keep the times of every request in the JSON")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = _DESCRIPTION
    parser.add_argument(
        "targets",
        nargs="+",
        metavar="URL",
        help="[LABEL=]URL[#MODEL]; without a model, the first one that the server lists",
    )
    parser.add_argument("--api-key", default="", metavar="TEXT", help="sent to every server")
    add_shared_arguments(parser)


def add_shared_arguments(parser: argparse.ArgumentParser) -> None:
    """What everything that measures over HTTP takes."""
    parser.add_argument(
        "--goodput",
        nargs="+",
        default=[],
        metavar="METRIC:MS",
        help="count what meets all of these, such as ttft:500 tpot:50 e2el:5000",
    )
    for config in (WorkConfig, LoadConfig, ReportConfig):
        add_options(parser, config)


def run(arguments: argparse.Namespace) -> int:
    load, files = read_options(arguments, LoadConfig), read_options(arguments, ReportConfig)
    check_files(files)
    targets = [Target.parse(text) for text in arguments.targets]
    check_labels([target.label for target in targets])
    servers = [connect(target, api_key=arguments.api_key, seconds=load.timeout) for target in targets]
    rows = run_loop(measure_servers(servers, arguments))
    return report(make_result("serve", arguments, servers, rows, columns=COLUMNS), files)


async def measure_servers(
    servers: Sequence[Server], arguments: argparse.Namespace, *, look: Callable[[str], Figures] = lambda label: {}
) -> list[Row]:
    """Everything between the command line and the result."""
    await asyncio.gather(*(server.look() for server in servers))
    plan = make_plan(arguments, servers)
    try:
        with _progress() as bar:
            tasks = {server.label: bar.add_task(server.label, total=plan.num_requests) for server in servers}
            return await measure(servers, plan, on_end=lambda label: bar.advance(tasks[label]), look=look)
    finally:
        for server in servers:
            server.connections.close()


def make_plan(arguments: argparse.Namespace, servers: Sequence[Server]) -> Plan:
    work, load = read_options(arguments, WorkConfig), read_options(arguments, LoadConfig)
    told = [server.vocab_size for server in servers if server.vocab_size]
    if load.repeats < 1:
        raise UsageError(f"--repeats is {load.repeats}: expected 1 or more.")
    return Plan(
        work=Work(work, vocab_size=work.vocab_size or min(told, default=_DEFAULT_VOCABULARY)),
        loads=make_loads(
            rates=load.request_rate,
            concurrency=load.concurrency or ("" if load.request_rate else "1,8"),
            burstiness=load.burstiness,
        ),
        repeats=load.repeats,
        num_warmups=load.num_warmups,
        seed=work.seed,
        percentiles=parse_percentiles(load.metric_percentiles),
        goodput=parse_goodput(arguments.goodput),
        keeps_details=load.save_detailed,
    )


def parse_percentiles(text: str) -> list[float]:
    try:
        percentiles = [float(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise UsageError(f"--metric-percentiles is {text!r}: expected numbers, such as 90,99.") from error
    if any(not 0 <= percentile <= 100 for percentile in percentiles):
        raise UsageError(f"--metric-percentiles is {text!r}: expected numbers from 0 to 100.")
    return sorted({*percentiles, 99.0})  # the table shows the 99th


def parse_goodput(given: Sequence[str]) -> dict[str, float]:
    limits = {}
    for text in given:
        metric, _, limit = text.partition(":")
        try:
            limits[metric] = float(limit)
        except ValueError as error:
            raise UsageError(f"--goodput has {text!r}: expected METRIC:MILLISECONDS, such as ttft:500.") from error
        if metric not in METRICS or metric == "itl":
            raise UsageError(f"--goodput names {metric!r}: expected ttft, tpot or e2el.")
    return limits


def check_labels(labels: Sequence[str]) -> None:
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if twice is not None:
        raise UsageError(f"two targets are labelled {twice!r}: write LABEL= before one of them.")


def make_result(
    bench: str,
    arguments: argparse.Namespace,
    servers: Sequence[Server],
    rows: Sequence[Row],
    *,
    columns: tuple[Column, ...],
) -> Result:
    return Result(
        bench=bench,
        circumstances=describe_circumstances(),
        options=options_of(arguments, WorkConfig, LoadConfig) | {"goodput": arguments.goodput},
        targets=[
            {"label": server.label, "base_url": server.target.url, "problem": server.problem or None, **server.facts}
            for server in servers
        ],
        columns=columns,
        rows=tuple(rows),
        compared="output_throughput",
    )


def options_of(arguments: argparse.Namespace, *configs: type[Any]) -> dict[str, Any]:
    """What was in force, by the names of the flags."""
    return {name: value for config in configs for name, value in asdict(read_options(arguments, config)).items()}


def run_loop(coroutine: Coroutine[Any, Any, list[Row]]) -> list[Row]:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(coroutine)


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # Twice a second: the bar must not take the time that is measured.
    return Progress(*columns, console=Console(stderr=True), refresh_per_second=2)
