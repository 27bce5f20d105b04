"""The command qserve-train: one module a word, each with `add_arguments` and `run`.

A word's module is imported when the word is used, since most of them load torch.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module

from qserve.errors import QserveError

_USAGE_ERROR = 2


@dataclass(frozen=True, slots=True)
class Word:
    """One word of the command line."""

    module: str
    purpose: str


WORDS: dict[str, Word] = {
    "import": Word("training.import_gguf", "make a transformers checkpoint, with tokenizer, from a GGUF file"),
    "prepare": Word("training.qat.prepare", "begin a run: a float model and the recipe to train it for"),
    "train": Word("training.qat.train", "train a run, or go on with one"),
    "finalize": Word("training.finalize", "quantize a float model and write the artifact that qserve serves"),
    "evaluate": Word("training.evaluate", "measure a model: loss, divergence from the float model, accuracy"),
    "compare": Word("training.compare", "measure float, control, rounding and QAT in one table"),
    "demo": Word("training.demo", "make the demo model once, and print where it lies"),
    "recipes": Word("training.recipes", "list the recipes, and what this machine can do with each"),
}

_DESCRIPTION = "Makes the quantized models that qserve serves."
_EXAMPLES = """\
From a GGUF file to a served model:

  qserve-train import model.gguf --out model-float
  qserve-train finalize model-float --out model-int4 --quantize int4-weight-only --group-size 32
  qserve serve model-int4

Trained for the rounding, where rounding alone loses too much:

  qserve-train prepare model-float --recipe int8-dynamic-act-int4-weight --run run
  qserve-train train --run run --data text.txt --tokens 500000
  qserve-train finalize run --out model-qat

`qserve-train WORD --help` tells more about each word.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one word; what the user can put right is one line on stderr and the exit status 2.

    What the operating system refuses (a full disk, no permission) is one line too, and the exit status 1.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    _quieten()
    options = _parser(used=arguments[0] if arguments else "").parse_args(arguments)
    word = import_module(options.module)
    if "torch" in sys.modules:  # the word computes
        import_module("training.memory").keep_released_memory()
    try:
        word.run(options)
    except QserveError as error:
        print(f"qserve-train: {error}", file=sys.stderr)
        return _USAGE_ERROR
    except OSError as error:
        print(f"qserve-train: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _quieten() -> None:
    """What libraries tell their own developers as they are imported is not for the users of this command."""
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _parser(*, used: str) -> argparse.ArgumentParser:
    """The command's parser; only the word in use gets its own arguments."""
    parser = argparse.ArgumentParser(
        prog="qserve-train",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    words = parser.add_subparsers(metavar="WORD", required=True)
    for name, word in WORDS.items():
        description = f"{word.purpose[0].upper()}{word.purpose[1:]}."
        own = words.add_parser(name, help=word.purpose, description=description)
        own.set_defaults(module=word.module)
        if name == used:
            import_module(word.module).add_arguments(own)
    return parser


if __name__ == "__main__":
    sys.exit(main())
