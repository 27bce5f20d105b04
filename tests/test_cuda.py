"""The CUDA path against the CPU's plain torch: logits, texts, and a whole engine. Runs where torch finds a device."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qserve.build import build_llm
from qserve.config import DeviceConfig, EngineConfig
from qserve.device.fallback import Fallback, load_fallback
from qserve.engine.request import Request, SamplingParams
from qserve.kernels.cuda.open import open_cuda
from qserve.kernels.ops import Ops
from qserve.kernels.reference import ReferenceOps
from tests import tiny
from tests.device.driving import CPU, GREEDY, chunked_logits, config_of, generate, load, prompt, runner_for, weights_of
from tests.device.quantizing import DYNAMIC, WEIGHT_ONLY, quantize_linears

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device here")

CUDA = torch.device("cuda")
PROMPTS, SIZES = [prompt(40), prompt(7, seed=1), prompt(23, seed=2)], [9, 1, 23]
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "smollm3", "granite")
OPS: dict[str, Callable[[], Ops]] = {
    "reference": lambda: ReferenceOps(device=CUDA),
    "triton": lambda: open_cuda(CUDA)[0],
}


def difference(model_type: str, kernels: str, quantize: Any = None, *, dtype: torch.dtype = torch.float32) -> float:
    """How far the device's logits are from the CPU's: mixed prompts, decoding and prefill in one step."""
    theirs = tiny.make_model(model_type)
    weights = weights_of(theirs)
    weights = weights if quantize is None else quantize_linears(weights, quantize)
    ours = load(config_of(theirs), weights, device=CUDA, ops=OPS[kernels]())
    oracle = load(config_of(theirs), weights)
    found = torch.cat(chunked_logits(ours, PROMPTS, sizes=SIZES, dtype=dtype, device=CUDA)).cpu()
    return relative_error(found, torch.cat(chunked_logits(oracle, PROMPTS, sizes=SIZES, dtype=dtype)))


def relative_error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("kernels", OPS)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_family(model_type: str, kernels: str) -> None:
    assert difference(model_type, kernels) < 1e-5


@pytest.mark.parametrize(("kernels", "most"), [("reference", 1e-5), ("triton", 5e-3)])
@pytest.mark.parametrize("name", WEIGHT_ONLY)
def test_weights(name: str, kernels: str, most: float) -> None:
    assert difference("llama", kernels, WEIGHT_ONLY[name]) < most


@pytest.mark.parametrize("kernels", OPS)
@pytest.mark.parametrize("name", DYNAMIC)
def test_inputs_that_are_quantized(name: str, kernels: str) -> None:
    """Float noise tips a code that lies on an edge, so what the tipped ones reach may be a little apart."""
    assert difference("llama", kernels, DYNAMIC[name]) < 0.15


@pytest.mark.parametrize("kernels", OPS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_rounded_caches(dtype: torch.dtype, kernels: str) -> None:
    """The same noise tips what is rounded into the cache."""
    assert difference("llama", kernels, dtype=dtype) < 0.01


@pytest.mark.parametrize("kernels", OPS)
@pytest.mark.parametrize("model_type", ["gpt2", "gpt_neox", "mixtral"])
def test_models_of_transformers(model_type: str, kernels: str) -> None:
    theirs = tiny.make_model(model_type)

    def load_on(device: torch.device, ops: Ops) -> Fallback:
        return load_fallback(config_of(theirs), weights_of(theirs), ops=ops, device=device, max_positions=256)

    found = chunked_logits(load_on(CUDA, OPS[kernels]()), PROMPTS, sizes=SIZES, device=CUDA)
    wanted = chunked_logits(load_on(CPU, ReferenceOps(device=CPU)), PROMPTS, sizes=SIZES)
    assert relative_error(torch.cat(found).cpu(), torch.cat(wanted)) < 1e-5


@pytest.mark.parametrize("kernels", OPS)
@pytest.mark.parametrize(
    "params",
    [
        GREEDY,
        SamplingParams(max_tokens=64, temperature=0.8, seed=3),
        SamplingParams(max_tokens=64, temperature=0.8, seed=3, top_p=0.9, top_k=40, min_p=0.01),
        SamplingParams(max_tokens=64, temperature=0.8, seed=3, typical_p=0.8, repetition_penalty=1.2),
    ],
)
def test_texts(params: SamplingParams, kernels: str) -> None:
    """Many steps of the same shape: most of them are replayed."""
    theirs = tiny.make_model("llama")
    texts = []
    for device, ops in ((CUDA, OPS[kernels]()), (CPU, None)):
        model = load(config_of(theirs), weights_of(theirs), device=device, ops=ops)
        requests = [Request(str(i), list(ids), params) for i, ids in enumerate(PROMPTS)]
        generate(runner_for(model, device=device), requests, num_tokens=40)
        texts.append([request.token_ids for request in requests])
    assert texts[0] == texts[1]


@pytest.mark.parametrize("kernels", ["auto", "native", "reference"])
def test_a_whole_engine(kernels: str, tmp_path: Path) -> None:
    """Prompts beside each other, chunked, with guesses ahead and shared beginnings, as users get them."""
    checkpoint = tiny.make_checkpoint(tmp_path / "tiny")
    prompts = ["The first thing", "The first thing to know", "if x:\n    if x:\n    if x:\n"] * 3
    texts = []
    for device, ops in (("cuda", kernels), ("cpu", "reference")):
        config = DeviceConfig(device=device, kernels=ops, kv_cache_mb=8)
        llm = build_llm(checkpoint, device=config, engine=EngineConfig(max_running=4, max_step_tokens=16))
        try:
            assert llm.info.details["kernels"] == ("reference" if ops == "reference" else "triton")
            texts.append(llm.generate(prompts, max_tokens=32, temperature=0.0))
        finally:
            llm.close()
    assert texts[0] == texts[1]
