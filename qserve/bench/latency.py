"""`qserve bench latency`: one batch at a time from its beginning to its end, in this process."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qserve.bench.figures import Figures
from qserve.bench.machine import describe_circumstances
from qserve.bench.models import add_model_arguments
from qserve.bench.offline import Batch, loaded, make_work, run_batch
from qserve.bench.report import ReportConfig, check_files, make_console, report
from qserve.bench.result import Column, Result, Row
from qserve.bench.serve import options_of
from qserve.config import DeviceConfig, EngineConfig, option
from qserve.errors import UsageError
from qserve.options import add_options, read_options

_DESCRIPTION = """\
Run one batch of prompts at a time, in this process, and tell how long it takes. Several models take turns."""

_COLUMNS = (
    Column(figure="latency", title="batch", unit="ms", digits=1, scale=1e3),
    Column(figure="ttft", title="first token", unit="ms", digits=1, scale=1e3),
    Column(figure="tpot", title="token", unit="ms", digits=2, scale=1e3),
    Column(figure="output_throughput", title="output", unit="tok/s", more_is_better=True),
)
_PERCENTILES = (10, 25, 50, 75, 90, 99)


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyConfig:
    """The work."""

    batch_size: int = option(1, "prompts that run together")
    input_len: int = option(32, "tokens of a prompt, random ids")
    output_len: int = option(128, "tokens made for each, whatever they are")
    num_iters_warmup: int = option(2, "batches that go before and are not counted")
    num_iters: int = option(10, "batches that are measured")
    seed: int = option(0, "of the prompts")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = _DESCRIPTION
    add_model_arguments(parser)
    for config in (LatencyConfig, ReportConfig):
        add_options(parser, config)


def run(arguments: argparse.Namespace) -> int:
    config, files = read_options(arguments, LatencyConfig), read_options(arguments, ReportConfig)
    check_files(files)
    if config.num_iters < 1:
        raise UsageError(f"--num-iters is {config.num_iters}: expected 1 or more.")
    runs: dict[str, list[Figures]] = {}
    with loaded(arguments) as llms, make_console(is_error=True).status("measuring"):
        work = make_work(llms, input_len=config.input_len, output_len=config.output_len, seed=config.seed)
        for turn in range(-config.num_iters_warmup, config.num_iters):
            prompts = work.make_prompts(config.batch_size, run=turn + config.num_iters_warmup)
            for label, llm in llms.items():
                batch = run_batch(llm, prompts, output_len=config.output_len)
                if turn >= 0:
                    runs.setdefault(label, []).append(_figures(batch))
    rows = tuple(_make_row(label, own, config) for label, own in runs.items())
    return report(_make_result(arguments, rows), files)


def _figures(batch: Batch) -> Figures:
    """Of one batch, in seconds; the last of its first tokens ends the prompts' part of it."""
    first = max(batch.ttfts)
    num_steps = batch.num_output_tokens // len(batch.ttfts) - 1
    return {
        "latency": batch.duration,
        "ttft": first,
        "tpot": (batch.duration - first) / num_steps if num_steps else None,
        "output_throughput": batch.num_output_tokens / batch.duration,
    }


def _make_row(label: str, runs: Sequence[Figures], config: LatencyConfig) -> Row:
    latencies = [run["latency"] for run in runs]
    totals: dict[str, Any] = {
        "avg_latency": float(np.mean(latencies)),
        "latencies": latencies,
        "percentiles": {str(percent): float(np.percentile(latencies, percent)) for percent in _PERCENTILES},
    }
    return Row(target=label, load=f"batch of {config.batch_size}", runs=tuple(runs), totals=totals)


def _make_result(arguments: argparse.Namespace, rows: tuple[Row, ...]) -> Result:
    return Result(
        bench="latency",
        circumstances=describe_circumstances(),
        options=options_of(arguments, LatencyConfig, EngineConfig, DeviceConfig),
        targets=[{"label": row.target} for row in rows],
        columns=_COLUMNS,
        rows=rows,
        compared="output_throughput",
    )
