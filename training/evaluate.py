"""`qserve-train evaluate`: how good a model is, computed by transformers or asked of a qserve server.

Both ways give the same loss for the same windows. Knows how to load; `scores`, `served` and `choices` know how to
measure.
"""

import argparse
import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.progress import Progress as Bar
from rich.table import Table
from torch import Tensor

from qserve.checkpoint.detect import detect
from qserve.checkpoint.hub import resolve
from qserve.errors import UsageError
from training.artifact import load_for_measuring
from training.choices import BETWEEN, accuracy, likelihoods_of, read_items
from training.data import load_tokenizer, read_text, windows
from training.run import is_run, open_run
from training.scores import Progress, Scores, score
from training.served import Server, score_served, serving

_DESCRIPTION = """\
Measure a model: loss, perplexity and bits per byte on text; with a reference, the
divergence from it and how often both find the same token likeliest; and accuracy
on multiple-choice items. MODEL is an artifact, a float checkpoint, or a run.
"""
_EXAMPLES = """\
examples:
  qserve-train evaluate model-int4 --data stories.txt --reference model
  qserve-train evaluate model-int4 --data stories.txt --through qserve
  qserve-train evaluate model-int4 --choices questions.jsonl --limit 200
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluate:
    """What is to be measured, and how."""

    model: str
    data: tuple[Path, ...] = ()
    reference: str | None = None
    choices: Path | None = None
    through: str = "transformers"
    server: str | None = None  # one that runs already
    window: int = 512
    max_tokens: int | None = None
    limit: int | None = None
    between: str = BETWEEN


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = _DESCRIPTION
    parser.epilog = _EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("model", metavar="MODEL", help="directory of a model or a run, or ORG/NAME on the hub")
    add("--data", type=Path, nargs="+", default=(), metavar="PATH", help="text: .txt, .json, .jsonl, saved datasets")
    add("--reference", metavar="MODEL", help="the float model, to measure divergence and agreement")
    add("--choices", type=Path, metavar="FILE", help=".jsonl of query, choices and the index gold")
    add("--through", choices=("transformers", "qserve"), default="transformers", help="what computes")
    add("--server", metavar="URL", help="with --through qserve: a server that runs already")
    add("--window", type=int, default=512, metavar="N", help="tokens predicted in one piece (%(default)s)")
    add("--max-tokens", type=int, metavar="N", help="of the text to use")
    add("--limit", type=int, metavar="N", help="items to use")
    add("--between", default=BETWEEN, metavar="TEXT", help="what stands between query and choice (%(default)r)")
    add("--json", type=Path, metavar="FILE", help="write the result there too")


def run(options: argparse.Namespace) -> None:
    console = Console()
    fields = {field.name: getattr(options, field.name) for field in dataclasses.fields(Evaluate)}
    result = evaluate(Evaluate(**{**fields, "data": tuple(options.data)}), console=console)
    console.print(_table(result))
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


def evaluate(wanted: Evaluate, *, console: Console) -> dict[str, Any]:
    """Everything that was asked for, as it goes into JSON."""
    if not wanted.data and wanted.choices is None:
        raise UsageError("nothing to measure with: give --data, --choices or both")
    path = resolve(wanted.model)
    tokenizer = load_tokenizer(_home(path))
    result: dict[str, Any] = {"model": wanted.model, "through": wanted.through}
    with _source(wanted, path) as source:
        if wanted.data:
            text = read_text(wanted.data, tokenizer, max_tokens=wanted.max_tokens)
            pieces = windows(text.tokens, min(wanted.window, len(text.tokens) - 1))
            with _bar(console) as progress:
                scores = _score(source, pieces, wanted, progress)
            result |= _told(scores, bytes_per_token=text.num_bytes / len(text.tokens)) | {"data": text.files}
        if wanted.choices is not None:
            items = read_items(wanted.choices, limit=wanted.limit)
            found = accuracy(items, _likelihoods(source), tokenizer, between=wanted.between)
            result["choices"] = {"file": wanted.choices.name, **dataclasses.asdict(found)}
    return result


def load_model_or_run(path: Path) -> Any:
    """A checkpoint, or what a run has trained so far, as it computes in training."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # transformers' own, beside ours
    if not is_run(path):
        return load_for_measuring(detect(path))
    from training.qat.finalize import load_trained

    _, trainee = load_trained(open_run(path))
    trainee.settle()
    return trainee.model


@contextmanager
def _source(wanted: Evaluate, path: Path) -> Iterator[Any]:
    """A model of transformers, or a server."""
    if wanted.through == "transformers":
        yield load_model_or_run(path)
    elif wanted.server is not None:
        yield Server(wanted.server)
    elif is_run(path):
        raise UsageError(
            f"{path} is a run, which qserve does not serve; finalize it first, or use --through transformers"
        )
    else:
        with serving(path, "--max-model-len", str(wanted.window + 1), "--kv-cache-dtype", "float32") as server:
            yield server


def _score(source: Any, pieces: Tensor, wanted: Evaluate, progress: Progress) -> Scores:
    reference = None if wanted.reference is None else load_model_or_run(resolve(wanted.reference))
    if not isinstance(source, Server):
        return score(source, pieces, reference=reference, progress=progress)
    return score_served(source, pieces, likeliest=_likeliest(reference, pieces), progress=progress)


@torch.no_grad()
def _likeliest(reference: Any, pieces: Tensor) -> Tensor | None:
    if reference is None:
        return None
    found = [reference(input_ids=piece[None, :-1].long(), use_cache=False).logits[0].argmax(-1) for piece in pieces]
    return torch.stack(found)  # (windows, length)


def _likelihoods(source: Any) -> Any:
    if isinstance(source, Server):
        return lambda ids: [token.logprob for token in source.tell(ids)]
    return likelihoods_of(source)


def _home(path: Path) -> Path:
    """Where the tokenizer lies."""
    return Path(open_run(path).manifest["source"]["path"]) if is_run(path) else detect(path).home


def _told(scores: Scores, *, bytes_per_token: float) -> dict[str, Any]:
    told = {
        "tokens": scores.tokens,
        "loss": scores.loss,
        "perplexity": scores.perplexity,
        "bits_per_byte": scores.bits_per_byte(bytes_per_token),
        "kl": scores.kl,
        "agreement": scores.agreement,
    }
    return {name: value for name, value in told.items() if value is not None}


def _table(result: dict[str, Any]) -> Table:
    table = Table(
        box=box.SIMPLE_HEAD, pad_edge=False, show_header=False, title=f"{result['model']}, {result['through']}"
    )
    numbers = {name: value for name, value in result.items() if isinstance(value, int | float)}
    choices = result.get("choices", {})
    numbers |= {f"accuracy, {name.replace('_', ' ')}": choices[name] for name in ("summed", "per_byte") if choices}
    for name, value in numbers.items():
        table.add_row(name.replace("_", " "), f"{value:,}" if isinstance(value, int) else f"{value:.5f}")
    return table


@contextmanager
def _bar(console: Console) -> Iterator[Progress]:
    with Bar(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("measuring", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
