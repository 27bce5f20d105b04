"""Compiled linears: equal bits for integer recipes, small errors for float ones, no row that feels its neighbours."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from qserve.errors import UnsupportedWeight
from qserve.kernels.aligned_scales import align_scales
from qserve.kernels.native import NativeOps
from qserve.kernels.ops import Activation, Norm, NormKind
from qserve.kernels.packing import pack_weight
from qserve.kernels.reference import ReferenceOps
from qserve.kernels.reference_activations import ROUND_TRIPS
from qserve.kernels.reference_integer import exact_linear, integer_linear
from qserve.quant.weight import ActivationQuantization, QuantizedWeight, Weight
from tests.kernels.native import VARIANTS, make_inputs, make_weight, open_variant, relative_error

NONE = ActivationQuantization.NONE
ASYMMETRIC = ActivationQuantization.INT8_ASYMMETRIC
SYMMETRIC = ActivationQuantization.INT8_SYMMETRIC
FLOAT8 = ActivationQuantization.FLOAT8

ROWS = (1, 2, 3, 5, 8, 16, 17, 33, 64, 131)
REFERENCE = ReferenceOps(device=torch.device("cpu"))

INTEGER_WEIGHTS = {
    "int4-32": make_weight(96, 128, 32, activation=ASYMMETRIC),
    "int4-64-odd-n": make_weight(50, 192, 64, activation=ASYMMETRIC),
    "int4-16": make_weight(40, 128, 16, activation=ASYMMETRIC),
    "int4-16-zeros": make_weight(40, 192, 16, activation=ASYMMETRIC, has_zeros=True),
    "int4-32-wide": make_weight(20, 2176, 32, activation=ASYMMETRIC),
    "int4-32-symmetric-zeros": make_weight(40, 192, 32, activation=SYMMETRIC, has_zeros=True),
    "int4-32-rounded-scales": make_weight(40, 192, 32, activation=ASYMMETRIC, scale_dtype=torch.float32),
    "int4-32-half-step": make_weight(40, 160, 32, activation=ASYMMETRIC),
    "int4-128-zeros": make_weight(33, 256, 128, activation=ASYMMETRIC, has_zeros=True),
    "int4-20-tail": make_weight(33, 100, 20, activation=ASYMMETRIC),
    "int4-row-tail": make_weight(17, 72, 72, activation=SYMMETRIC),
    "int8-row": make_weight(70, 576, 576, bits=8, activation=SYMMETRIC, scale_dtype=torch.float32),
    "int8-row-tail": make_weight(33, 100, 100, bits=8, activation=ASYMMETRIC, scale_dtype=torch.float16),
    "int8-64-zeros": make_weight(50, 192, 64, bits=8, activation=ASYMMETRIC, has_zeros=True),
    "int8-row-slabs": make_weight(50, 1152, 1152, bits=8, activation=ASYMMETRIC),
    "int8-32": make_weight(31, 96, 32, bits=8, activation=SYMMETRIC),
}
ALIGNED_WEIGHTS = {  # with exact inputs
    "aligned-32": make_weight(96, 128, 32),
    "aligned-32-minimum": make_weight(50, 192, 32, has_offsets=True),
    "aligned-32-zeros": make_weight(33, 192, 32, has_zeros=True),
    "aligned-128-both": make_weight(33, 256, 128, has_zeros=True, has_offsets=True),
    "aligned-256-minimum": make_weight(20, 512, 256, has_offsets=True),
    "aligned-512": make_weight(20, 1024, 512),
    "aligned-16-float-scales": make_weight(40, 192, 16, has_offsets=True, scale_dtype=torch.float32),
    "aligned-20-tail": make_weight(33, 640, 20, has_offsets=True),
    "aligned-slabs": make_weight(40, 1536, 64, has_offsets=True),
    "aligned-wide": make_weight(20, 2176, 32),
}
EXACT_INPUT_WEIGHTS = {
    **ALIGNED_WEIGHTS,
    "int4-32-minimum": make_weight(96, 128, 32, has_offsets=True),
    "int4-32-zeros": make_weight(50, 192, 32, has_zeros=True),
    "int4-32-half-step": make_weight(20, 1120, 32, has_offsets=True),
    "int4-row": make_weight(30, 192, 192, scale_dtype=torch.float32),
    "int8-64": make_weight(50, 192, 64, bits=8, has_zeros=True, has_offsets=True),
    "int8-512": make_weight(20, 1024, 512, bits=8, scale_dtype=torch.float16),
    "int8-row": make_weight(70, 576, 576, bits=8),
    "int8-row-slabs": make_weight(50, 1000, 1000, bits=8, has_offsets=True),
    "int8-float8": make_weight(50, 192, 64, bits=8, activation=FLOAT8),
}
FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn, torch.float8_e5m2)


def apply(ops: NativeOps, weight: Weight, x: Tensor) -> Tensor:
    return ops.norm_linear(x, None, ops.pack([weight], biases=[None]))


def make_float(dtype: torch.dtype, *, activation: ActivationQuantization = NONE, groups: int = 1) -> Weight:
    values = (torch.randn(70, 192, generator=torch.Generator().manual_seed(1)) * 0.05).to(dtype)
    if dtype.itemsize > 1:
        return values
    scales = torch.rand(70, groups, generator=torch.Generator().manual_seed(2))
    return QuantizedWeight(
        codes=values, scales=scales, group_size=192 // groups, bits=8, dtype=torch.float32, activation=activation
    )


def values_of(weight: Weight) -> Tensor:
    return weight if isinstance(weight, Tensor) else weight.dequantize()


@pytest.mark.parametrize("name", INTEGER_WEIGHTS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_integer_recipes_equal_the_formula_to_the_bit(variant: str, name: str) -> None:
    weight = INTEGER_WEIGHTS[name]
    ops = open_variant(variant)
    for rows in ROWS:
        x = make_inputs(rows, weight.shape[1], seed=rows)
        assert torch.equal(apply(ops, weight, x), integer_linear(x, weight)), rows


@pytest.mark.parametrize("name", ALIGNED_WEIGHTS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_aligned_weights_with_exact_inputs_equal_the_formula_to_the_bit(variant: str, name: str) -> None:
    weight = ALIGNED_WEIGHTS[name]
    ops = open_variant(variant)
    for rows in (*ROWS, 4, 6, 9, 10, 21, 26):  # of one and two tiles of inputs, alone and behind others
        x = make_inputs(rows, weight.shape[1], seed=rows)
        x[-1] = 1 if rows % 2 else -1  # the largest sums that a group can have
        assert torch.equal(apply(ops, weight, x), exact_linear(x, weight)), rows


@pytest.mark.parametrize("name", EXACT_INPUT_WEIGHTS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_integer_weights_with_float_inputs_are_as_good_as_float(variant: str, name: str) -> None:
    weight = EXACT_INPUT_WEIGHTS[name]
    x = make_inputs(33, weight.shape[1])
    expected = ROUND_TRIPS[weight.activation](x).double() @ weight.dequantize().double().T
    limit = 2e-4 if align_scales(weight) is None else 3e-4  # 16 bits of a row's largest; aligned scales may be rounded
    assert relative_error(apply(open_variant(variant), weight, x), expected) < limit


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_float_weights(variant: str, dtype: torch.dtype) -> None:
    weight = make_float(dtype)
    x = make_inputs(33, 192)
    expected = x.double() @ values_of(weight).double().T
    assert relative_error(apply(open_variant(variant), weight, x), expected) < 1e-5


@pytest.mark.parametrize("activation", list(ActivationQuantization))
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_input_quantization(variant: str, activation: ActivationQuantization) -> None:
    in_features = 256
    weight = make_weight(40, in_features, 32, bits=8, activation=activation)
    x = make_inputs(9, in_features)
    expected = ROUND_TRIPS[activation](x).double() @ weight.dequantize().double().T
    assert relative_error(apply(open_variant(variant), weight, x), expected) < 1e-4


@pytest.mark.parametrize("activation", [NONE, FLOAT8])
@pytest.mark.parametrize("groups", [1, 6])
@pytest.mark.parametrize("variant", VARIANTS)
def test_float8_weights_with_groups_and_float8_inputs(
    variant: str, groups: int, activation: ActivationQuantization
) -> None:
    weight = make_float(torch.float8_e4m3fn, activation=activation, groups=groups)
    x = make_inputs(20, 192)
    expected = ROUND_TRIPS[activation](x).double() @ values_of(weight).double().T
    assert relative_error(apply(open_variant(variant), weight, x), expected) < 1e-5


BATCH_WEIGHTS: dict[str, Weight] = {
    **INTEGER_WEIGHTS,
    **EXACT_INPUT_WEIGHTS,
    **{str(dtype): make_float(dtype) for dtype in FLOAT_DTYPES},
    "float8-groups": make_float(torch.float8_e4m3fn, groups=6),
    "int8-row-minimum": make_weight(50, 192, 192, bits=8, activation=ASYMMETRIC, has_offsets=True),
}


@pytest.mark.parametrize("name", BATCH_WEIGHTS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_row_has_the_same_bits_in_any_batch_and_on_any_number_of_threads(variant: str, name: str) -> None:
    weight = BATCH_WEIGHTS[name]
    ops = open_variant(variant)
    linear = ops.pack([weight], biases=[None])
    x = make_inputs(64, weight.shape[1], seed=7)
    alone = torch.cat([ops.norm_linear(x[row : row + 1], None, linear) for row in range(64)])
    for rows in ROWS:
        assert torch.equal(ops.norm_linear(x[:rows], None, linear), alone[:rows]), rows
    cuts = [0, 3, 20, 21, 64]
    pieces = [ops.norm_linear(x[start:end], None, linear) for start, end in pairwise(cuts)]
    assert torch.equal(torch.cat(pieces), alone)
    assert torch.equal(open_variant(variant, 1).norm_linear(x, None, linear), alone)


LARGE_WEIGHTS: dict[str, Weight] = {  # whose inputs are cut, and whose channels take turns with a piece of them
    "int4-32": make_weight(1040, 1152, 32, activation=ASYMMETRIC),
    "int4-128": make_weight(1040, 1152, 128, activation=ASYMMETRIC),
    "aligned-32": make_weight(1040, 1152, 32, has_offsets=True),
    "int8-row": make_weight(1040, 1152, 1152, bits=8, activation=ASYMMETRIC),
    "bfloat16": make_weight(1040, 1152, 32).dequantize().to(torch.bfloat16),
    "float8": make_weight(1040, 1152, 32).dequantize().to(torch.float8_e4m3fn),
    # More results than the caches keep.
    "int4-32-many-channels": make_weight(4112, 64, 32, activation=ASYMMETRIC),
    "int8-row-many-channels": make_weight(4112, 64, 64, bits=8, activation=ASYMMETRIC),
    "bfloat16-many-channels": make_weight(4112, 64, 32).dequantize().to(torch.bfloat16),
}


@pytest.mark.parametrize("name", LARGE_WEIGHTS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_of_a_large_batch_have_the_bits_of_a_small_one(variant: str, name: str) -> None:
    check_large_batch(open_variant(variant), [LARGE_WEIGHTS[name]])


@pytest.mark.parametrize("variant", VARIANTS)
def test_so_have_channels_that_begin_off_the_lines_of_the_cache(variant: str) -> None:
    check_large_batch(open_variant(variant), [torch.randn(7, 64), LARGE_WEIGHTS["int8-row-many-channels"]])


def check_large_batch(ops: NativeOps, weights: list[Weight]) -> None:
    linear = ops.pack(weights, biases=[None] * len(weights))
    x = make_inputs(270, linear.in_features, seed=3)
    few = torch.cat([ops.norm_linear(x[start : start + 5], None, linear) for start in range(0, 270, 5)])
    assert torch.equal(ops.norm_linear(x, None, linear), few)


@pytest.mark.parametrize("name", EXACT_INPUT_WEIGHTS)
def test_variants_with_fused_multiply_add_agree(name: str) -> None:
    weight = EXACT_INPUT_WEIGHTS[name]
    x = make_inputs(20, weight.shape[1])
    results = [apply(open_variant(variant), weight, x) for variant in VARIANTS if variant != "portable"]
    assert all(torch.equal(result, results[0]) for result in results[1:])


@pytest.mark.parametrize("kind", list(NormKind))
@pytest.mark.parametrize("variant", VARIANTS)
def test_weights_of_different_kinds_side_by_side_with_norm_and_bias(variant: str, kind: NormKind) -> None:
    weights: list[Weight] = [
        make_weight(33, 72, 24, has_offsets=True),
        make_weight(20, 72, 72, bits=8),
        torch.randn(7, 72),
    ]
    biases = [torch.randn(33), None, torch.randn(7)]
    norm = Norm(weight=torch.rand(72), bias=torch.randn(72), eps=1e-5, kind=kind)
    ops = open_variant(variant)
    x = make_inputs(6, 72)
    expected = REFERENCE.norm_linear(x, norm, REFERENCE.pack(weights, biases=biases))
    linear = ops.pack(weights, biases=biases)
    assert (linear.in_features, linear.out_features) == (72, 60)
    assert linear.num_bytes < 16 * 60 * 72
    assert relative_error(ops.norm_linear(x, norm, linear), expected) < 1e-4


@pytest.fixture(autouse=True)
def _seed() -> None:
    """The same numbers in whatever order tests run: noise of a norm tips a code now and then."""
    torch.manual_seed(0)


GATED: dict[str, list[Weight]] = {
    "float": [torch.randn(64, 72), torch.randn(64, 72)],
    "in-one": [torch.randn(96, 72)],
    "half-tiles": [torch.randn(40, 72), torch.randn(40, 72)],
    "unlike": [torch.randn(64, 64), make_weight(64, 64, 32, activation=ASYMMETRIC)],
    "bf16": [torch.randn(64, 72).to(torch.bfloat16)] * 2,
    "float8": [make_float(torch.float8_e4m3fn)] * 2,
    "int8": [make_weight(48, 64, 64, bits=8, activation=ASYMMETRIC)] * 2,
    "int4": [make_weight(48, 64, 32, activation=ASYMMETRIC)] * 2,
    "int4-exact": [make_weight(48, 64, 32, has_offsets=True)] * 2,
    "int8-exact": [make_weight(48, 64, 64, bits=8)] * 2,
}


@pytest.mark.parametrize("name", GATED)
@pytest.mark.parametrize("variant", VARIANTS)
def test_gated_linears(variant: str, name: str) -> None:
    weights = GATED[name]
    out_features = sum(len(weight.codes if isinstance(weight, QuantizedWeight) else weight) for weight in weights)
    biases = [torch.randn(out_features // len(weights)) for _ in weights]
    ops, x = open_variant(variant), make_inputs(70, weights[0].shape[1])
    norm = Norm(weight=torch.rand(x.shape[1]), eps=1e-6)
    packed = ops.pack(weights, biases=biases, is_gated=True)
    plain = REFERENCE.pack(weights, biases=biases, is_gated=True)
    for rows in (1, 5, 24, 70):
        expected = REFERENCE.gated_linear(x[:rows], norm, plain, activation=Activation.SILU)
        found = ops.gated_linear(x[:rows], norm, packed, activation=Activation.SILU)
        assert relative_error(found, expected) < 1e-3, rows


@pytest.mark.parametrize("activation", list(Activation))
@pytest.mark.parametrize("variant", VARIANTS)
def test_activations_of_gates(variant: str, activation: Activation) -> None:
    ops, weights, x = open_variant(variant), [torch.randn(32, 72), torch.randn(32, 72)], torch.randn(5, 72)
    expected = REFERENCE.gated_linear(x, None, REFERENCE.pack(weights, biases=[None, None]), activation=activation)
    packed = ops.pack(weights, biases=[None, None], is_gated=True)
    assert relative_error(ops.gated_linear(x, None, packed, activation=activation), expected) < 1e-5


@pytest.mark.parametrize("has_post_norm", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_added_to_the_residual(variant: str, has_post_norm: bool) -> None:
    weight = torch.randn(50, 72)
    ops = open_variant(variant)
    x, residual = torch.randn(5, 72), torch.randn(5, 50)
    post_norm = Norm(weight=torch.rand(50), eps=1e-6) if has_post_norm else None
    plain, packed = REFERENCE.pack([weight], biases=[None]), ops.pack([weight], biases=[None])
    expected = REFERENCE.linear_add(x, plain, residual, post_norm=post_norm, multiplier=0.7)
    found = ops.linear_add(x, packed, residual.clone(), post_norm=post_norm, multiplier=0.7)
    assert relative_error(found, expected) < 1e-6


@pytest.mark.parametrize("variant", VARIANTS)
def test_linear_add_and_head(variant: str) -> None:
    weight, norm = torch.randn(50, 72), Norm(weight=torch.rand(72), eps=1e-6)
    ops = open_variant(variant)
    x, residual = torch.randn(5, 72), torch.randn(5, 50)
    linear, plain = ops.pack([weight], biases=[None]), REFERENCE.pack([weight], biases=[None])
    added = REFERENCE.linear_add(x, plain, residual, multiplier=0.3)
    assert relative_error(ops.linear_add(x, linear, residual.clone(), multiplier=0.3), added) < 1e-6
    logits = REFERENCE.head(x, norm, plain, scale=0.5, soft_cap=3.0)
    assert relative_error(ops.head(x, norm, linear, scale=0.5, soft_cap=3.0), logits) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_embed(dtype: torch.dtype) -> None:
    table, ids = torch.randn(30, 50).to(dtype), torch.tensor([4, 29, 0, 4])
    assert torch.equal(open_variant(VARIANTS[0]).embed(ids, table, scale=2.0), table[ids].to(torch.float32) * 2.0)


def test_embed_quantized() -> None:
    table, ids = make_weight(30, 64, 32), torch.tensor([4, 29, 0, 4])
    assert torch.equal(open_variant(VARIANTS[0]).embed(ids, table, scale=1.0), table.dequantize()[ids])


def test_learned_zero_points_become_offsets() -> None:
    weight = make_weight(20, 64, 32)
    learned = QuantizedWeight(
        codes=weight.codes,
        scales=weight.scales,
        zero_points=torch.randn(20, 2),
        group_size=32,
        bits=4,
        dtype=torch.float32,
    )
    x = torch.randn(4, 64)
    expected = x.double() @ learned.dequantize().double().T
    assert relative_error(apply(open_variant(VARIANTS[0]), learned, x), expected) < 1e-4


def test_packing_keeps_the_stored_width() -> None:
    weight = make_weight(64, 256, 32, has_offsets=True)
    assert pack_weight(weight).num_bytes == 64 * 256 // 2 + 2 * 64 * 8 * 2 + 64 * 4
    assert pack_weight(make_weight(64, 256, 256, bits=8)).num_bytes == 64 * 256 + 64 * 2
    assert pack_weight(torch.zeros(64, 256, dtype=torch.bfloat16)).num_bytes == 64 * 256 * 2


def test_inputs_that_are_rounded_in_two_ways_are_refused() -> None:
    weights: list[Weight] = [make_weight(16, 256, 32, activation=ActivationQuantization.NVFP4), torch.randn(16, 256)]
    with pytest.raises(UnsupportedWeight, match="nvfp4, float"):
        open_variant(VARIANTS[0]).pack(weights, biases=[None, None])
