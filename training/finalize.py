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
from qserve.quant.recipe import HeadPolicy, Recipe
from qserve.quant.recipes import DEFAULT_RECIPE, RECIPES, find_recipe
from training.artifact import load_for_measuring, make_measurable
from training.config import DTYPES, Finalize, without_dtype
from training.destination import require_absent, require_space
from training.dressing import CARRY, NONE, PRESETS, TEMPLATES, Dressing, dress, read_template, read_tokens
from training.measured import Passage, read_passage, tell
from training.run import is_run
from training.scores import score
from training.source import describe_source

if TYPE_CHECKING:
    from training.account import Account

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
  qserve-train finalize model --out model-int4 --quantize mixed --eval-data stories.txt --max-tokens 20000
  qserve-train finalize run --out model-int4

`qserve-train recipes` lists what --quantize knows.
"""


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
    add("--dtype", choices=list(DTYPES), help="of what stays float, and of the scales; by default the source's")
    add("--format", choices=("safetensors", "bin"), default="safetensors", help="of the weight files")
    add("--max-shard-size", type=_size, default=MAX_SHARD_BYTES, metavar="SIZE", help="of one file, such as 500MB; 5GB")
    add(
        "--add-tokens",
        type=Path,
        metavar="YAML",
        help="a list of tokens: token, special, init (mean, zero, copy), like",
    )
    add("--chat-template", metavar="NAME|FILE", help=f"instead of the source's: {', '.join(TEMPLATES)}, or a file")
    add("--stop", action="append", default=[], metavar="TOKEN", help="also ends a text; may be given several times")
    add(
        "--generation",
        choices=(CARRY, NONE, *PRESETS),
        default=CARRY,
        help="how to sample where a request does not say: as the source does, without a word, or by a preset",
    )
    add(
        "--eval-data",
        type=Path,
        nargs="+",
        default=(),
        metavar="PATH",
        help="measure the loss on this text, of the float model and of the artifact, and write both into "
        "provenance.json; a run is measured on what it held out of training, or on this",
    )
    add("--max-tokens", type=int, metavar="N", help="of the text to measure with")
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
        dressing=_dressing(options),
        eval_data=tuple(options.eval_data),
        max_tokens=options.max_tokens,
    )
    if is_run(Path(plan.source)):
        from training.qat.finalize import finalize_run, rehearse_run  # torchao: seconds

        (rehearse_run if options.dry_run else finalize_run)(plan, console=Console())
    else:
        (rehearse if options.dry_run else finalize)(plan, console=Console())


def _dressing(options: argparse.Namespace) -> Dressing:
    return Dressing(
        tokens=() if options.add_tokens is None else read_tokens(options.add_tokens),
        chat_template=None if options.chat_template is None else read_template(options.chat_template),
        stops=tuple(options.stop),
        generation=options.generation,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Survey:
    """The source, its model with rows for new tokens, and what is to be made of them."""

    checkpoint: Checkpoint
    model: nn.Module
    files: Mapping[str, str]  # that differ from the source's
    account: "Account | None"  # None: nothing is quantized
    passage: Passage | None  # None: the loss is not measured

    @property
    def num_bytes(self) -> int:
        if self.account is not None:
            return self.account.bytes_after
        return sum(parameter.nbytes for parameter in self.model.parameters())


def finalize(wanted: Finalize, *, console: Console) -> None:
    """Write the artifact as a whole or not at all, and print what became of each layer."""
    surveyed = _survey(wanted)
    require_space(wanted.out, surveyed.num_bytes)
    checkpoint, model = surveyed.checkpoint, surveyed.model
    recipe = None if surveyed.account is None else _quantize(wanted, surveyed, console)
    tensors, config = model.state_dict(), _config(checkpoint, model)
    losses = _losses(surveyed, console)
    with console.status(f"writing {wanted.out}"):
        save(
            wanted.out,
            tensors,
            config=config,
            recipe=recipe,
            source=checkpoint.home,
            files=surveyed.files,
            provenance=_provenance(wanted, checkpoint) | ({"loss": losses} if losses else {}),
            format=wanted.format,
            max_shard_bytes=wanted.max_shard_bytes,
        )
    _print(surveyed, console)
    tell(losses, console)
    console.print(f"{wanted.out} is ready: qserve serve {wanted.out}", highlight=False, soft_wrap=True)


def rehearse(wanted: Finalize, *, console: Console) -> None:
    """Say everything that `finalize` would do; nothing is written."""
    surveyed = _survey(wanted)
    _print(surveyed, console)
    home = surveyed.checkpoint.home
    carried = [name for name in CARRIED_FILES if (home / name).is_file() and name not in surveyed.files]
    console.print(f"would carry {', '.join(carried) or 'no further files'}", highlight=False)
    if surveyed.passage is not None:
        console.print(f"would measure the loss on {surveyed.passage.about['tokens']:,} tokens", highlight=False)
    if surveyed.files:
        console.print(f"would write anew {', '.join(surveyed.files)}", highlight=False)
    console.print(f"would write {wanted.out} as {wanted.format}; this was a dry run", highlight=False, soft_wrap=True)


def _quantize(wanted: Finalize, surveyed: _Survey, console: Console) -> Recipe:
    from qserve.quant.apply import quantize  # torchao: seconds

    assert surveyed.account is not None
    assert wanted.recipe is not None
    with _progress(console) as advance:
        recipe = find_recipe(wanted.recipe)
        report = quantize(surveyed.model, recipe, head=wanted.head, group_size=wanted.group_size, progress=advance)
    assert report.bytes_after == surveyed.num_bytes, (report.bytes_after, surveyed.num_bytes)
    return report.recipe


def _losses(surveyed: _Survey, console: Console) -> dict[str, Any]:
    """Before and after rounding. The model is a float model afterwards: its tensors have been taken before."""
    if surveyed.passage is None:
        return {}
    pieces = surveyed.passage.windows
    with console.status("measuring the loss of the float model"):
        before = score(load_for_measuring(surveyed.checkpoint), pieces).loss
    make_measurable(surveyed.model)
    with console.status("measuring the loss of the artifact"):
        after = score(surveyed.model, pieces).loss
    return {**surveyed.passage.about, "float": before, "artifact": after}


def _survey(wanted: Finalize) -> _Survey:
    """All that can be wrong is said here."""
    from transformers.utils import logging  # this one and torchao: seconds

    logging.disable_progress_bar()  # transformers' own, beside ours
    require_absent(wanted.out)
    if wanted.recipe is None and wanted.dressing.is_plain and wanted.dtype is None:
        raise UsageError(
            f"{wanted.source} is no run, so it is quantized by rounding: name a recipe, --quantize {DEFAULT_RECIPE}"
        )
    if wanted.step is not None:
        raise UsageError(f"{wanted.source} is no run and has no steps; leave out --step")
    checkpoint = detect(resolve(wanted.source))
    _require_float(checkpoint)
    model = load_model(checkpoint, dtype=wanted.torch_dtype)
    files = dress(wanted.dressing, model, checkpoint.home)
    passage = None
    if wanted.eval_data:
        passage = read_passage(wanted.eval_data, checkpoint.home, max_tokens=wanted.max_tokens)
    account = _account(wanted, model)
    return _Survey(checkpoint=checkpoint, model=model, files=files, account=account, passage=passage)


def _account(wanted: Finalize, model: nn.Module) -> "Account | None":
    if wanted.recipe is None:
        return None
    from qserve.quant.apply import make_plan
    from training.account import draw_up

    recipe = find_recipe(wanted.recipe)
    recipe.demand("make")
    return draw_up(model, make_plan(model, recipe, head=wanted.head, group_size=wanted.group_size))


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
    config = {**without_dtype(checkpoint.config), "dtype": str(floats.most_common(1)[0][0]).removeprefix("torch.")}
    text_config: Any = model.config
    if "vocab_size" in config:  # new tokens may have made it larger
        config["vocab_size"] = text_config.get_text_config(decoder=True).vocab_size
    return config


def _provenance(wanted: Finalize, checkpoint: Checkpoint) -> dict[str, Any]:
    local = Path(wanted.source)
    name = local.resolve().name if local.exists() else wanted.source
    return {
        "method": "rounding after training" if wanted.recipe else "none: a float model",
        "source": {"name": name, "sha256": describe_source(checkpoint.files)},
        "options": wanted.options,
    }


def _print(surveyed: _Survey, console: Console) -> None:
    from training.account import summary, table

    checkpoint, account = surveyed.checkpoint, surveyed.account
    if account is not None:
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
