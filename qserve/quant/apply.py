"""The verbs over a model: `quantize`, and `prepare_qat` then `convert_qat` around training.

All three follow one plan, made from the recipe and the width of each linear, so that what was trained is what is
converted and what config.json says. Knows no files; the model is transformers' or any torch module.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torchao.core.config import config_from_dict
from torchao.quantization import PerAxis, quantize_
from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig
from torchao.quantization.qat.linear import FakeQuantizedLinear

from qserve.errors import UsageError
from qserve.quant import configs
from qserve.quant.configs import Json
from qserve.quant.recipe import HeadPolicy, Recipe, describe, fitting_group_size
from qserve.quant.tensors import make_tensor

Progress = Callable[[int, int, str], None]  # done, of how many, the module under way

_INT8_CONFIGS = ("Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig")


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedLayer:
    """What became of one linear module."""

    name: str
    class_name: str  # of the tensor its weight is now
    config: str  # in words, as `describe` says it
    bits: int
    group_size: int | None  # None: one scale a row
    note: str = ""  # what differs from what the recipe asked for


@dataclass(frozen=True, slots=True, kw_only=True)
class SkippedLayer:
    """A matrix that stays as it was, and why."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What `quantize` did; `recipe.to_config()` is the block for config.json."""

    recipe: Recipe
    layers: tuple[QuantizedLayer, ...]
    skipped: tuple[SkippedLayer, ...]
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A config for each linear module of a model, None where it stays float, and remarks for the report."""

    recipe: Recipe
    modules: Mapping[str, Json | None]
    notes: Mapping[str, str]
    reasons: Mapping[str, str]

    @property
    def chosen(self) -> dict[str, Json]:
        return {name: config for name, config in self.modules.items() if config is not None}


def make_plan(
    model: nn.Module, recipe: Recipe, *, head: HeadPolicy | str | None = None, group_size: int | None = None
) -> Plan:
    """What the recipe means for this model; the head's name and policy are written into the plan's recipe."""
    if group_size is not None:
        recipe = recipe.with_group_size(group_size)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    head_name = _head_name(model, linears) or recipe.head_name
    recipe = replace(recipe, head=HeadPolicy(head or recipe.head), head_name=head_name)
    modules: dict[str, Json | None] = {}
    notes: dict[str, str] = {}
    reasons = _other_matrices(model)
    for name, module in linears.items():
        modules[name], remark = _fit(recipe.config_for(name), module)
        if remark:
            (reasons if modules[name] is None else notes)[name] = remark
    return Plan(recipe=recipe.resolved(modules), modules=modules, notes=notes, reasons=reasons)


def quantize(
    model: nn.Module,
    recipe: Recipe,
    *,
    head: HeadPolicy | str | None = None,
    group_size: int | None = None,
    progress: Progress | None = None,
) -> Report:
    """Quantizes the model's linears in place, on whatever machine this is.

    A head that is tied to the embedding gets a tensor of its own, and the config says so; the embedding stays float.
    """
    recipe.demand("make")
    _refuse_quantized(model)
    return _convert(model, make_plan(model, recipe, head=head, group_size=group_size), progress, {})


def prepare_qat(
    model: nn.Module, recipe: Recipe, *, head: HeadPolicy | str | None = None, group_size: int | None = None
) -> Plan:
    """Puts fake quantizers into the model, in place, whose rounding `convert_qat` repeats exactly.

    Raises UsageError where torchao has none that does. The plan goes to `convert_qat`.
    """
    recipe.demand("prepare")
    _refuse_quantized(model)
    plan = make_plan(model, recipe, head=head, group_size=group_size)
    modules = dict(model.named_modules())
    for name, config in plan.chosen.items():
        _refuse_divergent(plan.recipe, config, modules[name].weight)
    _untie_head(model, plan)
    for name, config in plan.chosen.items():
        _replace(model, name, _fake_quantized(modules[name], config))
    return plan


def convert_qat(
    model: nn.Module,
    plan: Plan,
    *,
    parts: Mapping[str, Mapping[str, Tensor]] | None = None,
    progress: Progress | None = None,
) -> Report:
    """Turns a model that `prepare_qat` prepared by this plan into a quantized one, in place.

    `parts` are scales, and offsets where the tensor keeps them, that were learned, for layers by name.
    """
    modules = dict(model.named_modules())
    missing = [name for name in plan.chosen if not isinstance(modules.get(name), FakeQuantizedLinear)]
    if missing:
        raise UsageError(f"{missing[0]} carries no fake quantizer; convert the model that was prepared by this plan")
    for name in plan.chosen:
        _replace(model, name, modules[name].to_linear())
    return _convert(model, plan, progress, parts or {})


def _convert(
    model: nn.Module, plan: Plan, progress: Progress | None, parts: Mapping[str, Mapping[str, Tensor]]
) -> Report:
    bytes_before = num_bytes(model)
    _untie_head(model, plan)
    layers = []
    for done, (name, config) in enumerate(plan.chosen.items()):
        if progress is not None:
            progress(done, len(plan.chosen), name)
        module = model.get_submodule(name)
        weight = make_tensor(module.get_parameter("weight"), config, **parts.get(name, {}))
        module.weight = nn.Parameter(weight, requires_grad=False)
        layers.append(_describe_layer(name, weight, config, plan))
    if not layers:
        raise UsageError(
            f"no layer could be quantized with {plan.recipe.name}: "
            + "; ".join(f"{name}: {reason}" for name, reason in list(plan.reasons.items())[:3])
        )
    return Report(
        recipe=plan.recipe,
        layers=tuple(layers),
        skipped=tuple(SkippedLayer(name=name, reason=reason) for name, reason in plan.reasons.items()),
        bytes_before=bytes_before,
        bytes_after=num_bytes(model),
    )


def num_bytes(model: nn.Module) -> int:
    """Of all parameters, a shared one counted once and a quantized one by what it keeps."""
    return sum(_tensor_bytes(parameter) for parameter in model.parameters())


# -- the plan ---------------------------------------------------------------------------------------------------------


def _head_name(model: nn.Module, linears: Mapping[str, nn.Linear]) -> str | None:
    find = getattr(model, "get_output_embeddings", None)
    output = find() if callable(find) else None
    return next((name for name, module in linears.items() if module is output), None)


def _fit(config: Json | None, module: nn.Linear) -> tuple[Json | None, str]:
    """The config with a group size that divides this linear's width, and a remark where that is another one."""
    if config is None:
        return None, "the recipe leaves the head as it is"
    rows, columns = module.weight.shape
    if config["_type"] == "Float8DynamicActivationFloat8WeightConfig" and (rows % 16 or columns % 16):
        return None, f"its shape {rows} x {columns} is not a multiple of 16, which float8 kernels need"
    asked = configs.group_size_of(config)
    if asked is None:
        return config, ""
    fitting = fitting_group_size(columns, asked)
    if fitting == asked:
        return config, ""
    changed = None if fitting is None else configs.with_group_size(config, fitting)
    if changed is None or configs.group_size_of(changed) != fitting:
        return None, f"its in_features {columns} is not a multiple of the group size {asked}, nor of a smaller one"
    return changed, f"group size {fitting}, because in_features {columns} is not a multiple of {asked}"


def _other_matrices(model: nn.Module) -> dict[str, str]:
    """Matrices outside linears and embeddings: named in the report, never silently left out."""
    reasons = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            continue
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.ndim >= 2:
                reasons[f"{name}.{key}".lstrip(".")] = f"it is part of a {type(module).__name__}, not of a linear layer"
    return reasons


def _untie_head(model: nn.Module, plan: Plan) -> None:
    """Gives a head that is to be quantized a weight of its own, and makes the config say that it is not tied."""
    if plan.modules.get(plan.recipe.head_name) is None:
        return
    find = getattr(model, "get_input_embeddings", None)
    embedding = find() if callable(find) else None
    head = model.get_submodule(plan.recipe.head_name)
    if embedding is not None and head.weight is embedding.weight:
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
    config: Any = getattr(model, "config", None)
    text_config = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    for each in (config, text_config):
        if getattr(each, "tie_word_embeddings", False):
            each.tie_word_embeddings = False


def _refuse_quantized(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "tensor_data_names") or not parameter.is_floating_point():
            raise UsageError(f"{name} is quantized already ({type(parameter).__name__}); start from the float model")
    for name, module in model.named_modules():
        if isinstance(module, FakeQuantizedLinear):
            raise UsageError(
                f"{name} carries a fake quantizer already; convert that run, or start from the float model"
            )


# -- one layer --------------------------------------------------------------------------------------------------------


def _describe_layer(name: str, weight: Tensor, config: Json, plan: Plan) -> QuantizedLayer:
    bits = configs.bits_of(config)
    assert bits is not None
    return QuantizedLayer(
        name=name,
        class_name=type(weight).__name__,
        config=describe(config),
        bits=bits,
        group_size=configs.group_size_of(config),
        note=plan.notes.get(name, ""),
    )


def _tensor_bytes(tensor: Tensor) -> int:
    names = [*getattr(tensor, "tensor_data_names", ()), *getattr(tensor, "optional_tensor_data_names", ())]
    if not names:
        return tensor.nbytes
    return sum(part.nbytes for name in names if (part := getattr(tensor, name, None)) is not None)


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _refuse_divergent(recipe: Recipe, config: Json, weight: Tensor) -> None:
    """int4's fake quantizer keeps float32 scales, the tensor keeps the weight's dtype: equal in float32 alone."""
    if config["_type"] == "Int4WeightOnlyConfig" and weight.dtype != torch.float32:
        raise UsageError(
            f"recipe {recipe.name} trains exactly in float32 alone, and the model is {weight.dtype}; load it in float32"
        )


def _fake_quantized(module: nn.Module, config: Json) -> nn.Module:
    holder = nn.Sequential(module)
    quantize_(holder, _qat_config(config))
    return holder[0]


def _qat_config(config: Json) -> QATConfig:
    if config["_type"] not in _INT8_CONFIGS:
        return QATConfig(config_from_dict(config), step="prepare")
    # torchao derives none for int8: one scale a row in float32, as the tensor keeps it.
    is_dynamic = config["_type"] == "Int8DynamicActivationInt8WeightConfig"
    activation = IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False) if is_dynamic else None
    weight = IntxFakeQuantizeConfig(torch.int8, PerAxis(0), is_symmetric=True)
    return QATConfig(activation_config=activation, weight_config=weight, step="prepare")
