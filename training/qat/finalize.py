"""A run becomes what was trained: a QAT run an artifact, a float run a checkpoint. `finalize` is the word.

The artifact holds every weight that training computed with, to the last bit: both are compared before a byte is
written, and the loss is measured before and after.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from qserve.checkpoint.save import save
from qserve.errors import UsageError
from qserve.quant.apply import Report, convert_qat
from training.artifact import cast, make_measurable
from training.config import Finalize, TrainOptions, without_dtype
from training.data import windows
from training.destination import require_absent, require_space
from training.dressing import dress
from training.measured import Passage, read_passage, tell
from training.qat.loop import num_steps
from training.qat.model import Trainee, build, load_source
from training.qat.state import load_parameters
from training.run import DATA, Json, Run, open_run, read_json, read_tensors
from training.scores import score

_EQUAL = 1e-6  # of the losses before and after conversion


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """What a run gives to `save`."""

    tensors: Mapping[str, Tensor]
    report: Report | None  # None: a float run
    provenance: Json


def finalize_run(wanted: Finalize, *, console: Console) -> None:
    """Write what a run has trained, as a whole or not at all."""
    work = _own_run(wanted)
    home = Path(work.manifest["source"]["path"])
    require_space(wanted.out, sum(file.stat().st_size for file in work.find(wanted.step).iterdir()))
    trained = finish(work, step=wanted.step, passage=_passage(wanted, work, home), console=console)
    with console.status(f"writing {wanted.out}"):
        save(
            wanted.out,
            trained.tensors,
            config={**without_dtype(read_json(home / "config.json")), "dtype": work.manifest["dtype"]},
            recipe=trained.report.recipe if trained.report else None,
            source=home,
            files=dress(wanted.dressing, None, home),
            provenance=trained.provenance,
            format=wanted.format,
            max_shard_bytes=wanted.max_shard_bytes,
        )
    tell(trained.provenance["loss"], console)
    _tell_unfinished(work, trained.provenance["step"], trained.provenance["steps"], console)
    console.print(f"{wanted.out} is ready: qserve serve {wanted.out}", highlight=False, soft_wrap=True)


def rehearse_run(wanted: Finalize, *, console: Console) -> None:
    """Say what `finalize_run` would do; nothing is written."""
    work = _own_run(wanted)
    home = Path(work.manifest["source"]["path"])
    found, passage = work.find(wanted.step), _passage(wanted, work, home)
    console.print(f"would make {wanted.out} of {found.name} of a run of {work.manifest['recipe']}", soft_wrap=True)
    _tell_unfinished(work, work.read(found)[0]["step"], _planned_steps(work), console)
    console.print(f"would measure the loss on {passage.about['tokens']:,} tokens", highlight=False)
    if files := dress(wanted.dressing, None, home):
        console.print(f"would write anew {', '.join(files)}", highlight=False)
    console.print(f"would write it as {wanted.format} in {work.manifest['dtype']}; this was a dry run", highlight=False)


def _tell_unfinished(run: Run, step: int, steps: int, console: Console) -> None:
    if step < steps:
        told = f"this is step {step} of {steps}, with a learning rate still high: qserve-train train --run {run.path}"
        console.print(f"{told} goes on", highlight=False, soft_wrap=True)


def _planned_steps(run: Run) -> int:
    options = TrainOptions(**run.manifest["training"]["options"])
    text = read_tensors(run.path / DATA)["train"]
    return num_steps(options, num_windows=len(windows(text, options.sequence_length)))


def _own_run(wanted: Finalize) -> Run:
    """The run that is the source; its manifest says what it becomes, and no option may say otherwise."""
    require_absent(wanted.out)
    work = open_run(Path(wanted.source))
    if work.is_float and (wanted.recipe or wanted.head or wanted.group_size):
        raise UsageError(
            f"{work.path} is a float run: finalize it to a checkpoint, then quantize that one with --quantize"
        )
    if wanted.dressing.tokens:
        raise UsageError(
            "new tokens change what a run was trained on: add them to its base (finalize BASE --out DIR --add-tokens "
            "FILE), and prepare a run of that"
        )
    asked = {"recipe": wanted.recipe, "head": wanted.head, "group_size": wanted.group_size, "dtype": wanted.dtype}
    require_own_recipe(work, asked)
    return work


def finish(run: Run, *, step: int | None, passage: Passage, console: Console) -> Trained:
    """The tensors of the run's checkpoint of `step`, by default the last, and how they were come by."""
    state, trainee = load_trained(run, step=step)
    trainee.settle()
    measured: Json = passage.about
    with console.status("measuring the loss of what was trained"):
        if not run.is_float:
            measured["float"] = score(load_source(run.manifest["source"]), passage.windows).loss
        measured["trained"] = score(trainee.model, passage.windows).loss
    provenance = _provenance(run, state)
    if trainee.plan is None:
        cast(trainee.model, trainee.dtype)
        return Trained(tensors=trainee.model.state_dict(), report=None, provenance={**provenance, "loss": measured})
    report, tensors = _convert(trainee)
    with console.status("measuring the loss of the artifact"):
        measured["artifact"] = score(trainee.model, passage.windows).loss
    _require_equal(measured)
    return Trained(tensors=tensors, report=report, provenance={**provenance, "loss": measured})


def load_trained(run: Run, *, step: int | None = None) -> tuple[Json, Trainee]:
    """The state of a checkpoint and the model in it, which rounds as it did in training."""
    if "training" not in run.manifest:
        raise UsageError(f"{run.path} was never trained; run qserve-train train --run {run.path} --data TEXT first")
    state, tensors = run.read(run.find(step))
    trainee = build(run, TrainOptions(**run.manifest["training"]["options"]))
    load_parameters(tensors, trainee.trainable())
    trainee.model.eval().requires_grad_(False)
    return state, trainee


def require_own_recipe(run: Run, given: Mapping[str, Any]) -> None:
    """What a QAT run was trained for is what it becomes: other wishes are refused, the same ones may be said again."""
    for name, value in given.items():
        own = run.manifest.get(name)
        if value is not None and value != own:
            raise UsageError(
                f"{run.path} was trained with {name.replace('_', ' ')} {own}, not {value}: its weights were taught to "
                f"be rounded so, and no other way. Leave the option out, or prepare a run with {value}"
            )


def _convert(trainee: Trainee) -> tuple[Report, dict[str, Tensor]]:
    """The quantized tensors; the model goes on as a float model that computes with their values."""
    assert trainee.plan is not None
    parts = {name: rounder.ranges.parts() for name, rounder in trainee.rounders.items() if rounder.ranges is not None}
    trained = {name: rounder.round(trainee.weight(name)).values for name, rounder in trainee.rounders.items()}
    cast(trainee.model, trainee.dtype)
    report = convert_qat(trainee.model, trainee.plan, parts=parts)
    tensors = {name: tensor.detach() for name, tensor in trainee.model.state_dict().items()}
    make_measurable(trainee.model)
    for name, values in trained.items():
        assert torch.equal(trainee.weight(name), values), f"{name} was not converted to what was trained"
    return report, tensors


def _passage(wanted: Finalize, run: Run, home: Path) -> Passage:
    """The text that was asked for, or what the run has held out of training."""
    if wanted.eval_data:
        return read_passage(wanted.eval_data, home, max_tokens=wanted.max_tokens)
    tokens = read_tensors(run.path / DATA)["held_out"]
    length = min(run.manifest["training"]["options"]["sequence_length"], len(tokens) - 1)
    return Passage(windows=windows(tokens, length))


def _require_equal(measured: Mapping[str, Any]) -> None:
    gap = abs(measured["artifact"] - measured["trained"])
    assert gap <= _EQUAL, f"the loss was {measured['trained']} before conversion and is {measured['artifact']} after"


def _provenance(run: Run, state: Json) -> Json:
    source = run.manifest["source"]
    return {
        "method": "float training" if run.is_float else "quantization-aware training",
        "source": {"name": Path(source["path"]).name, "sha256": source["sha256"]},
        "step": state["step"],
        "steps": _planned_steps(run),
        "dtype": run.manifest["dtype"],
        "training": run.manifest["training"],
        "trained_with": run.manifest["versions"],
    }
