"""`qserve-train compare`: one table of what each way of quantizing a model costs and keeps, measured in one run.

A method is a row of METHODS: how its model is made, from which other, and whether a seed decides it. Everything that is
made or measured stays in the output directory, and the same command goes on from there.
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from qserve.checkpoint.contents import Checkpoint
from qserve.checkpoint.detect import detect
from qserve.checkpoint.hub import resolve
from qserve.errors import UsageError
from qserve.quant.recipe import HeadPolicy
from qserve.quant.recipes import DEFAULT_RECIPE, RECIPES
from training.config import Finalize, TrainOptions, add_options, given_options
from training.data import hashes, load_tokenizer, read_text, windows
from training.evaluate import load_model_or_run
from training.finalize import finalize
from training.plot import draw
from training.qat.finalize import finalize_run
from training.qat.model import source_of
from training.qat.prepare import Prepare, prepare
from training.qat.train import STOPPED, train
from training.report import CONTROL, FLOAT, RTN, Row, aggregate, markdown
from training.run import is_run, read_json, require_same, write_file
from training.scores import score
from training.served import Server, serving

_DESCRIPTION = """\
Make and measure: the float model, the same trained on (the control: what more
training does by itself), rounding to nearest, and QAT; on text that none of them
was trained on. Writes table.md, table.json and plot.svg. The same command goes on
where it was stopped, and measures nothing twice.
"""
_EXAMPLES = """\
examples:
  qserve-train compare model --data train.txt --eval-data valid.txt --out comparison --tokens 500000
  qserve-train compare model --data train.txt --eval-data valid.txt --out comparison --seeds 0 1 2 --learn-ranges
"""
_GENERATED = 128  # tokens, to measure speed with
CONTROL_RTN, QAT = "control + rtn", "qat"
# What concerns rounding, and not the control.
_OF_QAT = (
    "objective",
    "kl_share",
    "train",
    "adapter_rank",
    "adapter_alpha",
    "learn_ranges",
    "range_learning_rate",
    "start",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What is compared on what."""

    base: Path
    out: Path
    data: tuple[Path, ...]
    eval_data: tuple[Path, ...]
    recipe: str
    head: str | None
    group_size: int | None
    options: dict[str, Any]  # of training, as given
    window: int
    max_tokens: int | None

    def path(self, method: str, seed: int | None) -> Path:
        name = method.replace(" + ", "-")
        return self.out / (name if seed is None else f"{name}-seed{seed}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """One way to a model; `make` gives its directory, which it makes if it is not there."""

    make: Callable[[Comparison, int | None, Console], Path]
    is_seeded: bool


class Stopped(Exception):
    """Training was told to stop, and has committed its work."""


def _take_float(wanted: Comparison, _: int | None, __: Console) -> Path:
    return wanted.base


def _make_rtn(wanted: Comparison, _: int | None, console: Console) -> Path:
    return _round(wanted, wanted.base, wanted.path(RTN, None), console)


def _make_control(wanted: Comparison, seed: int | None, console: Console) -> Path:
    options = {name: value for name, value in wanted.options.items() if name not in _OF_QAT}
    plan = Prepare(base=str(wanted.base), run=_run_of(wanted, CONTROL, seed), recipe="float")
    return _train(wanted, CONTROL, seed, plan, options, console)


def _make_control_rtn(wanted: Comparison, seed: int | None, console: Console) -> Path:
    return _round(wanted, _make_control(wanted, seed, console), wanted.path(CONTROL_RTN, seed), console)


def _make_qat(wanted: Comparison, seed: int | None, console: Console) -> Path:
    plan = Prepare(
        base=str(wanted.base),
        run=_run_of(wanted, QAT, seed),
        recipe=wanted.recipe,
        head=wanted.head,
        group_size=wanted.group_size,
    )
    return _train(wanted, QAT, seed, plan, wanted.options, console)


METHODS: dict[str, Method] = {
    FLOAT: Method(make=_take_float, is_seeded=False),
    CONTROL: Method(make=_make_control, is_seeded=True),
    RTN: Method(make=_make_rtn, is_seeded=False),
    CONTROL_RTN: Method(make=_make_control_rtn, is_seeded=True),
    QAT: Method(make=_make_qat, is_seeded=True),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = _DESCRIPTION
    parser.epilog = _EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("base", metavar="BASE", help="a float checkpoint of transformers: its directory, or ORG/NAME on the hub")
    add("--out", type=Path, required=True, metavar="DIR", help="for models, runs and tables")
    add("--data", type=Path, nargs="+", required=True, metavar="PATH", help="text to train on")
    add("--eval-data", type=Path, nargs="+", required=True, metavar="PATH", help="text to measure with")
    add("--recipe", default=DEFAULT_RECIPE, metavar="R", help=", ".join(RECIPES))
    add("--head", choices=[policy.value for policy in HeadPolicy], help="how the output head is quantized (int8)")
    add("--group-size", type=int, metavar="N", help="weights that share a scale, instead of the recipe's own number")
    add("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), help="of these alone")
    add("--seeds", type=int, nargs="+", default=[0], metavar="N", help="each trained once")
    add("--window", type=int, default=512, metavar="N", help="tokens measured in one piece (%(default)s)")
    add("--max-tokens", type=int, metavar="N", help="of the text to measure with")
    add("--speed", action=argparse.BooleanOptionalAction, default=True, help="also serve each model and time it")
    add_options(parser, TrainOptions)


def run(options: argparse.Namespace) -> None:
    given = given_options(options, TrainOptions)
    if "seed" in given:
        raise UsageError("a comparison has --seeds, each trained once; leave out --seed")
    wanted = Comparison(
        base=resolve(options.base),
        out=options.out,
        data=tuple(options.data),
        eval_data=tuple(options.eval_data),
        recipe=options.recipe,
        head=options.head,
        group_size=options.group_size,
        options=given,
        window=options.window,
        max_tokens=options.max_tokens,
    )
    console = Console()
    try:
        rows = compare(wanted, methods=options.methods, seeds=options.seeds, wants_speed=options.speed, console=console)
    except Stopped:
        raise SystemExit(STOPPED) from None
    console.print(markdown(rows), highlight=False, soft_wrap=True)


def compare(
    wanted: Comparison, *, methods: Sequence[str], seeds: Sequence[int], wants_speed: bool, console: Console
) -> list[Row]:
    """The rows of the table, which is also written beside the models."""
    _require_same(wanted)
    found: list[dict[str, Any]] = []
    for name in (each for each in METHODS if each in {FLOAT, RTN, *methods}):
        for seed in seeds if METHODS[name].is_seeded else [None]:
            console.rule(name if seed is None else f"{name}, seed {seed}")
            path = METHODS[name].make(wanted, seed, console)
            found.append({"method": name, "seed": seed, **_measured(wanted, name, seed, path, wants_speed, console)})
    rows = aggregate(found)
    about = {"base": wanted.base.name, "recipe": wanted.recipe, "training": wanted.options, "seeds": list(seeds)}
    _write(wanted.out, rows, found, about)
    return rows


def _require_same(wanted: Comparison) -> None:
    """What stands in the output directory was made by the same comparison."""
    identity = {
        "source": source_of(wanted.base),
        "recipe": {"name": wanted.recipe, "head": wanted.head, "group_size": wanted.group_size},
        "training": wanted.options,
        "eval": {name: value for path in wanted.eval_data for name, value in hashes(path).items()},
        "window": wanted.window,
        "max_tokens": wanted.max_tokens,
    }
    file = wanted.out / "comparison.json"
    if file.is_file():
        require_same(read_json(file), identity, what=str(wanted.out))
    wanted.out.mkdir(parents=True, exist_ok=True)
    write_file(file, _json(identity))


def _measured(
    wanted: Comparison, name: str, seed: int | None, path: Path, wants_speed: bool, console: Console
) -> dict[str, Any]:
    """From the file of an earlier call, where there is one."""
    file = wanted.out / f"{wanted.path(name, seed).name}.json"
    known: dict[str, Any] = read_json(file) if file.is_file() else {}
    checkpoint = detect(path)
    if "loss" not in known:
        with console.status("measuring quality"):
            known |= _quality(wanted, checkpoint)
    if wants_speed and "tokens_per_second" not in known:
        with console.status("measuring speed"):
            known["tokens_per_second"] = _speed(path)
    write_file(file, _json(known))
    return known


def _quality(wanted: Comparison, checkpoint: Checkpoint) -> dict[str, Any]:
    text = read_text(wanted.eval_data, load_tokenizer(wanted.base), max_tokens=wanted.max_tokens)
    pieces = windows(text.tokens, min(wanted.window, len(text.tokens) - 1))
    reference = load_model_or_run(wanted.base)
    scores = score(load_model_or_run(checkpoint.path), pieces, reference=reference)
    weights = sum(info.num_values for info in detect(wanted.base).tensors.values())
    return {
        **dataclasses.asdict(scores),
        "perplexity": scores.perplexity,
        "bits_per_byte": scores.bits_per_byte(text.num_bytes / len(text.tokens)),
        "bytes": checkpoint.num_bytes,
        "bits_per_weight": 8 * checkpoint.num_bytes / weights,
    }


def _speed(path: Path) -> float:
    """Tokens a second of one greedy answer, the better of two after one to warm up."""
    with serving(path) as server:
        return max([_generate(server) for _ in range(3)][1:])


def _generate(server: Server) -> float:
    body = {"prompt": [1, 2, 3, 4], "max_tokens": _GENERATED, "temperature": 0, "ignore_eos": True}
    begin = time.perf_counter()
    made = server.complete(body)["usage"]["completion_tokens"]
    return float(made / (time.perf_counter() - begin))


# -- making -----------------------------------------------------------------------------------------------------------


def _round(wanted: Comparison, source: Path, out: Path, console: Console) -> Path:
    if not out.is_dir():
        plan = Finalize(
            source=str(source), out=out, recipe=wanted.recipe, head=wanted.head, group_size=wanted.group_size
        )
        finalize(plan, console=Console(quiet=True))
        console.print(f"made {out}", soft_wrap=True)
    return out


def _train(
    wanted: Comparison, method: str, seed: int | None, plan: Prepare, options: dict[str, Any], console: Console
) -> Path:
    out = wanted.path(method, seed)
    if out.is_dir():
        return out
    if not is_run(plan.run):
        prepare(plan, console=Console(quiet=True))
    if not train(plan.run, data=wanted.data, given={**options, "seed": seed}, console=console):
        raise Stopped
    finalize_run(Finalize(source=str(plan.run), out=out), console=console)
    return out


def _run_of(wanted: Comparison, method: str, seed: int | None) -> Path:
    return wanted.out / "runs" / wanted.path(method, seed).name


def _write(out: Path, rows: Sequence[Row], found: Sequence[dict[str, Any]], about: dict[str, Any]) -> None:
    if not rows:
        raise UsageError("nothing was compared")
    write_file(out / "table.md", markdown(rows))
    write_file(out / "table.json", _json({**about, "rows": [dataclasses.asdict(row) for row in rows], "all": found}))
    write_file(out / "plot.svg", draw(rows))


def _json(value: Any) -> str:
    return json.dumps(value, indent=2) + "\n"
