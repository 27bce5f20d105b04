"""The weight's side of a fake-quantized linear: rounding, learned ranges, an adapter; gradients go straight through.

torchao's FakeQuantizedLinear calls `weight_fake_quantizer(weight)`; `attach` puts a `WeightRounder` in that place. It
gives the values that torchao's own gives, in a fraction of the passes, and keeps them until the optimizer has changed
the weight: under gradient accumulation a weight is rounded once for each step.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qserve.errors import UsageError
from qserve.quant.apply import Plan
from qserve.quant.configs import Json
from qserve.quant.read import read_tensor
from qserve.quant.recipe import activation_of
from qserve.quant.tensors import make_tensor
from qserve.quant.weight import ActivationQuantization, QuantizedWeight
from training.artifact import values_of
from training.qat.activations import ActivationRounder
from training.qat.grids import Grid, Rounded, choose_ranges, grid_of, round_weight
from training.qat.sharding import own_rows
from training.qat.switch import Switch

_CHECKED_ROWS = 16  # enough for every format: float8 wants a multiple of 16


class Adapter(nn.Module):
    """A low-rank change of a weight, which is rounded together with it: the artifact holds no trace of it."""

    def __init__(self, weight: Tensor, *, rank: int, alpha: float, generator: torch.Generator) -> None:
        super().__init__()
        rows, columns = weight.shape
        self.strength = alpha / rank
        bound = 1 / math.sqrt(columns)
        self.down = nn.Parameter(torch.empty(rank, columns).uniform_(-bound, bound, generator=generator))
        self.up = nn.Parameter(torch.zeros(rows, rank))

    def forward(self, weight: Tensor) -> Tensor:
        return torch.addmm(weight, self.up, self.down, alpha=self.strength)


class Ranges(nn.Module):
    """Learned scales, and offsets where the grid has them. A scale is the exponential of what is learned: positive."""

    def __init__(self, weight: Tensor, grid: Grid, dtype: torch.dtype) -> None:
        super().__init__()
        self.grid = grid
        self.dtype = dtype
        groups = weight.shape[1] // (grid.group_size or weight.shape[1])
        self.log_scales = nn.Parameter(torch.zeros(weight.shape[0], groups))
        self.offsets = nn.Parameter(torch.zeros(weight.shape[0], groups)) if grid.has_offsets else None

    @torch.no_grad()
    def begin_at(self, weight: Tensor) -> None:
        scales, offsets = choose_ranges(own_rows(weight).to(self.dtype), self.grid)
        own_rows(self.log_scales).copy_(scales.float().log())
        if self.offsets is not None and offsets is not None:
            own_rows(self.offsets).copy_(offsets.float())

    @property
    def scales(self) -> Tensor:
        """As the artifact keeps them."""
        return self.grid.cast(self.log_scales.detach().exp(), self.dtype)

    def parts(self) -> dict[str, Tensor]:
        """What `make_tensor` is given."""
        offsets = {} if self.offsets is None else {"offsets": self.offsets.detach().to(self.dtype)}
        return {"scales": self.scales, **offsets}


class WeightRounder(nn.Module):
    """Gives the weight as the artifact of `dtype` will hold it."""

    def __init__(self, grid: Grid, dtype: torch.dtype, switch: Switch) -> None:
        super().__init__()
        self.grid = grid
        self.dtype = dtype
        self.switch = switch
        self.keeps_values = True
        self.num_calls = 0
        self.num_roundings = 0
        self.ranges: Ranges | None = None
        self.adapter: Adapter | None = None
        self._kept: tuple[tuple[Any, ...], Rounded] | None = None

    def forward(self, weight: Tensor) -> Tensor:
        merged = self.adapter(weight) if self.adapter is not None and self.switch.is_adapted else weight
        if not self.switch.is_on:
            return merged
        self.num_calls += 1
        rounded = self._rounded(weight, merged)
        if self.ranges is None:
            return _straight(merged, rounded.values)
        ranges = self.ranges
        return _ranged(merged, ranges.log_scales, ranges.offsets, rounded.values, rounded.inside, self.grid)

    def _rounded(self, weight: Tensor, merged: Tensor) -> Rounded:
        """Kept until it is told to `forget`, or something that decides it counts a version up."""
        key = tuple((id(tensor), tensor._version) for tensor in (weight, *self.parameters()))
        if self._kept is not None and self._kept[0] == (key, _compute_dtype(weight)):
            return self._kept[1]
        rounded = self.round(merged)
        self._kept = ((key, _compute_dtype(weight)), rounded) if self.keeps_values else None
        return rounded

    @torch.no_grad()
    def round(self, merged: Tensor) -> Rounded:
        self.num_roundings += 1
        parts: dict[str, Any] = self.ranges.parts() if self.ranges is not None else {}
        wants_inside = self.ranges is not None
        dtype = _compute_dtype(merged)
        return round_weight(merged.to(self.dtype), self.grid, wants_inside=wants_inside, dtype=dtype, **parts)

    def forget(self) -> None:
        """Let the kept values go."""
        self._kept = None


def _compute_dtype(weight: Tensor) -> torch.dtype:
    """What a linear multiplies in: under autocast another dtype than the weight's."""
    kind = weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


class _Straight(torch.autograd.Function):
    """The values going forward, the gradient going backward: nothing is clipped by more than half a step."""

    @staticmethod
    def forward(_: object, __: Tensor, values: Tensor) -> Tensor:
        return values.view_as(values)

    @staticmethod
    def backward(_: object, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _Ranged(torch.autograd.Function):
    """Learned step size (Esser et al. 2020, section 2.1), with an offset (Bhalgat et al. 2020, section 3.1).

        v = code * s + o        inside:   dv/dw = 1   dv/ds = (v - w) / s   dv/do = 0
                                outside:  dv/dw = 0   dv/ds = (v - o) / s   dv/do = 1

    and with s = exp(l), dv/dl = s * dv/ds.
    """

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        log_scales: Tensor,
        offsets: Tensor | None,
        values: Tensor,
        inside: Tensor,
        grid: Grid,
    ) -> Tensor:
        ctx.save_for_backward(weight, values, inside, offsets)
        ctx.group_size = grid.group_size or weight.shape[1]
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weight, values, inside, offsets = ctx.saved_tensors
        gradient = gradient.float()
        shape = (weight.shape[0], -1, ctx.group_size)  # (out_features, groups, group_size)
        center = torch.zeros((), device=weight.device) if offsets is None else offsets.unsqueeze(-1)
        origin = torch.where(inside.view(shape), weight.float().view(shape), center)
        of_scales = (values.float().view(shape) - origin).mul_(gradient.view(shape)).sum(-1)
        of_weight = gradient * inside
        of_offsets = None if offsets is None else (gradient - of_weight).view(shape).sum(-1)
        return of_weight.to(weight.dtype), of_scales, of_offsets, None, None, None


_straight: Callable[..., Tensor] = _Straight.apply
_ranged: Callable[..., Tensor] = _Ranged.apply


def attach(model: nn.Module, plan: Plan, dtype: torch.dtype, switch: Switch) -> dict[str, WeightRounder]:
    """Our rounders in the place of torchao's, for every layer of the plan; by name."""
    rounders: dict[str, WeightRounder] = {}
    shared: dict[tuple[str, ActivationQuantization], ActivationRounder] = {}
    for name, config in plan.chosen.items():
        module = model.get_submodule(name)
        grid = grid_of(config)
        assert grid is not None, config
        rounders[name] = module.weight_fake_quantizer = WeightRounder(grid, dtype, switch)
        kind = activation_of(config)
        if kind is not ActivationQuantization.NONE:
            key = (name.rpartition(".")[0], kind)
            shared.setdefault(key, ActivationRounder(kind, switch))
            module.activation_fake_quantizer = shared[key]
    return rounders


def require_exact(model: nn.Module, plan: Plan, dtype: torch.dtype) -> None:
    """Some rows of each shape, rounded as in training and converted as in the end: equal in every bit, or refused."""
    checked: set[tuple[int, str]] = set()
    for name, config in plan.chosen.items():
        weight = model.get_submodule(name).get_parameter("weight")
        key = (weight.shape[1], repr(config))
        if key in checked:
            continue
        checked.add(key)
        _require_exact_layer(name, weight[:_CHECKED_ROWS].detach().to(dtype), config, plan)


def _require_exact_layer(name: str, weight: Tensor, config: Json, plan: Plan) -> None:
    grid = grid_of(config)
    rows = torch.cat([weight] * -(-_CHECKED_ROWS // len(weight)))[:_CHECKED_ROWS]
    if grid is None or not torch.equal(round_weight(rows, grid).values, converted_values(name, rows, config, {})):
        raise UsageError(
            f"recipe {plan.recipe.name} would not convert exactly what was trained: {name} of {weight.dtype} differs "
            "between its fake quantizer and its tensor. Train another recipe, or quantize after training"
        )


def converted_values(name: str, weight: Tensor, config: Json, parts: Mapping[str, Tensor]) -> Tensor:
    """What the tensor of a weight stands for."""
    read = read_tensor(name, make_tensor(weight, config, **parts))
    assert isinstance(read, QuantizedWeight)
    return values_of(read)
