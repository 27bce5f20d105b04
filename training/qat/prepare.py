"""`qserve-train prepare`: a float model and a recipe become a run; what would not convert exactly is refused here.

Nothing is trained and no weight is written: a run begins as its manifest.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from qserve.checkpoint.hub import resolve
from qserve.errors import UsageError
from qserve.quant.apply import make_plan, prepare_qat
from qserve.quant.recipe import HeadPolicy
from qserve.quant.recipes import DEFAULT_RECIPE, RECIPES, find_recipe
from training.account import draw_up, summary, table
from training.config import DTYPES
from training.qat.fake import require_exact
from training.qat.model import FLOAT, load_source, source_of, stored_dtype
from training.run import Run, create_run

_DESCRIPTION = """\
Begin a run: say what is to be trained, and what it will become. The recipe
`float` trains without rounding, for a control on the same text or a model from
nothing (a directory with config.json and a tokenizer, and no weights).
"""
_EXAMPLES = """\
examples:
  qserve-train prepare model --recipe int8-dynamic-act-int4-weight --run run
  qserve-train prepare model --recipe int4-weight-only --group-size 32 --head same --run run
  qserve-train prepare model --recipe float --run control
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepare:
    """What a run is to be."""

    base: str  # a directory, or ORG/NAME on the hub
    run: Path
    recipe: str
    head: str | None = None  # None: as the recipe says
    group_size: int | None = None
    dtype: str | None = None  # None: as the base has it


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = _DESCRIPTION
    parser.epilog = _EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("base", metavar="BASE", help="a float checkpoint of transformers: its directory, or ORG/NAME on the hub")
    add("--recipe", default=DEFAULT_RECIPE, metavar="R", help=f"{FLOAT}, {', '.join(RECIPES)}")
    add("--run", type=Path, required=True, metavar="DIR", help="the new run's directory")
    add("--head", choices=[policy.value for policy in HeadPolicy], help="how the output head is quantized (int8)")
    add("--group-size", type=int, metavar="N", help="weights that share a scale, instead of the recipe's own number")
    add("--dtype", choices=list(DTYPES), help="of the artifact's scales and of what stays float; the base's own")


def run(options: argparse.Namespace) -> None:
    wanted = Prepare(
        base=options.base,
        run=options.run,
        recipe=options.recipe,
        head=options.head,
        group_size=options.group_size,
        dtype=options.dtype,
    )
    prepare(wanted, console=Console())


def prepare(wanted: Prepare, *, console: Console) -> Run:
    """Refuse what cannot be done, print what each layer will be, and write the run."""
    source = source_of(resolve(wanted.base))
    dtype = wanted.dtype or stored_dtype(Path(source["path"]))
    manifest: dict[str, Any] = {"source": source, "recipe": wanted.recipe, "dtype": dtype}
    if wanted.recipe == FLOAT:
        if wanted.head or wanted.group_size:
            raise UsageError("the recipe float quantizes nothing; leave out --head and --group-size")
    else:
        manifest |= _rehearse(wanted, source, dtype, console)
    created = create_run(wanted.run, manifest)
    console.print(f"{wanted.run} is ready: qserve-train train --run {wanted.run} --data TEXT", soft_wrap=True)
    return created


def _rehearse(wanted: Prepare, source: dict[str, Any], dtype: str, console: Console) -> dict[str, Any]:
    """Prepare a model as training will, so that every refusal comes now; what the recipe was settled as."""
    recipe = find_recipe(wanted.recipe)
    recipe.demand("prepare")
    model = load_source(source)
    plan = make_plan(model, recipe, head=wanted.head, group_size=wanted.group_size)
    if not plan.chosen:
        raise UsageError(f"recipe {recipe.name} finds no layer of {wanted.base} that it could quantize")
    account = draw_up(model.to(DTYPES[dtype]), plan)
    require_exact(model, plan, DTYPES[dtype])
    prepare_qat(model.float(), recipe, head=wanted.head, group_size=wanted.group_size)
    console.print(table(account))
    console.print(summary(account), highlight=False)
    return {"head": str(plan.recipe.head), "group_size": wanted.group_size}
