"""The command qserve: one module a word, each with `add_arguments(parser)` and `run(arguments) -> int`.

A word's module is imported when the word is used, for some of them load much.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module

from qserve import __version__
from qserve.errors import QserveError

_INTERRUPTED = 130


@dataclass(frozen=True, slots=True)
class Word:
    """One word of the command line."""

    module: str
    purpose: str


WORDS: dict[str, Word] = {
    "serve": Word("qserve.serve", "serve a model over the OpenAI API"),
    "inspect": Word("qserve.inspect", "tell what a checkpoint holds, and how it would be computed here"),
    "bench": Word("qserve.bench.cli", "measure servers and models, several side by side"),
}

_EXAMPLES = """\
  qserve serve                      a small demo model, made once and then reused
  qserve serve path/to/checkpoint   a directory with config.json and weights
  qserve serve ORG/NAME             from the model hub, or its local cache
  qserve inspect path/to/checkpoint
  qserve bench compare path/to/checkpoint path/to/quantized

`qserve WORD --help` tells more about each word. Models are quantized with `qserve-train`.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one word. What the user can put right is one line on stderr and the exit status 1."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    options = _make_parser(used=next((word for word in given if word in WORDS), "")).parse_args(given)
    try:
        status: int = import_module(options.module).run(options)
    except QserveError as error:
        print(f"qserve: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return _INTERRUPTED
    return status


def _make_parser(*, used: str) -> argparse.ArgumentParser:
    """Every word is listed; only the one in use has its arguments, since they may take a while to find out."""
    parser = argparse.ArgumentParser(
        prog="qserve",
        description="An OpenAI-compatible server for torchao-quantized language models.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"qserve {__version__}")
    words = parser.add_subparsers(metavar="WORD", required=True)
    for name, word in WORDS.items():
        own = words.add_parser(name, help=word.purpose, description=f"{word.purpose[0].upper()}{word.purpose[1:]}.")
        own.set_defaults(module=word.module)
        if name == used:
            import_module(word.module).add_arguments(own)
    return parser


if __name__ == "__main__":
    sys.exit(main())
