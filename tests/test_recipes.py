"""Every recipe from a float model to logits: finalized, read back, packed, and held against torchao's own forward."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from qserve.checkpoint.contents import Checkpoint
from qserve.checkpoint.detect import detect
from qserve.checkpoint.load import load_model as load_dequantized
from qserve.checkpoint.load import open_weights
from qserve.device.load import load_model
from qserve.kernels.native import open_native
from qserve.kernels.ops import Ops
from qserve.kernels.reference import ReferenceOps
from qserve.kernels.reference_activations import ROUND_TRIPS
from qserve.quant.recipes import RECIPES
from qserve.quant.weight import ActivationQuantization, QuantizedWeight
from tests.device.driving import CPU, MAX_POSITIONS, prompt, their_logits, whole_logits
from tests.tiny import make_checkpoint
from training.cli import main

TOKENS = prompt(48)
# torchao multiplies these with an accelerator alone. The dequantized model stands in, its inputs rounded one by one.
NEEDS_ACCELERATOR = ("int4-weight-only", "float8-dynamic-act-float8-weight", "float8-dynamic-act-int4-weight")
# Relative errors of all logits together. The compiled kernels hold a float input of an integer weight in 16 bits or
# more. Rounded inputs move by a step where sums run in another order than torchao's: with a symmetric scale a token's
# largest value always lies on the edge between two int8 codes, for torchao divides by 127.5.
CLOSE, MOVED = 5e-4, 5e-2


@pytest.fixture(scope="module", params=["native", "reference"])
def ops(request: pytest.FixtureRequest) -> Iterator[Ops]:
    if request.param == "reference":
        yield ReferenceOps(device=CPU)
        return
    native = open_native(num_threads=1)
    yield native
    native.close()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("source") / "tiny", tie_word_embeddings=True)


def finalize(source: Path, out: Path, recipe: str, *options: str) -> Checkpoint:
    assert main(["finalize", str(source), "--out", str(out), "--quantize", recipe, *options]) == 0
    return detect(out)


def torchao_logits(checkpoint: Checkpoint, recipe: str) -> Tensor:
    if recipe in NEEDS_ACCELERATOR:
        return their_logits(stand_in(checkpoint), TOKENS)
    return their_logits(AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32), TOKENS)


def stand_in(checkpoint: Checkpoint) -> nn.Module:
    model = load_dequantized(checkpoint, dtype=torch.float32)
    for name, weight in open_weights(checkpoint).items():
        if isinstance(weight, QuantizedWeight):
            round_trip = ROUND_TRIPS[weight.activation]
            linear = model.get_submodule(name.removesuffix(".weight"))
            linear.register_forward_pre_hook(lambda _, inputs, change=round_trip: (change(inputs[0]),))
    return model


def own_logits(checkpoint: Checkpoint, ops: Ops) -> Tensor:
    weights = open_weights(checkpoint)
    model = load_model(checkpoint.config, weights, ops=ops, device=CPU, max_positions=MAX_POSITIONS)
    return whole_logits(model, TOKENS)


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def tolerance(recipe: str) -> float:
    return CLOSE if RECIPES[recipe].activation is ActivationQuantization.NONE else MOVED


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_artifact_computes_what_torchao_computes(recipe: str, source: Path, tmp_path: Path, ops: Ops) -> None:
    checkpoint = finalize(source, tmp_path / "out", recipe)
    ours, theirs = own_logits(checkpoint, ops), torchao_logits(checkpoint, recipe)
    assert relative_error(ours, theirs) < tolerance(recipe)


@pytest.mark.parametrize("recipe", ["int4-weight-only", "int8-dynamic-act-int4-weight", "int8-weight-only"])
def test_both_formats_give_the_same_bits(recipe: str, source: Path, tmp_path: Path, ops: Ops) -> None:
    logits = [
        own_logits(finalize(source, tmp_path / form, recipe, "--format", form), ops) for form in ("safetensors", "bin")
    ]
    assert torch.equal(*logits)
