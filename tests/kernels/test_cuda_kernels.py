"""The GPU's kernels against plain torch: on a GPU where there is one, else in Triton's interpreter on the CPU.

The interpreter multiplies in float32 where a GPU does in tf32, so there the same numbers must come out.
"""

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from qserve.kernels.ops import Batch, Norm, NormKind, Ops
from qserve.kernels.reference import ReferenceOps, normalize
from qserve.kernels.reference_activations import quantize_int8_asymmetric, quantize_int8_symmetric
from qserve.quant.weight import ActivationQuantization, QuantizedWeight, Weight
from tests import tiny
from tests.device.driving import CPU, chunked_logits, config_of, load, prompt, weights_of
from tests.device.quantizing import quantize_float8, quantize_int4, quantize_int8

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

from qserve.kernels.cuda import attention, rows
from qserve.kernels.cuda.linear import pack_part
from qserve.kernels.cuda.ops import CudaOps

HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
TF32 = 2e-3 if HAS_GPU else 1e-6

WEIGHTS: dict[str, Callable[[Tensor], Weight]] = {
    "int4": quantize_int4,
    "int4-offsets": partial(quantize_int4, has_offsets=True),
    "int4-asymmetric": partial(quantize_int4, activation=ActivationQuantization.INT8_ASYMMETRIC),
    "int4-large-groups": partial(quantize_int4, group_size=96),
    "int8": quantize_int8,
    "int8-symmetric": partial(quantize_int8, activation=ActivationQuantization.INT8_SYMMETRIC),
    "float8": partial(quantize_float8, activation=ActivationQuantization.FLOAT8),
    "bfloat16": lambda values: values.to(torch.bfloat16),
}


class SteppingOps(CudaOps):
    """Without graphs, which only a GPU has."""

    def run_step(self, forward: Callable[[], Tensor], batch: Batch, cache: object) -> Tensor:
        return forward()


def relative_error(found: Tensor, wanted: Tensor) -> float:
    return float((found.cpu() - wanted).norm() / wanted.norm())


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("num_rows", [1, 5, 70])
@pytest.mark.parametrize("name", WEIGHTS)
def test_linear(name: str, num_rows: int) -> None:
    """Neither side is a multiple of a tile."""
    weight, x = WEIGHTS[name](torch.randn(50, 192)), torch.randn(num_rows, 192)
    part = pack_part(weight, device=DEVICE)
    assert part is not None
    ops = ReferenceOps(device=CPU)
    wanted = ops.norm_linear(x, None, ops.pack([weight], biases=[None]))
    assert relative_error(part(x.to(DEVICE)), wanted) < TF32


def test_two_codes_stand_in_a_byte() -> None:
    weight = quantize_int4(torch.randn(48, 64))
    part = pack_part(weight, device=DEVICE)
    assert part is not None
    assert part.kernel == "triton-int4"
    assert part.nbytes == weight.codes.numel() // 2 + weight.scales.numel() * 4


def test_zero_points_of_whole_numbers() -> None:
    weight = quantize_int4(torch.randn(48, 64))
    zero_points = torch.randint(-8, 8, weight.scales.shape, dtype=torch.int8)
    shifted = QuantizedWeight(
        codes=weight.codes,
        scales=weight.scales,
        zero_points=zero_points,
        group_size=32,
        bits=4,
        dtype=torch.float32,
    )
    for num_rows in (1, 5):
        x = torch.randn(num_rows, 64)
        part = pack_part(shifted, device=DEVICE)
        assert part is not None
        assert relative_error(part(x.to(DEVICE)), x @ shifted.dequantize().T) < TF32


def test_what_the_kernels_cannot_read_is_left_to_torch() -> None:
    weight = quantize_int4(torch.randn(48, 64))
    learned = QuantizedWeight(
        codes=weight.codes,
        scales=weight.scales,
        zero_points=torch.rand(weight.scales.shape),
        group_size=32,
        bits=4,
        dtype=torch.float32,
    )
    ops = CudaOps(device=DEVICE)
    for each in (learned, torch.randn(48, 64)):
        assert pack_part(each, device=DEVICE) is None
        assert ops.pack([each], biases=[None]).kernel == "torch"


@pytest.mark.parametrize("is_symmetric", [True, False])
def test_codes_of_inputs_are_torchaos(is_symmetric: bool) -> None:
    """All bits, also of rows of zeros and of one sign."""
    x = torch.randn(6, 100) * 3
    x[0], x[1], x[2] = 0, x[1].abs() + 1, -x[2].abs() - 1
    codes, scales = rows.quantize_int8(x.to(DEVICE), is_symmetric=is_symmetric)
    if is_symmetric:
        wanted, wanted_scales = quantize_int8_symmetric(x)
    else:
        shifted, wanted_scales, zero_points = quantize_int8_asymmetric(x)
        wanted = shifted - zero_points
    assert torch.equal(codes.cpu(), wanted)
    assert torch.equal(scales.cpu(), wanted_scales)


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("kind", NormKind)
def test_norms(kind: NormKind, has_bias: bool) -> None:
    x, weight, bias = torch.randn(3, 100), torch.randn(100), torch.randn(100) if has_bias else None
    ours = Norm(weight=weight.to(DEVICE), bias=None if bias is None else bias.to(DEVICE), eps=1e-5, kind=kind)
    wanted = normalize(x, Norm(weight=weight, bias=bias, eps=1e-5, kind=kind))
    torch.testing.assert_close(rows.normalize(x.to(DEVICE), ours).cpu(), wanted, atol=1e-5, rtol=1e-5)


@pytest.fixture
def _many_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_LEAST_PART", 2)
    monkeypatch.setattr(attention, "_MOST_PARTS", 8)
    monkeypatch.setattr(attention, "_TILE", 16)


def logits(theirs: Any, ops: Ops, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Prompts of several lengths in chunks of several sizes, decoding and prefill in one step."""
    model = load(config_of(theirs), weights_of(theirs), device=device, ops=ops)
    prompts, sizes = [prompt(40), prompt(7, seed=1)], [39, 3]
    return torch.cat(chunked_logits(model, prompts, sizes=sizes, dtype=dtype, device=device))


@pytest.mark.parametrize(
    ("model_type", "dtype", "most"),
    [
        ("llama", torch.float32, 1e-5),
        ("llama", torch.int8, 1e-3),  # noise tips a code that lies on an edge
        ("mistral", torch.float32, 1e-5),
        ("qwen3", torch.float32, 1e-5),
        ("gemma2", torch.float32, 1e-5),
        ("phi3", torch.float32, 1e-5),
    ],
)
def test_stages(model_type: str, dtype: torch.dtype, most: float) -> None:
    """Windows, caps, norms of heads, heads that turn in part, a cache of codes."""
    theirs = tiny.make_model(model_type, num_hidden_layers=2)
    wanted = logits(theirs, ReferenceOps(device=CPU), CPU, dtype)
    assert relative_error(logits(theirs, SteppingOps(device=DEVICE), DEVICE, dtype), wanted) < most


@pytest.mark.usefixtures("_many_parts")
@pytest.mark.parametrize("model_type", ["mistral", "gemma2"])
def test_contexts_in_parts(model_type: str) -> None:
    """As long ones are where rows are few; some of the parts here are empty."""
    theirs = tiny.make_model(model_type, num_hidden_layers=1)
    wanted = logits(theirs, ReferenceOps(device=CPU), CPU, torch.float32)
    found = logits(theirs, SteppingOps(device=DEVICE), DEVICE, torch.float32)
    assert relative_error(found, wanted) < 1e-5
