"""`qserve bench WORD`: one module a word."""

import argparse
from types import ModuleType

from qserve.bench import compare, latency, serve, startup, throughput

WORDS: dict[str, tuple[ModuleType, str]] = {
    "serve": (serve, "measure servers that run, over HTTP, taking turns"),
    "compare": (compare, "start a server for each model and measure them side by side"),
    "throughput": (throughput, "how many tokens a second models make in this process, without HTTP"),
    "latency": (latency, "how long a fixed batch takes in this process, without HTTP"),
    "startup": (startup, "how long a server takes to be ready"),
}

_DESCRIPTION = """\
Measure servers and models. Everything that is compared takes turns in one run, is repeated, and comes with
95 % intervals; figures have the names and definitions of vLLM's benchmarks."""
_EXAMPLES = """\
  qserve bench serve http://127.0.0.1:8000 --concurrency 1,8,32
  qserve bench serve ours=http://127.0.0.1:8000 other=http://127.0.0.1:8001 --request-rate 2,4 --goodput ttft:500
  qserve bench compare MODEL MODEL-int4 --html report.html
  qserve bench latency MODEL-int4 --batch-size 1 --input-len 128 --output-len 128
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = _DESCRIPTION
    parser.epilog = _EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    words = parser.add_subparsers(metavar="WORD", required=True)
    for name, (word, purpose) in WORDS.items():
        own = words.add_parser(name, help=purpose)
        own.set_defaults(bench=word)
        word.add_arguments(own)


def run(arguments: argparse.Namespace) -> int:
    status: int = arguments.bench.run(arguments)
    return status
