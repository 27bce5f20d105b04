"""The model of a run: loaded or made fresh, with rounders in its linears, and what of it is trained.

Knows the manifest of a run and nothing of steps, optimizers and data.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qserve.checkpoint.contents import Checkpoint
from qserve.checkpoint.detect import detect
from qserve.checkpoint.load import load_model
from qserve.errors import NotACheckpoint, UsageError
from qserve.quant.apply import Plan, prepare_qat
from qserve.quant.recipes import find_recipe
from training.config import DTYPES, TrainOptions
from training.qat.fake import Adapter, Ranges, WeightRounder, attach
from training.qat.switch import Switch
from training.run import Run, read_json
from training.source import describe_source

FLOAT = "float"


@dataclass(slots=True, kw_only=True)
class Trainee:
    """A float32 model whose forward computes what the artifact will compute."""

    model: Any
    dtype: torch.dtype  # of the artifact
    plan: Plan | None = None  # None: a float run
    rounders: dict[str, WeightRounder] = field(default_factory=dict)
    switch: Switch = field(default_factory=Switch)

    def trainable(self) -> Iterator[tuple[str, nn.Parameter]]:
        yield from ((name, parameter) for name, parameter in self.model.named_parameters() if parameter.requires_grad)

    def weight(self, name: str) -> nn.Parameter:
        return self.model.get_submodule(name).weight  # type: ignore[no-any-return]

    @torch.no_grad()
    def begin_ranges(self) -> None:
        """Learned ranges begin where they fit the weights as they are now."""
        for name, rounder in self.rounders.items():
            if rounder.ranges is not None:
                rounder.ranges.begin_at(self.weight(name))

    @torch.no_grad()
    def settle(self) -> None:
        """Merge adapters and round to the artifact's dtype what stays float: no trained step sees these changes."""
        rounded = {id(self.weight(name)) for name in self.rounders}
        for name, rounder in self.rounders.items():
            if rounder.adapter is not None:
                self.weight(name).copy_(rounder.adapter(self.weight(name)))
                rounder.adapter = None
        for parameter in self.model.parameters():
            if id(parameter) not in rounded and not _is_ours(parameter, self.rounders):
                parameter.copy_(parameter.to(self.dtype))


def source_of(path: Path) -> dict[str, Any]:
    """What a manifest says of the source: where it lies and what it holds."""
    checkpoint = _detect(path)
    if checkpoint is None:
        return {"path": str(path.resolve()), "sha256": describe_source([path / "config.json"])}
    if checkpoint.is_quantized or checkpoint.recipe is not None:
        raise UsageError(
            f"{path} is quantized already; there is no training from rounded weights. Start from the float model it "
            "was made from (its provenance.json may name it), or go on with the run that made it"
        )
    return {
        "path": str(path.resolve()),
        "sha256": describe_source((checkpoint.home / "config.json", *checkpoint.files)),
    }


def load_source(source: dict[str, Any], *, seed: int = 0) -> Any:
    """The float32 model that a run began with; a config without weights gives a fresh one, drawn with `seed`."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # transformers' own, beside ours
    path = Path(source["path"])
    checkpoint = _detect(path)
    return fresh_model(path, seed=seed) if checkpoint is None else load_model(checkpoint, dtype=torch.float32)


def fresh_model(path: Path, *, seed: int) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM  # takes seconds

    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path), dtype=torch.float32)


def stored_dtype(path: Path) -> str:
    """The dtype that a checkpoint's weights have; a fresh model's config says it."""
    checkpoint = _detect(path)
    config = read_json(path / "config.json") if checkpoint is None else checkpoint.config
    told = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    return told if told in DTYPES else "float32"


def build(run: Run, options: TrainOptions) -> Trainee:
    """The model of a run before its first step. The same every time."""
    model = load_source(run.manifest["source"], seed=options.seed)
    dtype = DTYPES[run.manifest["dtype"]]
    if run.is_float:
        return Trainee(model=model, dtype=dtype)
    recipe = find_recipe(run.manifest["recipe"])
    plan = prepare_qat(model, recipe, head=run.manifest["head"], group_size=run.manifest["group_size"])
    trainee = Trainee(model=model, dtype=dtype, plan=plan)
    trainee.rounders = attach(model, plan, dtype, trainee.switch)
    _choose_trained(trainee, options)
    return trainee


def _choose_trained(trainee: Trainee, options: TrainOptions) -> None:
    generator = torch.Generator().manual_seed(options.seed)
    trainee.model.requires_grad_(options.train == "weights")
    for name, rounder in trainee.rounders.items():
        weight = trainee.weight(name)
        if options.train == "adapter":
            rank, alpha = options.adapter_rank, options.adapter_alpha
            rounder.adapter = Adapter(weight, rank=rank, alpha=alpha, generator=generator)
        if options.learn_ranges and rounder.grid.can_learn:
            rounder.ranges = Ranges(weight, rounder.grid, trainee.dtype)
    if options.learn_ranges and not any(rounder.ranges for rounder in trainee.rounders.values()):
        assert trainee.plan is not None
        raise UsageError(f"recipe {trainee.plan.recipe.name} has no ranges to learn; leave out --learn-ranges")


def _detect(path: Path) -> Checkpoint | None:
    """The checkpoint at `path`; None for a config without weights."""
    try:
        return detect(path)
    except NotACheckpoint:
        has_weights = [*path.glob("*.safetensors"), *path.glob("*.bin"), *path.glob("*.gguf")]
        if (path / "config.json").is_file() and not has_weights:
            return None
        raise


def _is_ours(parameter: Tensor, rounders: dict[str, WeightRounder]) -> bool:
    return any(parameter is own for rounder in rounders.values() for own in rounder.parameters())
