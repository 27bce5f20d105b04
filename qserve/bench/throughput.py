"""`qserve bench throughput`: many prompts at once, in this process."""

import argparse
from dataclasses import dataclass

from qserve.bench.figures import Figures, describe
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
Hand models many prompts at once, in this process, and count the tokens. Several models take turns."""

_COLUMNS = (
    Column(figure="output_throughput", title="output", unit="tok/s", more_is_better=True),
    Column(figure="tokens_per_second", title="all tokens", unit="tok/s", more_is_better=True),
    Column(figure="requests_per_second", title="requests", unit="req/s", digits=2, more_is_better=True),
    Column(figure="median_ttft_ms", title="first, median", unit="ms", digits=0),
    Column(figure="elapsed_time", title="took", unit="s", digits=2),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ThroughputConfig:
    """The work."""

    num_prompts: int = option(64, "prompts handed over at once")
    input_len: int = option(128, "tokens of a prompt, random ids")
    output_len: int = option(64, "tokens made for each, whatever they are")
    repeats: int = option(3, "how often it is measured; with 2 and more there are intervals")
    seed: int = option(0, "of the prompts")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = _DESCRIPTION
    add_model_arguments(parser)
    for config in (ThroughputConfig, ReportConfig):
        add_options(parser, config)


def run(arguments: argparse.Namespace) -> int:
    config, files = read_options(arguments, ThroughputConfig), read_options(arguments, ReportConfig)
    check_files(files)
    if config.repeats < 1:
        raise UsageError(f"--repeats is {config.repeats}: expected 1 or more.")
    runs: dict[str, list[Figures]] = {}
    with loaded(arguments) as llms, make_console(is_error=True).status("measuring"):
        work = make_work(llms, input_len=config.input_len, output_len=config.output_len, seed=config.seed)
        for llm in llms.values():
            run_batch(llm, work.make_prompts(min(config.num_prompts, 4), run=-1), output_len=4)
        for repeat in range(config.repeats):
            prompts = work.make_prompts(config.num_prompts, run=repeat)
            for label, llm in llms.items():
                batch = run_batch(llm, prompts, output_len=config.output_len)
                runs.setdefault(label, []).append(_figures(batch))
    rows = tuple(
        Row(target=label, load=f"{config.num_prompts} prompts", runs=tuple(own)) for label, own in runs.items()
    )
    return report(_make_result(arguments, rows), files)


def _figures(batch: Batch) -> Figures:
    """vLLM's names, and the tokens made alone, which its tokens_per_second does not tell."""
    num_tokens = batch.num_input_tokens + batch.num_output_tokens
    return {
        "elapsed_time": batch.duration,
        "num_requests": len(batch.ttfts),
        "total_num_tokens": num_tokens,
        "requests_per_second": len(batch.ttfts) / batch.duration,
        "tokens_per_second": num_tokens / batch.duration,
        "output_throughput": batch.num_output_tokens / batch.duration,
        **describe("ttft", batch.ttfts, percentiles=(90, 99)),
    }


def _make_result(arguments: argparse.Namespace, rows: tuple[Row, ...]) -> Result:
    return Result(
        bench="throughput",
        circumstances=describe_circumstances(),
        options=options_of(arguments, ThroughputConfig, EngineConfig, DeviceConfig),
        targets=[{"label": row.target} for row in rows],
        columns=_COLUMNS,
        rows=rows,
        compared="output_throughput",
    )
