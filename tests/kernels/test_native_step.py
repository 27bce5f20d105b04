"""Whole decoders on the compiled kernels: recorded, eager and plain torch agree, and schedules change no bit."""

import random

import pytest
import torch
from torch import Tensor

from qserve.device.architectures import read_spec
from qserve.device.batch import make_batch
from qserve.device.decoder import Decoder, load_decoder
from qserve.device.kv_cache import KVCache, make_cache
from qserve.engine.request import Chunk, Request, SamplingParams
from qserve.kernels.ops import Ops
from qserve.kernels.reference import ReferenceOps
from qserve.quant.weight import ActivationQuantization, Weight
from tests.device.driving import config_of, weights_of
from tests.kernels.native import VARIANTS, make_weight, open_variant, relative_error
from tests.tiny import make_model

CPU = torch.device("cpu")
BLOCK_SIZE = 16
LENGTHS = (70, 33, 5, 18)
PARAMS = SamplingParams(max_tokens=1, temperature=0.0)
FAMILIES = ("llama", "qwen3", "gemma2", "olmo2")


def quantize(weights: dict[str, Weight], activation: ActivationQuantization) -> dict[str, Weight]:
    return {
        name: make_weight(*weight.shape, 32, activation=activation, has_offsets=activation == "none", seed=index)
        if "proj" in name
        else weight
        for index, (name, weight) in enumerate(weights.items())
    }


def load(family: str, ops: Ops, activation: ActivationQuantization | None = None, **changes: int) -> Decoder:
    theirs = make_model(family, **changes)
    spec = read_spec(config_of(theirs))
    assert spec is not None
    weights = weights_of(theirs)
    if activation is not None:
        weights = quantize(weights, activation)
    return load_decoder(spec, weights, ops=ops, device=CPU, max_positions=512)


def cache_of(decoder: Decoder, dtype: torch.dtype) -> KVCache:
    return make_cache(decoder.cache_shapes, num_blocks=40, block_size=BLOCK_SIZE, dtype=dtype, device=CPU)


@torch.inference_mode()
def logits_of(decoder: Decoder, *, seed: int | None, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Of all positions of all sequences: at once, or in random chunks with sequences joining and pausing at random."""
    cache, chooser = cache_of(decoder, dtype), random.Random(seed)
    ids = torch.Generator().manual_seed(0)
    requests = [
        Request(str(index), torch.randint(3, 512, (length,), generator=ids).tolist(), PARAMS)
        for index, length in enumerate(LENGTHS)
    ]
    done = [0] * len(requests)
    rows: list[list[Tensor]] = [[] for _ in requests]
    while any(count < length for count, length in zip(done, LENGTHS, strict=True)):
        active = [
            i for i, length in enumerate(LENGTHS) if done[i] < length and (seed is None or chooser.random() < 0.7)
        ]
        chunks = []
        for index in active:
            size = LENGTHS[index] if seed is None else chooser.choice([1, 1, 1, 2, 7, 40])
            end = min(done[index] + size, LENGTHS[index])
            blocks = tuple(range(index, 40, len(LENGTHS)))
            chunks.append(Chunk(request=requests[index], start=done[index], end=end, block_ids=blocks))
            done[index] = end
        if chunks:
            batch = make_batch(chunks, block_size=BLOCK_SIZE, device=CPU)
            found = decoder.logits(decoder.forward(batch, cache).clone()).clone()
            for index, piece in zip(active, found.split(batch.chunk_tokens), strict=True):
                rows[index].append(piece)
    return [torch.cat(each) for each in rows]


@pytest.mark.parametrize("family", FAMILIES)
def test_decoders_equal_plain_torch(family: str) -> None:
    expected = logits_of(load(family, ReferenceOps(device=CPU)), seed=None)
    found = logits_of(load(family, open_variant(VARIANTS[0])), seed=None)
    assert max(map(relative_error, found, expected)) < 1e-5


@pytest.mark.parametrize(
    "activation",
    [None, ActivationQuantization.NONE, ActivationQuantization.INT8_ASYMMETRIC, ActivationQuantization.MXFP8],
)
@pytest.mark.parametrize("variant", VARIANTS)
def test_no_schedule_changes_a_bit(variant: str, activation: ActivationQuantization | None) -> None:
    decoder = load("llama", open_variant(variant), activation)
    whole = logits_of(decoder, seed=None)
    for seed in (0, 1):
        scheduled = logits_of(decoder, seed=seed)
        assert all(torch.equal(found, wanted) for found, wanted in zip(scheduled, whole, strict=True)), seed
    alone = logits_of(load("llama", open_variant(variant, 1), activation), seed=2)
    assert all(torch.equal(found, wanted) for found, wanted in zip(alone, whole, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
@pytest.mark.parametrize("variant", VARIANTS)
def test_nor_does_one_over_a_rounded_cache(variant: str, dtype: torch.dtype) -> None:
    whole = logits_of(load("gemma2", open_variant(variant), head_dim=64), seed=None, dtype=dtype)
    for seed, threads in ((0, 2), (1, 1)):
        decoder = load("gemma2", open_variant(variant, threads), head_dim=64)
        scheduled = logits_of(decoder, seed=seed, dtype=dtype)
        assert all(torch.equal(found, wanted) for found, wanted in zip(scheduled, whole, strict=True)), seed


def test_a_second_cache_has_recordings_of_its_own() -> None:
    decoder = load("llama", open_variant(VARIANTS[0]))
    first, second = logits_of(decoder, seed=3), logits_of(decoder, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
