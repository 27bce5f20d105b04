"""A tiny run in a moment: a source, a text, and the words called as functions."""

import hashlib
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from tests.tiny import make_checkpoint, prose
from training.config import Finalize
from training.qat.finalize import finalize_run
from training.qat.prepare import Prepare, prepare
from training.qat.train import train
from training.run import Run, open_run

QUIET = Console(quiet=True)
# 8 steps of 2 windows of 32 tokens, committed after every third.
OPTIONS: dict[str, Any] = {
    "tokens": 512,
    "sequence_length": 32,
    "batch_size": 2,
    "micro_batch": 1,
    "save_every": 3,
    "log_every": 1,
    "held_out": 200,
    "precision": "fp32",
    "learning_rate": 1e-3,
}


def make_source(directory: Path, **changes: Any) -> Path:
    return make_checkpoint(directory, dtype=torch.bfloat16, **{"num_hidden_layers": 1, **changes})


def make_text(directory: Path) -> Path:
    path = directory / "prose.txt"
    path.write_text(prose()[:6000])
    return path


def begin(source: Path, run: Path, *, recipe: str = "int8-dynamic-act-int4-weight", **wanted: Any) -> Run:
    return prepare(Prepare(base=str(source), run=run, recipe=recipe, **wanted), console=QUIET)


def go_on(run: Path, text: Path | None, **changes: Any) -> bool:
    return train(run, data=[] if text is None else [text], given={**OPTIONS, **changes}, console=QUIET)


def finish(run: Path, out: Path, **wanted: Any) -> Path:
    finalize_run(Finalize(source=str(run), out=out, **wanted), console=QUIET)
    return out


def trained(
    source: Path, text: Path, run: Path, *, recipe: str = "int8-dynamic-act-int4-weight", **changes: Any
) -> Run:
    begin(source, run, recipe=recipe)
    assert go_on(run, text, **changes)
    return open_run(run)


def fingerprint(directory: Path) -> dict[str, str]:
    """What every file of a directory holds."""
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(directory.iterdir())}
