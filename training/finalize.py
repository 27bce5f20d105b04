"""`qserve-train finalize`: a float model or a run becomes the artifact that qserve serves.

A model is quantized by rounding; a run holds what was trained, and `training.qat.finalize` converts it. `qserve.quant`
knows how, `qserve.checkpoint` reads and writes; this joins them and says what became of every layer.
"""

import argparse
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from qserve.checkpoint.contents import Checkpoint
from qserve.checkpoint.detect import detect
from qserve.checkpoint.hub import resolve
from qserve.checkpoint.load import load_model
from qserve.checkpoint.save import CARRIED_FILES, MAX_SHARD_BYTES, save
from qserve.errors import UsageError
from qserve.quant.recipe import HeadPolicy
from qserve.quant.recipes import DEFAULT_RECIPE, RECIPES, find_recipe
from training.destination import require_absent, require_space
from training.run import Run, is_run, open_run, read_json
from training.source import describe_source

if TYPE_CHECKING:
    from training.account import Account

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_MEASURED = {
    "float": "of the float model, on text held out of training",
    "trained": "as it was trained",
    "artifact": "of the artifact",
}
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_DESCRIPTION = """\
Quantize a float model and write it, with tokenizer, chat template, generation
config and the record of what it was made from. The directory appears when it is
complete; a run that is cut off leaves nothing half-made.
"""
_EXAMPLES = """\
examples:
  qserve-train finalize model --out model-int4 --quantize int8-dynamic-act-int4-weight
  qserve-train finalize model --out model-int4 --quantize int4-weight-only --group-size 32 --head int8
  qserve-train finalize model --out model-int4 --quantize int4-weight-only --dry-run
  qserve-train finalize run --out model-int4

`qserve-train recipes` lists what --quantize knows.
"""


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

    @property
    def torch_dtype(self) -> torch.dtype | None:
        return _DTYPES[self.dtype] if self.dtype else None

    @property
    def options(self) -> dict[str, Any]:
        """What was asked for beyond the recipe, for the provenance."""
        return {"head": self.head, "group_size": self.group_size, "dtype": self.dtype}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = _DESCRIPTION
    parser.epilog = _EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add(
        "source",
        metavar="SOURCE",
        help="a run, or a float checkpoint of transformers: its directory, or ORG/NAME on the hub",
    )
    add("--out", type=Path, required=True, metavar="DIR", help="the new directory")
    add(
        "--quantize", metavar="RECIPE", help=f"{', '.join(RECIPES)}; start with {DEFAULT_RECIPE}. A QAT run has its own"
    )
    add("--step", type=int, metavar="N", help="of a run: the checkpoint to take, instead of the last")
    add(
        "--head",
        choices=[policy.value for policy in HeadPolicy],
        help="the output head: int8 per row (the default), the same as all other layers, or left float, for readers "
        "that take no quantized head (vLLM). The embedding always stays float",
    )
    add("--group-size", type=int, metavar="N", help="weights that share a scale, instead of the recipe's own number")
    add("--dtype", choices=list(_DTYPES), help="of what stays float, and of the scales; by default the source's")
    add("--format", choices=("safetensors", "bin"), default="safetensors", help="of the weight files")
    add("--max-shard-size", type=_size, default=MAX_SHARD_BYTES, metavar="SIZE", help="of one file, such as 500MB; 5GB")
    add("--dry-run", action="store_true", help="say what would be done, and write nothing")


def run(options: argparse.Namespace) -> None:
    plan = Finalize(
        source=options.source,
        out=options.out,
        recipe=options.quantize,
        step=options.step,
        head=options.head,
        group_size=options.group_size,
        dtype=options.dtype,
        format=options.format,
        max_shard_bytes=options.max_shard_size,
    )
    if is_run(Path(plan.source)):
        (rehearse_run if options.dry_run else finalize_run)(plan, console=Console())
    else:
        (rehearse if options.dry_run else finalize)(plan, console=Console())


def finalize(wanted: Finalize, *, console: Console) -> None:
    """Write the artifact as a whole or not at all, and print what became of each layer."""
    from qserve.quant.apply import quantize  # torchao: seconds

    checkpoint, model, account = _survey(wanted)
    require_space(wanted.out, account.bytes_after)
    with _progress(console) as advance:
        recipe = find_recipe(_named(wanted))
        report = quantize(model, recipe, head=wanted.head, group_size=wanted.group_size, progress=advance)
    assert report.bytes_after == account.bytes_after, (report.bytes_after, account.bytes_after)
    with console.status(f"writing {wanted.out}"):
        save(
            wanted.out,
            model.state_dict(),
            config=_config(checkpoint, model),
            recipe=report.recipe,
            source=checkpoint.home,
            provenance=_provenance(wanted, checkpoint),
            format=wanted.format,
            max_shard_bytes=wanted.max_shard_bytes,
        )
    _print(account, checkpoint, console)
    console.print(f"{wanted.out} is ready: qserve serve {wanted.out}", highlight=False, soft_wrap=True)


def rehearse(wanted: Finalize, *, console: Console) -> None:
    """Say everything that `finalize` would do; nothing is written."""
    checkpoint, _, account = _survey(wanted)
    _print(account, checkpoint, console)
    carried = [name for name in CARRIED_FILES if (checkpoint.home / name).is_file()]
    console.print(f"would carry {', '.join(carried) or 'no further files'}", highlight=False)
    console.print(f"would write {wanted.out} as {wanted.format}; this was a dry run", highlight=False, soft_wrap=True)


def finalize_run(wanted: Finalize, *, console: Console) -> None:
    """Write what a run has trained, as a whole or not at all."""
    from training.qat.finalize import finish  # torchao: seconds

    work = _own_run(wanted)
    home = Path(work.manifest["source"]["path"])
    require_space(wanted.out, sum(file.stat().st_size for file in work.find(wanted.step).iterdir()))
    trained = finish(work, step=wanted.step, console=console)
    with console.status(f"writing {wanted.out}"):
        save(
            wanted.out,
            trained.tensors,
            config={**_without_dtype(read_json(home / "config.json")), "dtype": work.manifest["dtype"]},
            recipe=trained.report.recipe if trained.report else None,
            source=home,
            provenance=trained.provenance,
            format=wanted.format,
            max_shard_bytes=wanted.max_shard_bytes,
        )
    for name, loss in trained.provenance["loss"].items():
        if name != "tokens":
            console.print(f"loss {loss:.6f} {_MEASURED[name]}", highlight=False)
    console.print(f"{wanted.out} is ready: qserve serve {wanted.out}", highlight=False, soft_wrap=True)


def rehearse_run(wanted: Finalize, *, console: Console) -> None:
    """Say what `finalize_run` would do; nothing is written."""
    work = _own_run(wanted)
    found = work.find(wanted.step)
    console.print(f"would make {wanted.out} of {found.name} of a run of {work.manifest['recipe']}", soft_wrap=True)
    console.print(f"would write it as {wanted.format} in {work.manifest['dtype']}; this was a dry run", highlight=False)


def _own_run(wanted: Finalize) -> Run:
    """The run that is the source; its manifest says what it becomes, and no option may say otherwise."""
    from training.qat.finalize import require_own_recipe

    require_absent(wanted.out)
    work = open_run(Path(wanted.source))
    if work.is_float and (wanted.recipe or wanted.head or wanted.group_size):
        raise UsageError(
            f"{work.path} is a float run: finalize it to a checkpoint, then quantize that one with --quantize"
        )
    asked = {"recipe": wanted.recipe, "head": wanted.head, "group_size": wanted.group_size, "dtype": wanted.dtype}
    require_own_recipe(work, asked)
    return work


def _survey(wanted: Finalize) -> tuple[Checkpoint, nn.Module, "Account"]:
    """The source, its model, and what the recipe would make of it; all that can be wrong is said here."""
    from transformers.utils import logging  # this one and torchao: seconds

    from qserve.quant.apply import make_plan
    from training.account import draw_up

    logging.disable_progress_bar()  # transformers' own, beside ours
    require_absent(wanted.out)
    recipe = find_recipe(_named(wanted))
    recipe.demand("make")
    checkpoint = detect(resolve(wanted.source))
    _require_float(checkpoint)
    model = load_model(checkpoint, dtype=wanted.torch_dtype)
    plan = make_plan(model, recipe, head=wanted.head, group_size=wanted.group_size)
    return checkpoint, model, draw_up(model, plan)


def _named(wanted: Finalize) -> str:
    if wanted.recipe is None:
        raise UsageError(
            f"{wanted.source} is no run, so it is quantized by rounding: name a recipe, --quantize {DEFAULT_RECIPE}"
        )
    return wanted.recipe


def _require_float(checkpoint: Checkpoint) -> None:
    if not checkpoint.is_quantized and checkpoint.recipe is None:
        return
    by = f" by the recipe {checkpoint.recipe.name}" if checkpoint.recipe else ""
    raise UsageError(
        f"{checkpoint.path} is quantized already{by}; rounding rounded weights again would add their errors. "
        "Start from the float model it was made from; its provenance.json may name it."
    )


def _config(checkpoint: Checkpoint, model: nn.Module) -> dict[str, Any]:
    """The source's config.json, with the dtype that the float tensors have now."""
    floats = Counter(parameter.dtype for parameter in model.parameters() if type(parameter.data) is torch.Tensor)
    return {**_without_dtype(checkpoint.config), "dtype": str(floats.most_common(1)[0][0]).removeprefix("torch.")}


def _without_dtype(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key != "torch_dtype"}


def _provenance(wanted: Finalize, checkpoint: Checkpoint) -> dict[str, Any]:
    local = Path(wanted.source)
    name = local.resolve().name if local.exists() else wanted.source
    return {
        "method": "rounding after training",
        "source": {"name": name, "sha256": describe_source(checkpoint.files)},
        "options": wanted.options,
    }


def _print(account: "Account", checkpoint: Checkpoint, console: Console) -> None:
    from training.account import summary, table

    console.print(table(account))
    console.print(summary(account), highlight=False)
    if not any((checkpoint.home / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        console.print(f"{checkpoint.home} has no tokenizer to carry; the artifact can be run on token ids alone")


@contextmanager
def _progress(console: Console) -> Iterator[Callable[[int, int, str], None]]:
    """A bar over the layers, with the name of the one under way."""
    columns = (
        TextColumn("quantizing"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=None)

        def advance(done: int, total: int, name: str) -> None:
            bar.update(task, completed=done, total=total, description=name)

        yield advance
        total = bar.tasks[0].total
        bar.update(task, completed=total or 0, description="")


def _size(text: str) -> int:
    """A size as people write it: 500MB, 5GB, or a number of bytes."""
    match = re.fullmatch(r"([\d.]+)\s*([KMG]?i?B?)", text.strip(), flags=re.IGNORECASE)
    unit = match[2].upper() if match else None
    if match is None or unit not in _UNITS:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; expected a number and KB, MB, GB, KiB, MiB or GiB")
    return int(float(match[1]) * _UNITS[unit])
