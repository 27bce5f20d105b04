"""Rounding in few passes is torchao's rounding: against its fake quantizers, and against the tensors it converts to."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qserve.errors import UsageError
from qserve.quant.apply import make_plan, prepare_qat
from qserve.quant.recipes import RECIPES, find_recipe
from qserve.quant.weight import ActivationQuantization
from tests.tiny import make_model
from training.qat.activations import ActivationRounder, round_activations
from training.qat.fake import Ranges, WeightRounder, attach, converted_values, require_exact
from training.qat.grids import choose_ranges, grid_of, round_weight
from training.qat.switch import Switch

TRAINABLE = sorted(set(RECIPES) - {"float8-dynamic-act-int4-weight", "int8-dynamic-act-int8-weight"})
IDS = torch.tensor([[5, 99, 3, 200, 17, 42]])


def small_model(**changes: Any) -> Any:
    return make_model(**{"hidden_size": 128, "num_hidden_layers": 1, **changes})


def rounders_of(model: nn.Module) -> dict[str, WeightRounder]:
    return {name: module for name, module in model.named_modules() if isinstance(module, WeightRounder)}


@pytest.mark.parametrize("name", TRAINABLE)
def test_the_prepared_model_computes_what_torchao_prepared(name: str) -> None:
    theirs = small_model()
    plan = prepare_qat(theirs, find_recipe(name))
    ours = copy.deepcopy(theirs)
    attach(ours, plan, torch.float32, Switch())
    with torch.no_grad():
        assert torch.equal(ours(IDS).logits, theirs(IDS).logits)


@pytest.mark.parametrize("name", TRAINABLE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_weight_is_rounded_to_what_its_tensor_gives_back(name: str, dtype: torch.dtype) -> None:
    weight = torch.randn(2064, 256, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(dtype)  # several blocks
    weight[3] = 0
    weight[4] = -0.25
    for config in {
        repr(config): config for config in make_plan(small_model(), find_recipe(name)).chosen.values()
    }.values():
        grid = grid_of(config)
        assert grid is not None
        assert torch.equal(round_weight(weight, grid).values, converted_values("w", weight, config, {}))


@pytest.mark.parametrize("name", [name for name in TRAINABLE if "float8" not in name])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_learned_ranges_are_carried_into_the_tensor(name: str, dtype: torch.dtype) -> None:
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)) * 0.02
    for config in make_plan(small_model(), find_recipe(name)).chosen.values():
        grid = grid_of(config)
        assert grid is not None
        rounder = WeightRounder(grid, dtype, Switch())
        rounder.ranges = Ranges(weight, grid, dtype)
        rounder.ranges.begin_at(weight)
        with torch.no_grad():
            for parameter in rounder.ranges.parameters():
                parameter += torch.randn_like(parameter) * 0.01
        trained = rounder(weight)
        assert (rounder.ranges.scales > 0).all()
        assert torch.equal(
            converted_values("w", weight.to(dtype), config, rounder.ranges.parts()).float(), trained.float()
        )


@pytest.mark.parametrize("name", ["intx-int2-weight-only", "int4-weight-only", "int8-weight-only"])
def test_ranges_begin_where_the_error_is_least(name: str) -> None:
    weight = torch.randn(32, 256, generator=torch.Generator().manual_seed(0))
    grid = grid_of(find_recipe(name).config)
    assert grid is not None
    scales, offsets = choose_ranges(weight, grid)
    usual = (round_weight(weight, grid).values - weight).square().sum()
    found = (
        (round_weight(weight, grid, scales=scales, offsets=offsets, wants_inside=True).values - weight).square().sum()
    )
    assert found <= usual * (0.7 if "int2" in name else 1)


def plain_ranged(weight: Tensor, log_scales: Tensor, offsets: Tensor | None, bounds: tuple[int, int]) -> Tensor:
    """The same rounding in torch's own operations, differentiated by torch."""
    scales = log_scales.exp().unsqueeze(-1)
    center = torch.zeros(()) if offsets is None else offsets.unsqueeze(-1)
    groups = (weight.view(*log_scales.shape, -1) - center) / scales
    codes = groups.clamp(*bounds)
    codes = codes + (codes.round() - codes).detach()
    return (codes * scales + center).view_as(weight)


@pytest.mark.parametrize("name", ["intx-int3-weight-only", "int4-weight-only", "int8-weight-only"])
def test_gradients_of_ranges_are_those_of_the_formula(name: str) -> None:
    weight = torch.randn(16, 256, generator=torch.Generator().manual_seed(0), requires_grad=True)
    grid = grid_of(find_recipe(name).config)
    assert grid is not None
    rounder = WeightRounder(grid, torch.float32, Switch())
    rounder.ranges = Ranges(weight, grid, torch.float32)
    rounder.ranges.begin_at(weight)
    learned = list(rounder.ranges.parameters())
    with torch.no_grad():
        rounder.ranges.log_scales -= 0.2  # so that no weight lies on an edge
    outer = torch.randn(16, 256, generator=torch.Generator().manual_seed(1))
    found = torch.autograd.grad((rounder(weight) * outer).sum(), [weight, *learned])
    low, high = getattr(grid, "bounds", (-8, 7))
    # What lies less than half a step outside rounds to the bound: clamping before rounding moves the edge by that.
    wider = (low - 0.49999, high + 0.49999)
    plain = plain_ranged(weight, rounder.ranges.log_scales, rounder.ranges.offsets, wider)
    wanted = torch.autograd.grad((plain * outer).sum(), [weight, *learned])
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    assert 0 < (found[0] == 0).sum() < weight.numel() / 4  # some are clipped


def test_a_weight_is_rounded_once_until_it_changes() -> None:
    model = small_model()
    plan = prepare_qat(model, find_recipe("int8-dynamic-act-int4-weight"))
    attach(model, plan, torch.float32, Switch())
    rounders = rounders_of(model)
    for _ in range(3):
        model(IDS, labels=IDS).loss.backward()
    assert {rounder.num_roundings for rounder in rounders.values()} == {1}
    assert {rounder.num_calls for rounder in rounders.values()} == {3}
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    model(IDS)
    assert {rounder.num_roundings for rounder in rounders.values()} == {2}


def test_projections_of_one_block_share_their_input() -> None:
    model = small_model()
    plan = prepare_qat(model, find_recipe("int8-dynamic-act-int4-weight"))
    attach(model, plan, torch.float32, Switch())
    rounder = model.model.layers[0].self_attn.q_proj.activation_fake_quantizer
    assert rounder is model.model.layers[0].self_attn.v_proj.activation_fake_quantizer
    seen = rounder(inputs := torch.randn(2, 3, 128))
    assert rounder(inputs) is seen
    assert rounder(inputs + 0) is not seen
    inputs.mul_(2)
    assert rounder(inputs) is not seen


def test_gradients_go_straight_through() -> None:
    weight = torch.randn(8, 64, requires_grad=True)
    grid = grid_of(find_recipe("intx-int2-weight-only").config)
    assert grid is not None
    outer = torch.randn(8, 64)
    (WeightRounder(grid, torch.bfloat16, Switch())(weight) * outer).sum().backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad, outer)
    inputs = torch.randn(4, 64, requires_grad=True)
    rounder = ActivationRounder(ActivationQuantization.INT8_ASYMMETRIC, Switch())
    (rounder(inputs) * outer[:4]).sum().backward()
    assert inputs.grad is not None
    assert torch.equal(inputs.grad, outer[:4])


@pytest.mark.parametrize("kind", ["int8-asymmetric", "int8-symmetric", "float8"])
def test_tokens_are_rounded_alone_and_zeros_stay(kind: str) -> None:
    inputs = torch.randn(5, 64) * torch.tensor([[1e-6], [1.0], [0.0], [1e4], [3.0]])
    rounded = round_activations(inputs, ActivationQuantization(kind))
    assert torch.equal(rounded[2], torch.zeros(64))
    assert torch.equal(rounded[3:4], round_activations(inputs[3:4], ActivationQuantization(kind)))
    assert ((rounded - inputs).abs().amax(-1) <= inputs.abs().amax(-1) * 0.04 + 1e-12).all()


def test_activations_that_are_not_known_are_refused() -> None:
    with pytest.raises(UsageError, match=r"nvfp4 cannot be computed here.*--through qserve"):
        round_activations(torch.zeros(1, 16), ActivationQuantization.NVFP4)


def test_what_would_differ_is_refused() -> None:
    model = small_model()
    plan = make_plan(model, find_recipe("float8-dynamic-act-int4-weight"))
    with pytest.raises(UsageError, match=r"float8-dynamic-act-int4-weight would not convert exactly.*q_proj"):
        require_exact(model, plan, torch.float32)
