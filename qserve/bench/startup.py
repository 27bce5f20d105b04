"""`qserve bench startup`: from the command to a server that is ready, and to its first token."""

import argparse
import asyncio
from dataclasses import dataclass

from qserve.bench.answer import read_answer
from qserve.bench.figures import Figures
from qserve.bench.machine import describe_circumstances
from qserve.bench.models import Model, add_model_arguments, labels_of, server_arguments
from qserve.bench.process import ServerProcess
from qserve.bench.report import ReportConfig, check_files, make_console, report
from qserve.bench.result import Column, Result, Row
from qserve.bench.serve import check_labels, options_of
from qserve.bench.target import Target, connect
from qserve.bench.work import Work, WorkConfig
from qserve.config import DeviceConfig, EngineConfig, option
from qserve.errors import UsageError
from qserve.options import add_options, read_options

_DESCRIPTION = """\
Start a server again and again: when its port is open, when it is ready, and when the first token of its first request
has come; what the time went to, and what the server weighs after that request, with all of its cache in memory. What
the system has read lately is still in its memory: only the first start may have waited for the disk."""

_COLUMNS = (
    Column(figure="listening_s", title="port open", unit="s", digits=2),
    Column(figure="imports_s", title="imports", unit="s", digits=2, is_minor=True),
    Column(figure="weights_s", title="weights", unit="s", digits=2, is_minor=True),
    Column(figure="ready_s", title="ready", unit="s", digits=2),
    Column(figure="first_token_s", title="first token", unit="s", digits=2),
    Column(figure="rss_mib", title="memory", unit="MiB", digits=0),
    Column(figure="peak_rss_mib", title="at most", unit="MiB", digits=0),
    Column(figure="beside_mib", title="beside weights and cache", unit="MiB", digits=0),
)
_PROMPT_TOKENS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class StartupConfig:
    """How it is measured."""

    repeats: int = option(3, "how often each is started; with 2 and more there are intervals")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = _DESCRIPTION
    add_model_arguments(parser)
    for config in (StartupConfig, ReportConfig):
        add_options(parser, config)


def run(arguments: argparse.Namespace) -> int:
    config, files = read_options(arguments, StartupConfig), read_options(arguments, ReportConfig)
    check_files(files)
    models = [Model.parse(text) for text in arguments.models]
    check_labels(labels_of(models))
    if config.repeats < 1:
        raise UsageError(f"--repeats is {config.repeats}: expected 1 or more.")
    runs: dict[str, list[Figures]] = {model.label: [] for model in models}
    console = make_console(is_error=True)
    for repeat in range(config.repeats):
        for model in models:
            with console.status(f"starting {model.label}, {repeat + 1} of {config.repeats}"):
                runs[model.label].append(_measure(model, arguments))
    return report(_make_result(arguments, models, runs), files)


def _measure(model: Model, arguments: argparse.Namespace) -> Figures:
    with ServerProcess(server_arguments(model, arguments)) as process:
        process.wait_until_ready()
        first, kept = asyncio.run(_first_token(process.url))
        process.wait_until_at_rest()
        memory = process.read_memory()
        parts = {f"{name}_s": seconds for name, seconds in process.read_breakdown().items()}
        return {
            "listening_s": process.listening_seconds,
            "ready_s": process.ready_seconds,
            "first_token_s": process.ready_seconds + first,
            **memory,
            "beside_mib": None if memory["rss_mib"] is None else memory["rss_mib"] - kept,
            **parts,
        }


async def _first_token(url: str) -> tuple[float, float]:
    """Seconds from a request to its first chunk, and MiB that the server says its weights and its cache have."""
    server = connect(Target.parse(url), api_key="", seconds=60)
    try:
        await server.look()
        work = Work(WorkConfig(input_len=_PROMPT_TOKENS, output_len=1), vocab_size=server.vocab_size or 8192)
        answer = read_answer(await server.send(server.encode(work.make_jobs(1, run=0)[0])))
    finally:
        server.connections.close()
    if answer.failure:
        raise UsageError(f"the server was ready, and then failed its first request: {answer.failure}")
    return answer.ttft, sum(server.facts["details"]["memory"].values()) / 2**20


def _make_result(arguments: argparse.Namespace, models: list[Model], runs: dict[str, list[Figures]]) -> Result:
    return Result(
        bench="startup",
        circumstances=describe_circumstances(),
        options=options_of(arguments, StartupConfig, EngineConfig, DeviceConfig),
        targets=[{"label": model.label, "model": model.path} for model in models],
        columns=_COLUMNS,
        rows=tuple(Row(target=model.label, load="start", runs=tuple(runs[model.label])) for model in models),
        compared="ready_s",
    )
