"""What the words are told: the options of a training run with the flags made from them, and what finalize makes.

A flag of training that is not given is None: on the first `train` it takes its default, later what the run began with.
"""

import argparse
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

import torch

from qserve.checkpoint.save import MAX_SHARD_BYTES
from qserve.errors import UsageError
from training.dressing import PLAIN, Dressing

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def _option(default: Any, text: str, *, choices: tuple[str, ...] | None = None) -> Any:
    return field(default=default, metadata={"help": text, "choices": choices})


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainOptions:
    """How a run is trained; all of it is written into the manifest."""

    objective: str = _option(
        "auto",
        "kl: come near the float model's own probabilities; task: predict the text; mixture: both. "
        "auto is kl, and task for a float run",
        choices=("auto", "kl", "task", "mixture"),
    )
    kl_share: float = _option(0.5, "of the loss, under the objective mixture")
    train: str = _option(
        "weights",
        "weights: every parameter; adapter: a low-rank change of each quantized weight; ranges: scales alone",
        choices=("weights", "adapter", "ranges"),
    )
    adapter_rank: int = _option(16, "of each adapter")
    adapter_alpha: float = _option(32.0, "an adapter counts alpha / rank times")
    learn_ranges: bool = _option(False, "learn the scales too, instead of taking them from the weights at every step")
    tokens: int = _option(0, "to train on; 0 is once over the text")
    sequence_length: int = _option(512, "tokens of one window")
    batch_size: int = _option(8, "windows of one step, over all processes")
    micro_batch: int = _option(4, "windows a process computes at once; the step's gradient is summed over them")
    learning_rate: float = _option(1e-4, "at its highest")
    range_learning_rate: float = _option(1e-3, "of learned scales, which are logarithms")
    warmup: float = _option(0.05, "share of the steps over which the rate rises")
    final_rate: float = _option(0.1, "of the learning rate, where its cosine ends")
    weight_decay: float = _option(0.0, "AdamW's, of matrices")
    clip: float = _option(1.0, "largest norm of the gradient")
    start: float = _option(0.0, "share of the steps that are trained in float before rounding is switched on")
    precision: str = _option(
        "auto",
        "bf16: products in bfloat16, weights and sums in float32; auto is bf16 where the machine has it in hardware",
        choices=("auto", "bf16", "fp32"),
    )
    held_out: int = _option(8192, "tokens at the end of the text that are not trained on, to measure with")
    save_every: int = _option(100, "steps between checkpoints")
    log_every: int = _option(10, "steps between lines of the log")
    seed: int = _option(0, "of the order of windows and of what is drawn at random")

    def check(self) -> None:
        """Raises UsageError where options cannot be in force together."""
        for name in ("sequence_length", "batch_size", "micro_batch", "save_every", "log_every", "adapter_rank"):
            _demand(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("kl_share", "warmup", "start", "final_rate"):
            _demand(0 <= getattr(self, name) <= 1, name, getattr(self, name), "between 0 and 1")
        _demand(self.train != "ranges" or self.learn_ranges, "train", self.train, "given with --learn-ranges")
        _demand(self.start < 1, "start", self.start, "less than 1: the run must round in the end")


def add_options(parser: argparse.ArgumentParser, config: type[Any]) -> None:
    """A flag for every field, its help from the field."""
    types = get_type_hints(config)
    group = parser.add_argument_group("options")
    for each in dataclasses.fields(config):
        flag = "--" + each.name.replace("_", "-")
        text = f"{each.metadata['help']} ({each.default})"
        if types[each.name] is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=text)
        else:
            group.add_argument(flag, type=types[each.name], choices=each.metadata["choices"], default=None, help=text)


def given_options(arguments: argparse.Namespace, config: type[Any]) -> dict[str, Any]:
    """The fields whose flags were given."""
    values = {each.name: getattr(arguments, each.name) for each in dataclasses.fields(config)}
    return {name: value for name, value in values.items() if value is not None}


def _demand(holds: bool, name: str, found: object, expected: str) -> None:
    if not holds:
        raise UsageError(f"--{name.replace('_', '-')} is {found}; expected {expected}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Finalize:
    """What is to be made of what."""

    source: str  # a directory, or ORG/NAME on the hub
    out: Path
    recipe: str | None = None  # None: the recipe of a run
    step: int | None = None  # of a run: its last checkpoint
    head: str | None = None  # None: as the recipe says
    group_size: int | None = None
    dtype: str | None = None  # None: as the source has it
    format: str = "safetensors"
    max_shard_bytes: int = MAX_SHARD_BYTES
    dressing: Dressing = PLAIN
    eval_data: tuple[Path, ...] = ()  # to measure the loss with; a run has text of its own, held out of training
    max_tokens: int | None = None  # of that text

    @property
    def torch_dtype(self) -> torch.dtype | None:
        return DTYPES[self.dtype] if self.dtype else None

    @property
    def options(self) -> dict[str, Any]:
        """What was asked for beyond the recipe, for the provenance."""
        return {"head": self.head, "group_size": self.group_size, "dtype": self.dtype}


def without_dtype(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json without the older of its two names for the dtype."""
    return {key: value for key, value in config.items() if key != "torch_dtype"}
