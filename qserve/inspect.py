"""`qserve inspect`: what a checkpoint is, what its tensors are, and which kernel each will use on this machine.

Reads headers and, to ask the kernels, one weight of each kind. Loads no model.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from qserve.checkpoint.agree import EMBEDDING
from qserve.checkpoint.contents import Checkpoint, TensorInfo
from qserve.checkpoint.detect import detect
from qserve.checkpoint.hub import resolve
from qserve.checkpoint.load import Weights, open_weights
from qserve.checkpoint.save import read_provenance
from qserve.kernels.arena import Arena
from qserve.kernels.build import KernelsUnavailable, choose_variant, find_compiler
from qserve.kernels.native import pack_linear
from qserve.kernels.reference import ReferenceOps
from qserve.quant.recipe import HeadPolicy
from qserve.quant.weight import ActivationQuantization, QuantizedWeight

_WIDTH_OF_FILES = 120
_HEADS = ("lm_head", "embed_out", "output_projection")
_DESCRIPTION = """\
Tell what a checkpoint holds: how it is quantized and how that is known, its tensors by kind and size, what is left
float and why, and which kernel each kind will use on this machine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """Tensors that are stored alike and serve alike."""

    role: str  # linear, head, embedding, vector, other
    stored_as: str  # torchao's class, or the dtype
    bits: int
    group_size: int | None  # None for float tensors and for one scale a row
    activation: str  # how the linear's input is quantized
    num_tensors: int
    num_values: int
    num_bytes: int
    kernel: str
    reason: str  # why it is float in a quantized checkpoint

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.num_bytes / self.num_values


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """All that is told of a checkpoint."""

    path: str
    model_type: str
    format: str
    num_files: int
    recipe: str | None
    tier: str
    evidence: str
    warnings: tuple[str, ...]
    num_values: int
    num_bytes: int
    kinds: tuple[Kind, ...]
    provenance: Mapping[str, Any]

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.num_bytes / self.num_values


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = _DESCRIPTION
    parser.add_argument("model", metavar="MODEL", help="a directory or ORG/NAME")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of tables")


def run(arguments: argparse.Namespace) -> int:
    inspection = inspect_checkpoint(detect(resolve(arguments.model)))
    if arguments.json:
        print(json.dumps(to_json(inspection), indent=2))
    else:
        is_terminal = sys.stdout.isatty()
        print_tables(inspection, Console(width=None if is_terminal else _WIDTH_OF_FILES))
    return 0


def inspect_checkpoint(checkpoint: Checkpoint) -> Inspection:
    groups: dict[tuple[Any, ...], list[TensorInfo]] = {}
    for info in checkpoint.tensors.values():
        groups.setdefault(_likeness(info, checkpoint), []).append(info)
    weights = open_weights(checkpoint)
    kinds = [_kind(infos, checkpoint=checkpoint, weights=weights) for infos in groups.values()]
    return Inspection(
        path=str(checkpoint.path),
        model_type=checkpoint.config["model_type"],
        format=checkpoint.format,
        num_files=len(checkpoint.files),
        recipe=checkpoint.recipe.name if checkpoint.recipe else None,
        tier=checkpoint.tier,
        evidence=checkpoint.evidence,
        warnings=checkpoint.warnings,
        num_values=sum(info.num_values for info in checkpoint.tensors.values()),
        num_bytes=checkpoint.num_bytes,
        kinds=tuple(sorted(kinds, key=lambda kind: -kind.num_bytes)),
        provenance=read_provenance(checkpoint.home),
    )


def to_json(inspection: Inspection) -> dict[str, Any]:
    kinds = [{**asdict(kind), "bits_per_weight": round(kind.bits_per_weight, 3)} for kind in inspection.kinds]
    return {**asdict(inspection), "bits_per_weight": round(inspection.bits_per_weight, 3), "kinds": kinds}


def _likeness(info: TensorInfo, checkpoint: Checkpoint) -> tuple[Any, ...]:
    return _role(info), _stored_as(info), info.bits, _group_size(info), _reason(info, checkpoint)


def _group_size(info: TensorInfo) -> int | None:
    return info.group_size if info.is_quantized and info.group_size != info.shape[-1] else None


def _kind(infos: list[TensorInfo], *, checkpoint: Checkpoint, weights: Weights) -> Kind:
    first = min(infos, key=lambda info: info.num_bytes)
    role, kernel, activation = _role(first), "", ActivationQuantization.NONE
    if role in ("linear", "head"):
        kernel, activation = _kernel(weights, first.name)
    return Kind(
        role=role,
        stored_as=_stored_as(first),
        bits=first.bits if first.is_quantized else 8 * first.dtype.itemsize,
        group_size=_group_size(first),
        activation=activation,
        num_tensors=len(infos),
        num_values=sum(info.num_values for info in infos),
        num_bytes=sum(info.num_bytes for info in infos),
        kernel=kernel or "look-up" * (role == "embedding"),
        reason=_reason(first, checkpoint),
    )


def _role(info: TensorInfo) -> str:
    module = info.name.removesuffix(".weight")
    if len(info.shape) < 2:
        return "vector"
    if EMBEDDING.fullmatch(info.name):
        return "embedding"
    if module.endswith(_HEADS):
        return "head"
    return "linear" if len(info.shape) == 2 and module != info.name else "other"


def _stored_as(info: TensorInfo) -> str:
    return info.class_name if info.is_quantized else str(info.dtype).removeprefix("torch.")


def _reason(info: TensorInfo, checkpoint: Checkpoint) -> str:
    """Why a tensor of a quantized checkpoint is float."""
    if info.is_quantized or not checkpoint.is_quantized:
        return ""
    role, recipe = _role(info), checkpoint.recipe
    if role == "vector":
        return "norms and biases weigh next to nothing"
    if role == "embedding":
        is_tied = checkpoint.config.get("tie_word_embeddings", False)
        return "the head is tied to it" if is_tied else "rows are looked up, not multiplied"
    if role == "head":
        is_asked = recipe is None or recipe.head is HeadPolicy.FLOAT
        return "the recipe leaves the head float" if is_asked else "the recipe quantizes the head, the files do not"
    group_size = recipe.group_size if recipe else None
    if role == "linear" and group_size and info.shape[-1] % group_size:
        return f"its width {info.shape[-1]} is no multiple of the group size {group_size}"
    return "not among the modules that were quantized"


def _kernel(weights: Weights, name: str) -> tuple[str, ActivationQuantization]:
    """The kernel's name, asked of the kernels themselves, and how the linear's input is quantized."""
    weight = weights[name]
    activation = weight.activation if isinstance(weight, QuantizedWeight) else ActivationQuantization.NONE
    try:
        find_compiler()
    except KernelsUnavailable:
        return ReferenceOps(device=torch.device("cpu")).pack([weight], biases=[None]).kernel, activation
    return pack_linear(
        [weight], biases=[None], is_gated=False, variant=choose_variant(), arena=Arena()
    ).kernel, activation


def print_tables(inspection: Inspection, console: Console) -> None:
    console.print(_summary(inspection))
    console.print(_kinds(inspection.kinds))
    left = [kind for kind in inspection.kinds if kind.reason]
    if left:
        console.print(_left_float(left))
    for warning in inspection.warnings:
        console.print(f"warning: {warning}", style="yellow", markup=False)


def _summary(inspection: Inspection) -> Table:
    rows = {
        "model": f"{inspection.model_type}, {inspection.num_values:,} values",
        "files": f"{inspection.num_files} {inspection.format}, {_mebibytes(inspection.num_bytes)}",
        "recipe": inspection.recipe or "none",
        "known from": f"{inspection.tier}: {inspection.evidence}",
        "bits per weight": f"{inspection.bits_per_weight:.2f}",
        **{key: value for key, value in inspection.provenance.items() if isinstance(value, str) and key != "recipe"},
    }
    table = Table(title=inspection.path, show_header=False, title_justify="left", box=box.SIMPLE)
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _kinds(kinds: Iterable[Kind]) -> Table:
    table = Table(
        title="tensors by kind; bits: of a code, and stored for a weight", title_justify="left", box=box.SIMPLE
    )
    numbers = ("number", "MiB", "bits", "stored")
    for heading in ("what", "as", *numbers, "group", "input", "kernel here"):
        side, is_long = "right" if heading in numbers else "left", heading in ("as", "input")
        table.add_column(heading, justify=side, overflow="fold", no_wrap=not is_long)  # type: ignore[arg-type]
    for kind in kinds:
        is_quantized = kind.stored_as.endswith("Tensor")
        table.add_row(
            kind.role,
            kind.stored_as.removesuffix("Tensor"),
            str(kind.num_tensors),
            f"{kind.num_bytes / 2**20:,.2f}",
            str(kind.bits),
            f"{kind.bits_per_weight:.2f}",
            str(kind.group_size or "row") if is_quantized else "",
            "" if kind.activation == ActivationQuantization.NONE else kind.activation,
            kind.kernel,
        )
    return table


def _left_float(kinds: Iterable[Kind]) -> Table:
    table = Table("what", "number", "size", "why", title="left float", title_justify="left", box=box.SIMPLE)
    for kind in kinds:
        table.add_row(kind.role, str(kind.num_tensors), _mebibytes(kind.num_bytes), kind.reason)
    return table


def _mebibytes(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.2f} MiB"
