"""`qserve bench compare`: a server for each model, the same work for all, and what each costs in memory and loss."""

import argparse
from contextlib import ExitStack
from dataclasses import replace

from qserve.bench.figures import Figures
from qserve.bench.models import Model, add_model_arguments, labels_of, server_arguments
from qserve.bench.process import ServerProcess
from qserve.bench.report import ReportConfig, check_files, make_console, report
from qserve.bench.result import Column
from qserve.bench.serve import (
    COLUMNS,
    LoadConfig,
    add_shared_arguments,
    check_labels,
    make_result,
    measure_servers,
    run_loop,
)
from qserve.bench.target import Server, Target, connect
from qserve.options import read_options

_DESCRIPTION = """\
Start a server for each model and measure them in turns with the same work: speed, memory, size, and
the loss that each artifact records. The first model is the one that the others are compared to."""

_COLUMNS = (
    *COLUMNS,
    Column(figure="rss_mib", title="memory", unit="MiB", digits=0),
    Column(figure="weights_mib", title="weights", unit="MiB", digits=0),
    Column(figure="loss", title="loss", unit="nats", digits=4),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = _DESCRIPTION
    add_model_arguments(parser)
    add_shared_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    load, files = read_options(arguments, LoadConfig), read_options(arguments, ReportConfig)
    check_files(files)
    if arguments.ignore_eos is None:
        arguments.ignore_eos = True  # these servers are ours, and know it: every model then does the same work
    models = [Model.parse(text) for text in arguments.models]
    check_labels(labels_of(models))
    with ExitStack() as running:
        processes = {model.label: running.enter_context(_start(model, arguments)) for model in models}
        servers = [_connect(model, processes[model.label], load) for model in models]

        def look(label: str) -> Figures:
            own = next(model for model in models if model.label == label)
            server = next(server for server in servers if server.label == label)
            return {**processes[label].read_memory(), "weights_mib": _weights_mib(server), "loss": own.loss}

        rows = run_loop(measure_servers(servers, arguments, look=look))
    return report(make_result("compare", arguments, servers, rows, columns=_COLUMNS), files)


def _start(model: Model, arguments: argparse.Namespace) -> ServerProcess:
    """One after the other: a start takes every core."""
    with make_console(is_error=True).status(f"starting {model.label}"):
        process = ServerProcess(server_arguments(model, arguments))
        try:
            process.wait_until_ready()
        except BaseException:
            process.stop()
            raise
    return process


def _connect(model: Model, process: ServerProcess, load: LoadConfig) -> Server:
    target = replace(Target.parse(process.url), label=model.label)
    return connect(target, api_key="", seconds=load.timeout)


def _weights_mib(server: Server) -> float | None:
    """As they lie in the files."""
    num_bytes = (server.facts.get("details", {}).get("bytes") or {}).get("total")
    return num_bytes / 2**20 if num_bytes else None
