"""`qserve-train recipes`: the table of recipes, and what can be done with each here."""

import argparse

from rich import box
from rich.console import Console
from rich.table import Table

from qserve.quant.recipe import HeadPolicy, Recipe
from qserve.quant.recipes import DEFAULT_RECIPE, RECIPES

_VERBS = {"make": "quantize", "run": "serve"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "List the recipes that --quantize knows: bits of a weight, weights that share a scale, whether a float model "
        "can be quantized so on this machine, and whether qserve serves the result on it."
    )


def run(options: argparse.Namespace) -> None:
    console = Console()
    console.print(_table())
    for recipe in RECIPES.values():
        for verb, name in _VERBS.items():
            if verb in recipe.refusals:
                console.print(f"{recipe.name}, {name}: {recipe.refusals[verb]}.", highlight=False)


def _table() -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("recipe", ratio=1)
    for name in ("bits", "group", *_VERBS.values()):
        table.add_column(name, no_wrap=True)
    for recipe in RECIPES.values():
        table.add_row(_described(recipe), str(recipe.bits), _group(recipe), *(_can(recipe, verb) for verb in _VERBS))
    heads = ", ".join(HeadPolicy)
    table.caption = f"* where to start; the head is chosen apart, with --head {heads}"
    return table


def _described(recipe: Recipe) -> str:
    star = " *" if recipe.name == DEFAULT_RECIPE else ""
    return f"[bold]{recipe.name}[/bold]{star}\n[dim]{recipe.notes}[/dim]"


def _group(recipe: Recipe) -> str:
    return "row" if recipe.group_size is None else str(recipe.group_size)


def _can(recipe: Recipe, verb: str) -> str:
    return "no" if verb in recipe.refusals else "yes"
